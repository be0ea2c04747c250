"""Answers to a request, whatever its protocol: submitted together, read piece by piece, cancelled together."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.answers.prompts import Prompt
from dymoe_runtime.serving.http.exchange.client import CLIENT
from dymoe_runtime.serving.http.exchange.errors import ApiError, bad_field
from dymoe_runtime.serving.service.errors import Closing, Full
from dymoe_runtime.serving.service.request import Answer, GenerationRequest
from dymoe_runtime.text.constraints.constraint import Constraint
from dymoe_runtime.text.ending import Ending
from dymoe_runtime.text.sampling import LIMITS, SamplingParams
from dymoe_runtime.text.tool_calls.parser import CallDelta, ToolCallParser

if TYPE_CHECKING:  # a long chain of imports, for annotations alone
    from dymoe_runtime.text.generate import Token

SEEDS = int(LIMITS["seed"][1]) + 1
# Answers that are open beside those that run or wait: their readers have not taken all of them yet.
SLOW_READERS = 16
# Tokens at the end of an answer in which its stop string is looked for.
TAIL = 64


@dataclass(frozen=True)
class Ask:
    """What a request asks for."""

    sampling: Mapping[str, Any] = field(default_factory=dict)  # name of a SamplingParams field -> value, or None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    logprobs: int | None = None
    count: int = 1  # answers to each prompt
    constraint: Callable[[], Constraint] | None = None  # makes one for each answer
    calls: Callable[[], ToolCallParser] | None = None  # makes a parser of tool calls for each answer


@dataclass(frozen=True)
class Piece:
    """What one token adds to the answer of an index; the last one has a `finish`."""

    index: int
    token: Token | None  # None where the time was up
    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    finish: str | None = None  # "stop", "length" or "tool_calls"


@dataclass
class Usage:
    """Tokens of a request and its answers."""

    prompt: int = 0
    reused: int = 0
    answer: int = 0
    reasoning: int = 0


class Generation:
    """The answers to one or more prompts. Close it, or read it to its end."""

    def __init__(self, backend: Backend, prompts: list[Prompt], ask: Ask) -> None:
        """Submit all prompts.

        Raises ApiError for values that are not possible, and what `Service.submit` raises.
        """
        self.usage = Usage(prompt=sum(len(prompt.ids) for prompt in prompts))
        self.ending = ending_of(backend, ask)
        self.with_logprobs = ask.logprobs is not None
        self._backend, self._ask, self._started = backend, ask, time.perf_counter()
        self._answers: list[Answer] = []
        params = params_of(backend, ask)
        state = backend.service.state()
        wanted, most = len(prompts) * ask.count, state.slots + state.queue_limit
        if wanted > most:
            raise bad_field("n", f"the request is for {wanted} answers, but the server holds {most}; ask for fewer")
        if backend.open_answers + wanted > most + SLOW_READERS:
            raise Full(1.0)
        try:
            for number in range(wanted):
                prompt = prompts[number // ask.count]
                request = GenerationRequest(
                    prompt.text,
                    prompt.ids,
                    replace(params, seed=(params.seed + number) % SEEDS),
                    self.ending,
                    ask.logprobs,
                    None if ask.constraint is None else ask.constraint(),
                    CLIENT.get(),
                )
                self._answers.append(backend.service.submit(request))
                backend.open_answers += 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel what still runs."""
        for answer in self._answers:
            answer.cancel()
        self._backend.open_answers -= len(self._answers)
        self._answers = []

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all answers as they come; those of one answer are in order.

        Raises ApiError if an answer fails, and Closing if the service ends before it.
        """
        try:
            streams = [self._pieces(index, answer) for index, answer in enumerate(self._answers)]
            async with aclosing(streams[0] if len(streams) == 1 else merged(streams)) as together:
                async for piece in together:
                    yield piece
        finally:
            self.close()

    async def _pieces(self, index: int, answer: Answer) -> AsyncGenerator[Piece, None]:
        backend, begun, count, finish = self._backend, 0.0, 0, None
        parser = None if self._ask.calls is None else self._ask.calls()
        left = backend.settings.time_limit_s - (time.perf_counter() - self._started)
        timer = asyncio.get_running_loop().call_later(max(0.0, left), answer.cancel)
        try:
            async for token in answer:
                if not count:
                    begun = time.perf_counter()
                    self._count_first(index, answer, begun)
                count += 1
                self.usage.answer += 1
                self.usage.reasoning += bool(token.reasoning)
                piece = Piece(index, token, token.text, token.reasoning, (), token.finish)
                if parser is not None:
                    piece = parsed(parser, piece)
                finish = piece.finish
                yield piece
                if finish is not None and token.finish is None:  # it has all the calls that it may have
                    break
            if finish is None:  # the time was up
                finish, piece = "length", Piece(index, None, finish="length")
                yield piece if parser is None else parsed(parser, piece)
        except (Full, Closing):
            finish = "error"
            raise
        except DymoeError as error:
            finish = "error"
            raise ApiError(500, str(error), code="generation_failed") from error
        finally:
            timer.cancel()
            answer.cancel()
            backend.metrics.count_tokens(count, time.perf_counter() - begun)
            if finish is None:
                backend.metrics.count_cancelled()

    def _count_first(self, index: int, answer: Answer, now: float) -> None:
        if index % self._ask.count == 0:  # the others have the same prompt
            self.usage.reused += answer.reused_tokens
        self._backend.metrics.count_first(answer.prompt_tokens, answer.reused_tokens, now - self._started)


def parsed(parser: ToolCallParser, piece: Piece) -> Piece:
    """Return a piece with tool calls taken out of its text; it is the last one if there may be no further call."""
    part = parser.push(piece.text)
    text, calls = part.content, tuple(part.calls)
    if piece.finish:
        rest = parser.flush()
        text, calls = text + rest.content, (*calls, *rest.calls)
    finish = piece.finish or ("stop" if parser.full else None)
    return replace(piece, text=text, calls=calls, finish=finish)


async def merged(streams: list[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Yield the items of several streams as they come; an error of one ends all."""
    items: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(1)

    async def pump(stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async for item in stream:
                await items.put(item)
            await items.put(None)
        except Exception as error:
            await items.put(error)
        finally:
            await stream.aclose()

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def params_of(backend: Backend, ask: Ask) -> SamplingParams:
    """Return the settings of the server with those of a request."""
    given = {name: value for name, value in ask.sampling.items() if value is not None}
    seed = backend.settings.seed if ask.seed is None else ask.seed % SEEDS
    return replace(backend.settings.params, **given, seed=secrets.randbelow(SEEDS) if seed is None else seed)


def ending_of(backend: Backend, ask: Ask) -> Ending:
    """Return what ends an answer: what the request says, within the limits of the server."""
    settings = backend.settings
    most = [count for count in (ask.max_tokens, settings.max_tokens) if count is not None]
    stop = (*settings.stop, *(text for text in ask.stop if text))
    return Ending.of(backend.tokenizer, min(most, default=None), stop, (), settings.ignore_eos)


def found_stop(backend: Backend, stop: tuple[str, ...], ids: list[int]) -> str | None:
    """Return which of the stop strings an answer of these ids ended at, if it did."""
    special = backend.special.get(ids[-1]) if ids else None
    if special in stop:
        return special
    tail = backend.tokenizer.decode(ids[-TAIL:])
    found = [(tail.rfind(text) + len(text), -len(text), text) for text in stop if text in tail]
    return max(found)[2] if found else None
