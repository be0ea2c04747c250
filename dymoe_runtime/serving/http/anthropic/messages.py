"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend, new_id
from dymoe_runtime.serving.http.answers.generation import Ask, Generation, Piece, found_stop
from dymoe_runtime.serving.http.answers.prompts import (
    Prompt,
    chat_prompt,
    reasoning_effort,
    reasoning_key,
    reasoning_variables,
)
from dymoe_runtime.serving.http.answers.structure import Tools, answer_constraint, constraint_of, tools_of
from dymoe_runtime.serving.http.anthropic.requests import (
    CountRequest,
    MessagesRequest,
    choice_of,
    definitions,
    template_messages,
)
from dymoe_runtime.serving.http.endpoint import Call
from dymoe_runtime.serving.http.exchange.forms import ANTHROPIC
from dymoe_runtime.serving.http.exchange.responses import Stream, event, json_response


class TokenCount(msgspec.Struct):
    """Tokens of a conversation, as the chat template writes it."""

    input_tokens: int


class MessageUsage(msgspec.Struct):
    """Tokens of a request and its answer."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnswerBlock(msgspec.Struct, omit_defaults=True):
    """A part of an answer: thinking, text, or a call of a tool."""

    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET


class AnthropicMessage(msgspec.Struct):
    """An answer."""

    id: str
    model: str
    content: list[AnswerBlock]
    usage: MessageUsage
    stop_reason: str | None = None
    stop_sequence: str | None = None
    type: str = "message"
    role: str = "assistant"


async def messages(backend: Backend, call: Call) -> ASGIApp:
    """Answer a conversation."""
    body: MessagesRequest = call.body
    tools = _tools(backend, body, piecewise=bool(body.stream))
    prompt = await _prompt(backend, body, tools)
    stop = tuple(body.stop_sequences or ())
    sampling = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    constraint = await backend.in_thread(
        lambda: answer_constraint(backend, tools, lambda: _constraint(backend, body), "output_config.format")
    )
    ask = Ask(sampling, stop=stop, max_tokens=body.max_tokens, constraint=constraint, calls=tools.calls)
    generation = Generation(backend, [prompt], ask)
    answer = _Answer(backend, generation, stop)
    if body.stream:
        return Stream(answer.events(), ANTHROPIC)
    return json_response(await answer.whole())


async def count_tokens(backend: Backend, call: Call) -> ASGIApp:
    """Count the tokens of a conversation."""
    body: CountRequest = call.body
    prompt = await _prompt(backend, body, _tools(backend, body))
    return json_response(TokenCount(len(prompt.ids)))


def _tools(backend: Backend, body: CountRequest, piecewise: bool = False) -> Tools:
    choice = body.tool_choice
    many = choice is None or not choice.disable_parallel_tool_use
    return tools_of(backend, definitions(body.tools or ()), choice_of(choice), many=many, piecewise=piecewise)


def _constraint(backend: Backend, body: MessagesRequest) -> Callable[[], Any] | None:
    if body.output_config is not None and body.output_config.format is not None:
        return constraint_of(backend, body.output_config.format.schema, None, "output_config.format.schema")
    if body.output_format is not None:
        return constraint_of(backend, body.output_format.schema, None, "output_format.schema")
    return None


async def _prompt(backend: Backend, body: CountRequest, tools: Tools) -> Prompt:
    thinks = None if body.thinking is None else body.thinking.type != "disabled"
    effort = body.output_config.effort if body.output_config is not None else None
    # Without `thinking`, an effort alone switches nothing on.
    variables = reasoning_variables(backend, thinks) | reasoning_effort(backend, effort)
    asked = template_messages(body, reasoning_key(backend))
    return await chat_prompt(backend, asked, variables, tools.definitions)


class _Answer:
    """An answer as blocks, one after another: thinking, text, calls."""

    def __init__(self, backend: Backend, generation: Generation, stop: tuple[str, ...]) -> None:
        self._backend, self._generation, self._stop = backend, generation, stop
        self._ids: list[int] = []
        self._blocks: list[AnswerBlock] = []
        self._arguments: list[str] = []  # of the block that is open, where it is a call
        self._message = AnthropicMessage(new_id("msg_"), backend.service.name, [], MessageUsage(0, 0))
        self._finish, self._streamed = "stop", False

    async def whole(self) -> AnthropicMessage:
        """Return the answer once it is complete."""
        async for piece in self._generation.pieces():
            for _ in self._add(piece):
                pass
        for _ in self._close():
            pass
        self._end()
        self._message.content = self._blocks or [AnswerBlock("text", "")]
        return self._message

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        self._streamed = True
        pieces, begun = self._generation.pieces(), False
        try:
            async for piece in pieces:
                if not begun:
                    begun = True
                    self._count()
                    yield event({"type": "message_start", "message": self._message}, "message_start")
                for data in self._add(piece):
                    yield event(data, data["type"])
        finally:
            await pieces.aclose()
        for data in self._close():
            yield event(data, data["type"])
        self._end()
        message = self._message
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        yield event({"type": "message_delta", "delta": delta, "usage": message.usage}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Take a piece; yield the events that it makes."""
        if piece.token is not None:
            self._ids.append(piece.token.id)
        self._finish = piece.finish or self._finish
        if piece.reasoning:
            yield from self._open("thinking")
            self._blocks[-1].thinking += piece.reasoning  # type: ignore[operator]
            yield self._delta({"type": "thinking_delta", "thinking": piece.reasoning})
        if piece.text:
            yield from self._open("text")
            self._blocks[-1].text += piece.text  # type: ignore[operator]
            yield self._delta({"type": "text_delta", "text": piece.text})
        for delta in piece.calls:
            if delta.name is not None:
                yield from self._open("tool_use", delta)
            self._arguments.append(delta.arguments)
            if delta.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": delta.arguments})

    def _open(self, kind: str, call: Any = None) -> Iterator[dict[str, Any]]:
        """Begin a block of a kind, unless one is open that takes more of it."""
        if self._blocks and self._blocks[-1].type == kind and call is None:
            return
        yield from self._close()
        if kind == "tool_use":
            block = AnswerBlock(kind, id=call.id, name=call.name, input={})
        else:
            block = AnswerBlock(kind, "") if kind == "text" else AnswerBlock(kind, thinking="", signature="")
        self._blocks.append(block)
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the block that is open, if there is one."""
        if self._blocks:
            if self._blocks[-1].type == "tool_use":
                if not self._streamed:  # there the reader joins the pieces, also of a call that was cut off
                    self._blocks[-1].input = msgspec.json.decode("".join(self._arguments) or "{}")
                self._arguments = []
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _count(self) -> None:
        usage = self._generation.usage
        self._message.usage = MessageUsage(usage.prompt - usage.reused, usage.answer, usage.reused)

    def _end(self) -> None:
        """Say why the answer ended."""
        self._count()
        found = found_stop(self._backend, self._stop, self._ids) if self._finish == "stop" and self._stop else None
        ended = bool(self._ids) and self._ids[-1] in self._backend.tokenizer.eos_ids
        if any(block.type == "tool_use" for block in self._blocks) and self._finish == "stop":
            self._message.stop_reason = "tool_use"
        elif found is not None and not ended:
            self._message.stop_reason, self._message.stop_sequence = "stop_sequence", found
        else:
            self._message.stop_reason = "max_tokens" if self._finish == "length" else "end_turn"
