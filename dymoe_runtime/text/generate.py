"""Generation: prefill the prompt, then sample, yield and decode one token at a time."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.background import in_background
from dymoe_runtime.text.constraints.constraint import Constraint
from dymoe_runtime.text.constraints.gate import Gate
from dymoe_runtime.text.detokenizer import StreamDecoder
from dymoe_runtime.text.ending import Ending, is_id
from dymoe_runtime.text.reasoning import Splitter
from dymoe_runtime.text.sampling import Sampler, SamplingParams, log_probabilities
from dymoe_runtime.text.stop_strings import StopStrings
from dymoe_runtime.text.tokenizer import Tokenizer

T = TypeVar("T")


class LanguageModel(Protocol):
    """A decoder with the KV cache of one sequence."""

    @property
    def max_context(self) -> int:
        """Return the number of tokens that the cache can hold."""

    @property
    def position(self) -> int:
        """Return the number of tokens in the cache."""

    @property
    def changes(self) -> int:
        """Return how often the sequence was changed: by one for each call, whoever makes it."""

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Append `ids` to the cache; return the logits float32 [V] after the last one."""

    def decode(self, token_id: int) -> np.ndarray:
        """Append one id to the cache; return the logits float32 [V] after it."""


@dataclass(frozen=True)
class Token:
    """One generated token and the text that it made certain; the texts of all tokens join to the answer."""

    id: int
    text: str  # may be empty
    finish: str | None = None  # on the last token: "stop" (eos or a stop string) or "length"
    reasoning: str = ""  # what the model thinks, apart from its answer
    logprob: float | None = None  # logarithm of the probability that the model gave this token
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and theirs, falling


class Watch:
    """Sees to it that nobody else changes the sequence of a model while an answer is generated."""

    def __init__(self, model: LanguageModel) -> None:
        """Begin with the sequence as it is now."""
        self._model, self._changes = model, model.changes

    def call(self, change: Callable[[], T]) -> T:
        """Return the result of a call that changes the sequence; raise DymoeError if others have changed it, too."""
        self._check()
        result = change()
        self._changes += 1
        self._check()
        return result

    def _check(self) -> None:
        if self._model.changes != self._changes:
            raise DymoeError(
                "the model's sequence was changed by another call while an answer was generated; "
                "end one answer before the next begins, or load the model twice"
            )


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    params: SamplingParams | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    before: Sequence[int] = (),
    *,
    stop_ids: Collection[int] = (),
    logprobs: int | None = None,
    constraint: Constraint | None = None,
) -> Generator[Token, None, None]:
    """Return a generator of the tokens that follow the model's cache and `prompt`, a text or its token ids.

    Generation ends at an id in `tokenizer.eos_ids` (unless `ignore_eos`) or `stop_ids`, before the first complete
    string of `stop`, after `max_tokens` if given, or when the context is full. A stop string that is a special token
    ends generation at that token. `params` are by default those that the model's generation_config.json asks for.
    `before` holds ids that are in the cache already, which the repetition penalty counts like those of the prompt. With
    `logprobs` tokens have their log-probability before any sampling setting, and those of as many likeliest tokens. A
    `constraint`, fresh for each answer, says which tokens may come; the answer ends where its text is complete.

    If others change the model's sequence before the last token, the next one raises DymoeError. The model decodes a
    token only when the next one is asked for. The last token is therefore not in the cache, and
    closing the generator early leaves the cache at the tokens before it.

    Raises DymoeError before the model runs if the prompt is empty or too long, `max_tokens` is below 1, a stop string
    is empty, or an argument has a wrong type.

    >>> from dymoe_runtime import SamplingParams, Tokenizer, load_model
    >>> with load_model("build/demo.dymoe") as model:
    ...     greedy = SamplingParams()
    ...     tokens = list(generate(model, Tokenizer.of(model), "Once upon a time", greedy, stop=[" the time"]))
    >>> "".join(token.text for token in tokens), tokens[-1].finish
    (' of time,', 'stop')
    """
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else _ids(prompt)
    ending = Ending.of(tokenizer, max_tokens, stop, stop_ids, ignore_eos)
    check_params(params)
    check_logprobs(logprobs)
    check_prompt(model, prompt_ids)
    sampler = Sampler(tokenizer.sampling if params is None else params)
    return answer_tokens(
        model, tokenizer, prompt_ids, sampler, ending, before=before, logprobs=logprobs, constraint=constraint
    )


def generate_async(*args: Any, **options: Any) -> AsyncGenerator[Token, None]:
    """Return an asynchronous generator of what `generate` yields with the same arguments.

    The model runs in a thread of its own. Closing the generator, or cancelling its task, ends generation after the
    token that is being computed.
    """
    return in_background(generate(*args, **options))


