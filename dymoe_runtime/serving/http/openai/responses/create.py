"""POST /v1/responses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend, new_id
from dymoe_runtime.serving.http.answers.generation import Ask, Generation, Piece
from dymoe_runtime.serving.http.answers.prompts import chat_prompt, reasoning_key, reasoning_variables
from dymoe_runtime.serving.http.answers.structure import answer_constraint, constraint_of, tools_of
from dymoe_runtime.serving.http.endpoint import Call
from dymoe_runtime.serving.http.exchange.errors import bad_field
from dymoe_runtime.serving.http.exchange.forms import RESPONSES
from dymoe_runtime.serving.http.exchange.responses import Stream, event, json_response
from dymoe_runtime.serving.http.openai.fields import AnswerDetails, TokensDetails
from dymoe_runtime.serving.http.openai.responses.items import (
    Incomplete,
    OutputItem,
    OutputPart,
    ResponseBody,
    ResponseEvent,
    ResponseUsage,
)
from dymoe_runtime.serving.http.openai.responses.requests import (
    ResponseRequest,
    check,
    definitions,
    template_messages,
)
from dymoe_runtime.serving.http.openai.shared import chosen_token

LOGPROBS = "message.output_text.logprobs"
# The kinds of items, by their kinds of parts and the names of their events.
PARTS = {"message": ("output_text", "response.output_text"), "reasoning": ("reasoning_text", "response.reasoning_text")}
PREFIX = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


async def create_response(backend: Backend, call: Call) -> ASGIApp:
    """Answer a text or a conversation."""
    body: ResponseRequest = call.body
    check(body)
    tools_given = definitions(body.tools or [])
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else {"name": body.tool_choice.name}
    many = body.parallel_tool_calls is not False
    tools = tools_of(backend, tools_given, choice, many=many, piecewise=bool(body.stream))
    effort = body.reasoning.effort if body.reasoning is not None else None
    variables = reasoning_variables(backend, effort=effort) | (body.chat_template_kwargs or {})
    messages = template_messages(body, reasoning_key(backend))
    prompt = await chat_prompt(backend, messages, variables, tools.definitions)
    sampling = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
    }
    wants_logprobs = bool(body.top_logprobs) or LOGPROBS in (body.include or ())
    constraint = await backend.in_thread(
        lambda: answer_constraint(backend, tools, lambda: _constraint(backend, body), "text.format")
    )
    ask = Ask(
        sampling,
        body.seed,
        max_tokens=body.max_output_tokens,
        logprobs=body.top_logprobs or 0 if wants_logprobs else None,
        constraint=constraint,
        calls=tools.calls,
    )
    answer = _Answer(backend, body, Generation(backend, [prompt], ask))
    if body.stream:
        return Stream(answer.events(), RESPONSES)
    return json_response(await answer.whole())


def _constraint(backend: Backend, body: ResponseRequest) -> Callable[[], Any] | None:
    wanted = body.text.format if body.text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return constraint_of(backend, True, None, "text.format")
    if wanted.schema is None:
        raise bad_field("text.format.schema", "this field is required")
    return constraint_of(backend, wanted.schema, None, "text.format.schema")


class _Answer:
    """An answer as items, one after another."""

    def __init__(self, backend: Backend, body: ResponseRequest, generation: Generation) -> None:
        self._backend, self._generation = backend, generation
        params = backend.settings.params
        self._response = ResponseBody(
            id=new_id("resp_"),
            created_at=int(time.time()),
            model=backend.service.name,
            status="in_progress",
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning={"effort": None, "summary": None}
            if body.reasoning is None
            else msgspec.to_builtins(body.reasoning),
            temperature=params.temperature if body.temperature is None else body.temperature,
            text={"format": {"type": "text"}} if body.text is None else _given(body.text),
            tool_choice="auto" if body.tool_choice is None else _given(body.tool_choice),
            tools=[_given(tool) for tool in body.tools or []],
            top_p=params.top_p if body.top_p is None else body.top_p,
            top_logprobs=body.top_logprobs or 0,
        )
        self._number = 0  # of the next event
        self._finish = "stop"

    async def whole(self) -> ResponseBody:
        """Return the response once it is complete."""
        async for piece in self._generation.pieces():
            for _ in self._add(piece):
                pass
        for _ in self._close():
            pass
        return self._ended()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        pieces, begun = self._generation.pieces(), False
        try:
            async for piece in pieces:
                if not begun:
                    begun = True
                    yield self._sent("response.created", response=self._response)
                    yield self._sent("response.in_progress", response=self._response)
                for made in self._add(piece):
                    yield made
        finally:
            await pieces.aclose()
        for made in self._close():
            yield made
        response = self._ended()
        yield self._sent(f"response.{response.status}", response=response)

    def _add(self, piece: Piece) -> Iterator[bytes]:
        """Take a piece; yield the events that it makes."""
        self._finish = piece.finish or self._finish
        if piece.reasoning:
            yield from self._write("reasoning", piece.reasoning, None)
        token = piece.token
        shown = token is not None and token.logprob is not None and token.id not in self._generation.ending.ids
        if piece.text or (shown and not piece.reasoning and not piece.calls):
            yield from self._write("message", piece.text, piece if shown else None)
        for delta in piece.calls:
            if delta.name is not None:
                yield from self._open("function_call", delta)
            item = self._item
            item.arguments = (item.arguments or "") + delta.arguments
            yield self._of_item("response.function_call_arguments.delta", delta=delta.arguments)

    def _write(self, kind: str, text: str, piece: Piece | None) -> Iterator[bytes]:
        yield from self._open(kind)
        part = self._part
        part.text += text
        logprobs: Any = UNSET
        if kind == "message":
            logprobs = [chosen_token(self._backend, piece.token)] if piece is not None and piece.token else []
            part.logprobs = [*(part.logprobs or []), *logprobs]
        yield self._of_part(f"{PARTS[kind][1]}.delta", delta=text, logprobs=logprobs)

    @property
    def _item(self) -> OutputItem:
        return self._response.output[-1]

    @property
    def _part(self) -> OutputPart:
        content = self._item.content
        assert content
        return content[-1]

    def _open(self, kind: str, call: Any = None) -> Iterator[bytes]:
        """Begin an item of a kind, unless one is open that takes more of it."""
        output = self._response.output
        if output and self._item.type == kind and call is None:
            return
        yield from self._close()
        item = OutputItem(new_id(PREFIX[kind]), kind, "in_progress")
        if kind == "message":
            item.role, item.content = "assistant", []
        elif kind == "reasoning":
            item.summary, item.content = [], []
        else:
            item.call_id, item.name, item.arguments = call.id, call.name, ""
        output.append(item)
        yield self._sent("response.output_item.added", output_index=len(output) - 1, item=item)
        if kind in PARTS:
            lists: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "message" else {}
            item.content = [OutputPart(PARTS[kind][0], "", **lists)]
            yield self._of_part("response.content_part.added", part=self._part)

    def _close(self) -> Iterator[bytes]:
        """End the item that is open, if there is one."""
        if not self._response.output or self._item.status != "in_progress":
            return
        item = self._item
        item.status = "completed"
        if item.type in PARTS:
            part = self._part
            logprobs = part.logprobs if item.type == "message" else UNSET
            yield self._of_part(f"{PARTS[item.type][1]}.done", text=part.text, logprobs=logprobs)
            yield self._of_part("response.content_part.done", part=part)
        else:
            yield self._of_item("response.function_call_arguments.done", arguments=item.arguments, name=item.name)
        index = len(self._response.output) - 1
        yield self._sent("response.output_item.done", output_index=index, item=item)

    def _of_item(self, kind: str, **values: Any) -> bytes:
        return self._sent(kind, output_index=len(self._response.output) - 1, item_id=self._item.id, **values)

    def _of_part(self, kind: str, **values: Any) -> bytes:
        return self._of_item(kind, content_index=0, **values)

    def _sent(self, kind: str, **values: Any) -> bytes:
        self._number += 1
        return event(ResponseEvent(kind, self._number - 1, **values), kind)

    def _ended(self) -> ResponseBody:
        """Return the response, with why it ended and its usage."""
        response, usage = self._response, self._generation.usage
        response.status = "incomplete" if self._finish == "length" else "completed"
        if self._finish == "length":
            response.incomplete_details = Incomplete("max_output_tokens")
        response.completed_at = int(time.time())
        response.usage = ResponseUsage(
            usage.prompt,
            TokensDetails(usage.reused),
            usage.answer,
            AnswerDetails(usage.reasoning),
            usage.prompt + usage.answer,
        )
        return response


def _given(value: Any) -> Any:
    """Return a part of the request as JSON has it, without what it leaves out."""
    made = msgspec.to_builtins(value)
    if not isinstance(made, dict):
        return made
    return {key: _given(inner) for key, inner in made.items() if inner is not None}
