"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.answers.generation import Generation, Piece
from dymoe_runtime.serving.http.answers.prompts import chat_prompt, reasoning_key, reasoning_variables
from dymoe_runtime.serving.http.answers.structure import answer_constraint, constraint_of, tools_of
from dymoe_runtime.serving.http.endpoint import Call
from dymoe_runtime.serving.http.exchange.errors import bad_field
from dymoe_runtime.serving.http.exchange.forms import OPENAI
from dymoe_runtime.serving.http.exchange.responses import Stream, event, json_response
from dymoe_runtime.serving.http.openai.fields import Likely, SamplingFields, Tokens, UsageBody
from dymoe_runtime.serving.http.openai.messages import ChatMessage, template_messages
from dymoe_runtime.serving.http.openai.shared import (
    DONE,
    ChosenToken,
    ask_of,
    chosen_token,
    head_of,
    streams_usage,
    usage_of,
)


class JsonSchema(msgspec.Struct):
    """A schema, and a name for it."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """The format that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None  # where llama-server has it


class FunctionDefinition(msgspec.Struct):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct):
    """A tool that the model may call."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct):
    """The name of a function."""

    name: str


class NamedTool(msgspec.Struct):
    """The tool that the model must call."""

    function: NamedFunction
    type: Literal["function"] = "function"


class ChatRequest(SamplingFields, kw_only=True):
    """A conversation to answer."""

    messages: list[ChatMessage]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Likely | None = None
    response_format: ResponseFormat | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CalledFunction(msgspec.Struct, omit_defaults=True):
    """A function that the answer calls, and its arguments as JSON; a stream has pieces of it."""

    name: str | UnsetType = UNSET
    arguments: str = msgspec.field(default_factory=str)


class CalledTool(msgspec.Struct, omit_defaults=True):
    """A call, or a piece of the call with its index."""

    function: CalledFunction
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    index: int | UnsetType = UNSET


class Logprobs(msgspec.Struct):
    """Log-probabilities of the tokens of an answer."""

    content: list[ChosenToken]
    refusal: None = None


class AnswerMessage(msgspec.Struct):
    """The answer."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class Choice(msgspec.Struct):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct):
    """All answers to a conversation."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody
    object: str = "chat.completion"
    system_fingerprint: str | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to an answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """What a chunk adds to the answer of an index."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct):
    """A part of a stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: str = "chat.completion.chunk"
    system_fingerprint: str | None = None
    usage: UsageBody | UnsetType | None = UNSET


async def chat_completions(backend: Backend, call: Call) -> ASGIApp:
    """Answer a conversation."""
    body: ChatRequest = call.body
    if body.top_logprobs and not body.logprobs:
        raise bad_field("top_logprobs", "it goes with logprobs: true")
    definitions = [msgspec.to_builtins(_definition(tool)) for tool in body.tools or ()]
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else {"name": body.tool_choice.function.name}
    many = body.parallel_tool_calls is not False
    tools = tools_of(backend, definitions, choice, many=many, piecewise=bool(body.stream))
    variables = reasoning_variables(backend, effort=body.reasoning_effort) | (body.chat_template_kwargs or {})
    messages = template_messages(body.messages, reasoning_key(backend))
    prompt = await chat_prompt(backend, messages, variables, tools.definitions)
    field = "grammar" if body.grammar is not None else "response_format"
    constraint = await backend.in_thread(
        lambda: answer_constraint(backend, tools, lambda: _constraint(backend, body), field)
    )
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    ask = ask_of(backend, body, body.max_completion_tokens or body.max_tokens, logprobs, constraint, tools.calls)
    generation = Generation(backend, [prompt], ask)
    head = head_of(backend, "chatcmpl-")
    if body.stream:
        return Stream(_chunks(backend, generation, head, streams_usage(body)), OPENAI)
    return json_response(await _whole(backend, generation, head, ask.count))


def _definition(tool: ToolDefinition) -> dict[str, Any]:
    """Return a tool as templates take it, without fields that the request leaves out."""
    function = {name: value for name, value in msgspec.to_builtins(tool.function).items() if value is not None}
    return {"type": "function", "function": {"description": "", "parameters": {}} | function}


def _constraint(backend: Backend, body: ChatRequest) -> Any:
    if body.grammar is not None:
        return constraint_of(backend, None, body.grammar, "grammar")
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return constraint_of(backend, wanted.schema or True, None, "response_format")
    schema = wanted.schema if wanted.json_schema is None else wanted.json_schema.schema
    if schema is None:
        raise bad_field("response_format.json_schema.schema", "this field is required")
    return constraint_of(backend, schema, None, "response_format.json_schema.schema")


class Collected:
    """One answer, as its pieces come."""

    def __init__(self) -> None:
        self.text, self.reasoning, self.finish = "", "", "stop"
        self.calls: dict[int, CalledTool] = {}
        self.tokens: list[ChosenToken] = []

    def add(self, backend: Backend, piece: Piece, ids: frozenset[int]) -> None:
        """Take the next piece; `ids` end answers, and are no part of them."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        for delta in piece.calls:
            call = self.calls.setdefault(delta.index, CalledTool(CalledFunction(""), "", "function"))
            call.id, call.function.name = call.id or delta.id, call.function.name or delta.name or ""
            call.function.arguments += delta.arguments
        self.tokens += logprobs_of(backend, piece, ids)
        self.finish = piece.finish or self.finish

    def choice(self, index: int, with_logprobs: bool) -> Choice:
        """Return the whole answer."""
        calls = list(self.calls.values())
        message = AnswerMessage(self.text if self.text or not calls else None)
        if self.reasoning:
            message.reasoning_content = self.reasoning
        if calls:
            message.tool_calls = calls
        logprobs = Logprobs(self.tokens) if with_logprobs else None
        return Choice(index, message, logprobs, finish_reason(self.finish, bool(calls)))


