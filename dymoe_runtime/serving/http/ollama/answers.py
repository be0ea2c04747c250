"""POST /api/chat and /api/generate."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.answers.generation import Ask, Generation, Piece
from dymoe_runtime.serving.http.answers.prompts import (
    Prompt,
    chat_prompt,
    reasoning_key,
    reasoning_variables,
    text_prompt,
)
from dymoe_runtime.serving.http.answers.structure import Tools, answer_constraint, constraint_of, tools_of
from dymoe_runtime.serving.http.endpoint import Call
from dymoe_runtime.serving.http.exchange.errors import bad_field
from dymoe_runtime.serving.http.exchange.forms import OLLAMA
from dymoe_runtime.serving.http.exchange.responses import LINES, Stream, json_response, line
from dymoe_runtime.serving.http.models import iso_time
from dymoe_runtime.serving.http.ollama.models import check_name
from dymoe_runtime.serving.http.ollama.requests import (
    Common,
    GenerateRequest,
    OllamaChat,
    Options,
    definitions,
    template_messages,
)
from dymoe_runtime.serving.http.openai.shared import LikelyToken, chosen_token, stops

NANOSECONDS = 1_000_000_000


class OllamaFunction(msgspec.Struct):
    """A function that the answer calls."""

    name: str
    arguments: dict[str, Any]
    index: int = 0


class OllamaCall(msgspec.Struct):
    """A call that the answer makes."""

    function: OllamaFunction
    id: str = ""


class OllamaAnswer(msgspec.Struct, omit_defaults=True):
    """An answer, or a part of it."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    tool_calls: list[OllamaCall] | UnsetType = UNSET


class Part(msgspec.Struct, omit_defaults=True):
    """An answer or a part of it; the last one says why and when it ended, with times in nanoseconds."""

    model: str
    created_at: str
    done: bool | UnsetType
    message: OllamaAnswer | UnsetType = UNSET
    response: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    logprobs: list[LikelyToken] | UnsetType = UNSET
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


# Puts text, reasoning and calls of an answer into a part.
Fill = Callable[[Part, str, str, list[OllamaCall]], None]


async def chat(backend: Backend, call: Call) -> ASGIApp:
    """Answer a conversation."""
    body: OllamaChat = call.body
    check_name(backend, body.model)
    if not body.messages:
        return json_response(_loaded(backend, fill_chat))
    tools = tools_of(backend, definitions(body.tools or []), None)
    messages = template_messages(body.messages, reasoning_key(backend))
    prompt = await chat_prompt(backend, messages, _variables(backend, body), tools.definitions)
    return await _answer(backend, body, prompt, fill_chat, tools)


async def generate(backend: Backend, call: Call) -> ASGIApp:
    """Answer a text, or continue it."""
    body: GenerateRequest = call.body
    check_name(backend, body.model)
    for field in ("images", "suffix"):
        if getattr(body, field):
            raise bad_field(field, "this is not supported by the model; leave it out")
    if not body.prompt:
        return json_response(_loaded(backend, fill_text))
    if body.raw or not backend.tokenizer.has_chat_template:
        prompt = await text_prompt(backend, body.prompt)
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        prompt = await chat_prompt(backend, messages, _variables(backend, body))
    return await _answer(backend, body, prompt, fill_text, Tools())


def fill_chat(part: Part, text: str, reasoning: str, calls: list[OllamaCall]) -> None:
    """Put an answer into a part of a chat."""
    part.message = OllamaAnswer("assistant", text)
    if reasoning:
        part.message.thinking = reasoning
    if calls:
        part.message.tool_calls = calls


def fill_text(part: Part, text: str, reasoning: str, calls: list[OllamaCall]) -> None:
    """Put an answer into a part of a text."""
    part.response = text
    if reasoning:
        part.thinking = reasoning


