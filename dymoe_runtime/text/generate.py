"""Generation: prefill the prompt, then sample, yield and decode one token at a time."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.detokenizer import StreamDecoder
from dymoe_runtime.text.sampling import Sampler, SamplingParams
from dymoe_runtime.text.tokenizer import Tokenizer

# Tokens of an answer where nobody says how many.
DEFAULT_MAX_TOKENS = 128


class LanguageModel(Protocol):
    """A decoder with the KV cache of one sequence."""

    @property
    def max_context(self) -> int:
        """Return the number of tokens that the cache can hold."""

    @property
    def position(self) -> int:
        """Return the number of tokens in the cache."""

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
    reasoning: str = ""  # text that the model thinks, apart from the answer


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    params: SamplingParams | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    before: Sequence[int] = (),
) -> Generator[Token, None, None]:
    """Return a generator of the tokens that follow the model's cache and `prompt`, a text or its token ids.

    Generation ends at an id in `tokenizer.eos_ids` (unless `ignore_eos`), before the first complete string of `stop`,
    after `max_tokens`, or when the context is full. A stop string that is a special token ends generation at that
    token. `params` are greedy by default. `before` holds ids that are in the cache already, which the repetition
    penalty counts like those of the prompt.

    The model decodes a token only when the next one is asked for. The last token is therefore not in the cache, and
    closing the generator early leaves the cache at the tokens before it.

    Raises DymoeError before the model runs if the prompt is empty or too long, `max_tokens` is below 1, or a stop
    string is empty.

    >>> from dymoe_runtime import Tokenizer, load_model
    >>> with load_model("build/demo.dymoe") as model:
    ...     tokenizer = Tokenizer.load(model.bundle.path, model.spec.eos_ids)
    ...     tokens = list(generate(model, tokenizer, "Once upon a time", max_tokens=6, stop=[" the time"]))
    >>> "".join(token.text for token in tokens), tokens[-1].finish
    (' of time,', 'stop')
    """
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    stop = (stop,) if isinstance(stop, str) else stop
    max_tokens = model.max_context if max_tokens is None else max_tokens
    _check(model, prompt_ids, max_tokens, stop)
    ends = set() if ignore_eos else set(tokenizer.eos_ids)
    ends |= {tokenizer.special_ids[text] for text in stop if text in tokenizer.special_ids}
    return _generate(
        model, tokenizer, prompt_ids, before, Sampler(params or SamplingParams()), max_tokens, StopStrings(stop), ends
    )


def _check(model: LanguageModel, prompt_ids: Sequence[int], max_tokens: int, stop: Sequence[str]) -> None:
    if max_tokens < 1:
        raise DymoeError(f"--max-tokens {max_tokens}: must be at least 1")
    if "" in stop:
        raise DymoeError("a stop string is empty; give it at least one character")
    if not prompt_ids:
        raise DymoeError("the prompt is empty; give it at least one token of text")
    needed = model.position + len(prompt_ids)
    if needed > model.max_context:
        before = f" after {model.position} of the conversation" if model.position else ""
        raise DymoeError(
            f"the prompt has {len(prompt_ids)} tokens{before}, but the context holds {model.max_context};"
            " shorten the prompt" + (" or start a new conversation" if before else "")
        )


def _generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    before: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    stop: StopStrings,
    ends: Collection[int],
) -> Generator[Token, None, None]:
    decoder = StreamDecoder(tokenizer)
    logits = model.prefill(prompt_ids)
    history = array("q", [*before, *prompt_ids])
    for count in range(1, max_tokens + 1):
        token_id = sampler.sample(logits, history)
        history.append(token_id)
        ended = token_id in ends
        full = count == max_tokens or model.position >= model.max_context
        text = stop.push("" if ended else decoder.push(token_id))
        if ended or full:
            text += stop.push(decoder.flush()) + stop.flush()
        finish = "stop" if ended or stop.found else "length" if full else None
        yield Token(token_id, text, finish)
        if finish:
            return
        logits = model.decode(token_id)


class StopStrings:
    """A filter that cuts a stream of text before the stop string that is complete first.

    If two are complete at the same character, the longer one counts. Text that could still begin a stop string is held
    back, so the result does not depend on how the stream is divided.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text that may be shown now; empty once a stop string was found."""
        if self.found or not text:
            return ""
        text = self._held + text
        self.found, shown = self._search(text)
        self._held = "" if self.found else text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return the text held back; call it at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _search(self, text: str) -> tuple[bool, int]:
        """Return whether a stop string is in `text`, and the number of characters that may be shown."""
        starts = [(start + len(s), start) for s in self._strings if (start := text.find(s)) >= 0]
        if starts:
            return True, min(starts)[1]
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(s.startswith(text[start:]) for s in self._strings):
                return False, start
        return False, len(text)