def finish_reason(finish: str, calls: bool) -> str:
    """Return why an answer ended, as OpenAI names it."""
    return "tool_calls" if calls and finish == "stop" else finish


def logprobs_of(backend: Backend, piece: Piece, ids: frozenset[int]) -> list[ChosenToken]:
    """Return the log-probabilities of a piece's token, unless it only ended the answer."""
    token = piece.token
    if token is None or token.logprob is None or token.id in ids:
        return []
    return [chosen_token(backend, token)]


async def _whole(backend: Backend, generation: Generation, head: tuple[str, int, str], count: int) -> ChatCompletion:
    collected = [Collected() for _ in range(count)]
    async for piece in generation.pieces():
        collected[piece.index].add(backend, piece, generation.ending.ids)
    choices = [one.choice(index, generation.with_logprobs) for index, one in enumerate(collected)]
    return ChatCompletion(*head, choices, usage_of(generation))


async def _chunks(
    backend: Backend, generation: Generation, head: tuple[str, int, str], with_usage: bool
) -> AsyncGenerator[bytes, None]:
    begun, called = set[int](), set[int]()
    usage: UnsetType | None = None if with_usage else UNSET

    def chunk(index: int, delta: Delta, logprobs: Logprobs | None = None, finish: str | None = None) -> bytes:
        return event(ChatChunk(*head, [ChunkChoice(index, delta, logprobs, finish)], usage=usage))

    pieces = generation.pieces()
    try:
        async for piece in pieces:
            index = piece.index
            if index not in begun:
                begun.add(index)
                yield chunk(index, Delta("assistant", ""))
            tokens = logprobs_of(backend, piece, generation.ending.ids)
            logprobs = Logprobs(tokens) if tokens else None
            if piece.reasoning:
                yield chunk(index, Delta(reasoning_content=piece.reasoning))
            if piece.text or tokens:
                yield chunk(index, Delta(content=piece.text), logprobs)
            for delta in piece.calls:
                called.add(index)
                yield chunk(index, Delta(tool_calls=[_call_piece(delta)]))
            if piece.finish:
                yield chunk(index, Delta(), finish=finish_reason(piece.finish, index in called))
    finally:
        await pieces.aclose()
    if with_usage:
        yield event(ChatChunk(*head, [], usage=usage_of(generation)))
    yield DONE


def _call_piece(delta: Any) -> CalledTool:
    if delta.name is None:
        return CalledTool(CalledFunction(arguments=delta.arguments), index=delta.index)
    return CalledTool(CalledFunction(delta.name, delta.arguments), delta.id, "function", delta.index)