def _variables(backend: Backend, body: Common) -> dict[str, Any]:
    if isinstance(body.think, str):
        return reasoning_variables(backend, effort=body.think)
    return reasoning_variables(backend, body.think)


def _loaded(backend: Backend, fill: Fill) -> Part:
    part = Part(backend.service.name, iso_time(time.time()), True, done_reason="load")
    fill(part, "", "", [])
    return part


async def _answer(backend: Backend, body: Common, prompt: Prompt, fill: Fill, tools: Tools) -> ASGIApp:
    options, wanted = body.options or Options(), body.format
    schema = None if not wanted else True if isinstance(wanted, str) else wanted
    constraint = await backend.in_thread(
        lambda: answer_constraint(backend, tools, lambda: constraint_of(backend, schema, None, "format"), "format")
    )
    count = options.num_predict if options.num_predict is not None and options.num_predict > 0 else None
    sampling = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
    }
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    ask = Ask(sampling, options.seed, stops(options.stop), count, logprobs, 1, constraint, tools.calls)
    answer = _Answer(backend, Generation(backend, [prompt], ask), fill)
    if body.stream is None or body.stream:
        return Stream(answer.parts(), OLLAMA, LINES)
    return json_response(await answer.whole())


class _Answer:
    """An answer, whole or in parts."""

    def __init__(self, backend: Backend, generation: Generation, fill: Fill) -> None:
        self._backend, self._generation, self._fill = backend, generation, fill
        self._begun, self._first = time.perf_counter(), 0.0

    async def whole(self) -> Part:
        """Return the answer once it is complete."""
        text, reasoning, calls, tokens, finish = "", "", list[OllamaCall](), list[LikelyToken](), "stop"
        async for piece in self._generation.pieces():
            self._note()
            text, reasoning = text + piece.text, reasoning + piece.reasoning
            calls += called(piece)
            tokens += self._logprobs(piece)
            finish = piece.finish or finish
        return self._last(finish, text, reasoning, calls, tokens)

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a stream."""
        pieces, finish = self._generation.pieces(), "stop"
        try:
            async for piece in pieces:
                self._note()
                finish = piece.finish or finish
                calls, tokens = called(piece), self._logprobs(piece)
                if piece.text or piece.reasoning or calls or tokens:
                    part = Part(self._backend.service.name, iso_time(time.time()), False)
                    self._fill(part, piece.text, piece.reasoning, calls)
                    part.logprobs = tokens or UNSET
                    yield line(part)
        finally:
            await pieces.aclose()
        yield line(self._last(finish, "", "", [], []))

    def _note(self) -> None:
        self._first = self._first or time.perf_counter()

    def _logprobs(self, piece: Piece) -> list[LikelyToken]:
        token = piece.token
        if token is None or token.logprob is None or token.id in self._generation.ending.ids:
            return []
        return [chosen_token(self._backend, token)]

    def _last(self, finish: str, text: str, reasoning: str, calls: list[OllamaCall], tokens: list[LikelyToken]) -> Part:
        now, usage = time.perf_counter(), self._generation.usage
        first = self._first or now
        part = Part(
            self._backend.service.name,
            iso_time(time.time()),
            True,
            done_reason=finish,
            total_duration=int((now - self._begun) * NANOSECONDS),
            load_duration=0,
            prompt_eval_count=usage.prompt,
            prompt_eval_duration=int((first - self._begun) * NANOSECONDS),
            eval_count=usage.answer,
            eval_duration=int((now - first) * NANOSECONDS),
        )
        self._fill(part, text, reasoning, calls)
        part.logprobs = tokens or UNSET
        return part


def called(piece: Piece) -> list[OllamaCall]:
    """Return the calls of a piece, whose arguments are complete."""
    return [
        OllamaCall(OllamaFunction(delta.name, msgspec.json.decode(delta.arguments or "{}"), delta.index), delta.id)
        for delta in piece.calls
        if delta.name is not None  # parsers give calls in one piece
    ]