def _ids(prompt: Sequence[int]) -> list[int]:
    """Return the ids of a prompt as a list; raise DymoeError if it is neither a text nor ids."""
    if not isinstance(prompt, Iterable) or not all(map(is_id, prompt := list(prompt))):
        raise DymoeError(f"the prompt is of type {type(prompt).__name__}; give a text, or the ids of its tokens")
    return [int(token_id) for token_id in prompt]


def check_params(params: object) -> None:
    """Raise DymoeError unless `params` are None or SamplingParams."""
    if params is not None and not isinstance(params, SamplingParams):
        raise DymoeError(f"params {params!r}: expected SamplingParams, such as SamplingParams(temperature=0.8)")


def check_logprobs(count: object) -> None:
    """Raise DymoeError unless `count` is None or a whole number of at least 0."""
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise DymoeError(f"logprobs {count!r}: must be at least 0, and a whole number")


def check_prompt(model: LanguageModel, prompt_ids: Sequence[int]) -> None:
    """Raise DymoeError if the prompt is empty, or does not fit the context after what is in the cache."""
    if not prompt_ids:
        raise DymoeError("the prompt is empty; give it at least one token of text")
    needed = model.position + len(prompt_ids)
    if needed > model.max_context:
        before = f" after {model.position} of the conversation" if model.position else ""
        raise DymoeError(
            f"the prompt has {len(prompt_ids)} tokens{before}, but the context holds {model.max_context};"
            " shorten the prompt" + (" or start a new conversation" if before else "")
        )


class AnswerWriter:
    """Makes the tokens of one answer of the logits that a model gives, one after another."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        sampler: Sampler,
        ending: Ending,
        *,
        logprobs: int | None = None,
        splitter: Splitter | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Begin an answer to `ids`, all tokens before it, which the repetition penalty counts.

        `splitter` divides reasoning from the answer, to which alone `constraint` applies.
        """
        self._sampler, self._ending, self._logprobs = sampler, ending, logprobs
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(ending.strings)
        self._splitter = Splitter() if splitter is None else splitter
        self._special = {token_id: text for text, token_id in tokenizer.special_ids.items()}
        self._gate = None if constraint is None else Gate(constraint, self._splitter, tokenizer)
        self._history = array("q", ids)
        self._begun = len(self._history)

    @property
    def ids(self) -> Sequence[int]:
        """Return the ids of the answer so far."""
        return self._history[self._begun :]

    def next(self, logits: np.ndarray, is_full: Callable[[], bool]) -> Token:
        """Return the next token, by the logits float32 [V] after the one before.

        `is_full` is called if the answer goes on: it returns whether no further token has room.
        """
        gate, splitter, stop = self._gate, self._splitter, self._stop
        token_id = self._sampler.sample(logits, self._history, None if gate is None else gate.allow)
        likely = {} if self._logprobs is None else log_probabilities(logits, token_id, self._logprobs)
        self._history.append(token_id)
        ended = token_id in self._ending.ids
        mark = None if ended else self._special.get(token_id)
        spelled = ""
        if not ended:
            spelled = self._decoder.settle() if mark in splitter.marks else self._decoder.push(token_id)
        part = splitter.push(spelled, mark)
        if gate is not None and not ended:
            gate.accept(token_id, part)
            ended = gate.ended
        full = len(self._history) - self._begun == self._ending.max_tokens
        if not (ended or full):
            full = is_full()
        text, thought = stop.push(part.answer), part.reasoning
        if ended or full:
            last, rest = splitter.push(self._decoder.flush()), splitter.flush()
            text += stop.push(last.answer + rest.answer) + stop.flush()
            thought += last.reasoning + rest.reasoning
        finish = "stop" if ended or stop.found else "length" if full else None
        return Token(token_id, text, finish, thought, **likely)


def answer_tokens(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    ending: Ending,
    *,
    before: Sequence[int] = (),
    logprobs: int | None = None,
    splitter: Splitter | None = None,
    constraint: Constraint | None = None,
    watch: Watch | None = None,
    make_room: Callable[[Sequence[int]], np.ndarray | None] = lambda answered: None,
) -> Generator[Token, None, None]:
    """Yield the tokens of an answer to `prompt_ids`, as an `AnswerWriter` makes them.

    `watch` has seen all changes of the sequence for this answer. When the context is full, `make_room` gets the ids
    answered so far. It either runs the model on a shorter conversation that ends with them, and returns the logits
    after the last one, or returns None.
    """
    ids = [*before, *prompt_ids]
    writer = AnswerWriter(tokenizer, ids, sampler, ending, logprobs=logprobs, splitter=splitter, constraint=constraint)
    watch = watch or Watch(model)
    logits, following = watch.call(lambda: model.prefill(prompt_ids)), None

    def is_full() -> bool:
        nonlocal following
        if model.position < model.max_context:
            return False
        following = make_room(writer.ids)
        return following is None

    while True:
        token = writer.next(logits, is_full)
        yield token
        if token.finish:
            return
        logits = watch.call(partial(model.decode, token.id)) if following is None else following
        following = None
