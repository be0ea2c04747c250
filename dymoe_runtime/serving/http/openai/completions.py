"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.types import ASGIApp

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.answers.generation import Generation, Piece
from dymoe_runtime.serving.http.answers.prompts import Prompt, text_prompt
from dymoe_runtime.serving.http.answers.structure import constraint_of
from dymoe_runtime.serving.http.endpoint import Call
from dymoe_runtime.serving.http.exchange.errors import bad_field
from dymoe_runtime.serving.http.exchange.forms import OPENAI
from dymoe_runtime.serving.http.exchange.responses import Stream, event, json_response
from dymoe_runtime.serving.http.openai.fields import Likely, SamplingFields, UsageBody
from dymoe_runtime.serving.http.openai.shared import DONE, ask_of, head_of, spelling, streams_usage, usage_of

MAX_PROMPTS = 64
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


class CompletionRequest(SamplingFields, kw_only=True):
    """Texts to continue: one, several, the token ids of one, or those of several."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Likely | None = None
    json_schema: dict[str, Any] | None = None


class TextLogprobs(msgspec.Struct):
    """Log-probabilities of the tokens of an answer, in the form of completions."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    """One of the answers, or a part of it."""

    text: str
    index: int
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """All answers, or a part of a stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: str = "text_completion"
    system_fingerprint: str | None = None
    usage: UsageBody | UnsetType | None = UNSET


async def completions(backend: Backend, call: Call) -> ASGIApp:
    """Continue texts."""
    body: CompletionRequest = call.body
    prompts = await prompts_of(backend, body.prompt)
    if not all(prompt.ids for prompt in prompts):
        raise bad_field("prompt", "it is empty; send at least one token of text")
    constraint = await backend.in_thread(
        lambda: constraint_of(
            backend, body.json_schema, body.grammar, "json_schema" if body.grammar is None else "grammar"
        )
    )
    ask = ask_of(backend, body, body.max_tokens, body.logprobs, constraint)
    echoed = [backend.tokenizer.decode(prompt.ids) if body.echo else "" for prompt in prompts]
    texts = [text for text in echoed for _ in range(ask.count)]
    generation = Generation(backend, prompts, ask)
    head = head_of(backend, "cmpl-")
    if body.stream:
        return Stream(_chunks(backend, generation, head, texts, streams_usage(body)), OPENAI)
    return json_response(await _whole(backend, generation, head, texts))


async def prompts_of(backend: Backend, prompt: Any) -> list[Prompt]:
    """Return the prompts of a request; raise ApiError unless they are all texts, or all token ids."""
    entries = [prompt] if isinstance(prompt, str) else prompt
    if entries and all(isinstance(entry, int) for entry in entries):
        entries = [entries]
    if not 0 < len(entries) <= MAX_PROMPTS:
        raise bad_field("prompt", f"it has {len(entries)} prompts; send 1 to {MAX_PROMPTS}")
    if any(isinstance(entry, int) for entry in entries):
        raise bad_field("prompt", "it has token ids beside texts; send either")
    made = []
    for entry in entries:
        if isinstance(entry, str):
            made.append(await text_prompt(backend, entry))
        else:
            outside = next((token_id for token_id in entry if token_id >= backend.tokenizer.vocab_size), None)
            if outside is not None:
                raise bad_field("prompt", f"the model has no token {outside}; its ids are below its vocabulary's size")
            made.append(Prompt(None, tuple(entry)))
    return made


class _Offsets:
    """Builds the log-probabilities of one answer, whose text has so many characters so far."""

    def __init__(self, begun: int) -> None:
        self.characters = begun

    def of(self, backend: Backend, piece: Piece, ids: frozenset[int]) -> TextLogprobs | None:
        """Return those of a piece's token, and count its text."""
        at, token = self.characters, piece.token
        self.characters += len(piece.text)
        if token is None or token.logprob is None or token.id in ids:
            return None
        top = {spelling(backend, token_id): max(value, -9999.0) for token_id, value in token.top_logprobs}
        return TextLogprobs([spelling(backend, token.id)], [max(token.logprob, -9999.0)], [top], [at])


async def _whole(backend: Backend, generation: Generation, head: tuple[str, int, str], texts: list[str]) -> Completion:
    choices = [TextChoice(text, index) for index, text in enumerate(texts)]
    offsets = [_Offsets(len(text)) for text in texts]
    async for piece in generation.pieces():
        choice = choices[piece.index]
        choice.text += piece.text
        choice.finish_reason = piece.finish
        part = offsets[piece.index].of(backend, piece, generation.ending.ids)
        if generation.with_logprobs and choice.logprobs is None:
            choice.logprobs = TextLogprobs([], [], [], [])
        if part is not None and choice.logprobs is not None:
            choice.logprobs.tokens += part.tokens
            choice.logprobs.token_logprobs += part.token_logprobs
            choice.logprobs.top_logprobs += part.top_logprobs
            choice.logprobs.text_offset += part.text_offset
    return Completion(*head, choices, usage=usage_of(generation))


async def _chunks(
    backend: Backend, generation: Generation, head: tuple[str, int, str], texts: list[str], with_usage: bool
) -> AsyncGenerator[bytes, None]:
    usage: UnsetType | None = None if with_usage else UNSET
    offsets = [_Offsets(len(text)) for text in texts]
    pieces = generation.pieces()
    try:
        for index, text in enumerate(texts):
            if text:
                yield event(Completion(*head, [TextChoice(text, index)], usage=usage))
        async for piece in pieces:
            part = offsets[piece.index].of(backend, piece, generation.ending.ids)
            if piece.text or part is not None or piece.finish:
                choice = TextChoice(piece.text, piece.index, part, piece.finish)
                yield event(Completion(*head, [choice], usage=usage))
    finally:
        await pieces.aclose()
        generation.close()
    if with_usage:
        yield event(Completion(*head, [], usage=usage_of(generation)))
    yield DONE
