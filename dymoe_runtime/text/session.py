"""A conversation: the messages so far, and reuse of the part that the model still has in its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.generate import LanguageModel, Token, generate
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.tokenizer import Tokenizer


class RewindableModel(LanguageModel, Protocol):
    """A language model whose sequence can be seen and cut."""

    @property
    def tokens(self) -> Sequence[int]:
        """Return the ids of the tokens in the sequence."""

    def reset(self, position: int, /) -> int:
        """Forget the tokens from `position` on; return how many are kept, 0 if it cannot go back that far."""


class Session:
    """A conversation by the model's chat template. Each turn reuses the cache of the turns before.

    >>> from dymoe_runtime import load_model
    >>> with load_model("build/demo.dymoe") as model:
    ...     session = Session(model, Tokenizer.load(model.bundle.path, model.spec.eos_ids))
    ...     for turn in ("Hello", "And then?"):
    ...         answer = "".join(token.text for token in session.reply(turn, max_tokens=4))
    >>> [message["role"] for message in session.messages]
    ['user', 'assistant', 'user', 'assistant']
    """

    def __init__(
        self,
        model: RewindableModel,
        tokenizer: Tokenizer,
        system: str | None = None,
        *,
        history: Sequence[dict[str, str]] = (),
        params: SamplingParams | None = None,
    ) -> None:
        """Begin with a system message, if given, and the messages of `history`.

        Raises DymoeError if there is no chat template, or none that takes the system message.
        """
        self.messages: list[dict[str, str]] = [*_system(system), *history]
        self.dropped_turns = 0
        self.last_turn: Turn | None = None
        self._model, self._tokenizer, self._params = model, tokenizer, params
        tokenizer.chat([*_system(system), {"role": "user", "content": ""}])

    def reply(
        self,
        text: str,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Yield the tokens of the answer to the user's `text`; both become messages once it has ended.

        The arguments are those of `generate`. Raises DymoeError if the conversation no longer fits the context.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}], max_tokens, stop, ignore_eos)

    def retry(
        self, max_tokens: int | None = None, stop: str | Sequence[str] = (), ignore_eos: bool = False
    ) -> Iterator[Token]:
        """Answer the last question again."""
        asked = list(self.messages)
        while asked and asked[-1]["role"] != "user":
            asked.pop()
        if not asked:
            raise DymoeError("there is no question yet; ask one first")
        return self._answer(asked, max_tokens, stop, ignore_eos)

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def set_system(self, text: str | None) -> None:
        """Use another system message, or none."""
        self._tokenizer.chat([*_system(text), {"role": "user", "content": ""}])
        self.messages = [*_system(text), *(message for message in self.messages if message["role"] != "system")]

    def _answer(
        self, asked: list[dict[str, str]], max_tokens: int | None, stop: str | Sequence[str], ignore_eos: bool
    ) -> Iterator[Token]:
        ids = self._tokenizer.encode(self._tokenizer.chat(asked), add_special_tokens=False)
        # The model may have been used by others since. At least one token must run, for its logits.
        kept = self._model.reset(min(_shared_prefix(self._model.tokens, ids), len(ids) - 1))
        new, before, answer, count, finish = ids[kept:], ids[:kept], "", 0, None
        try:
            for token in generate(
                self._model, self._tokenizer, new, self._params, max_tokens, stop, ignore_eos, before
            ):
                answer += token.text
                count, finish = count + 1, token.finish
                yield token
        except (GeneratorExit, KeyboardInterrupt):
            self.messages = [*asked, {"role": "assistant", "content": answer}]
            raise
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        self.last_turn = Turn(len(ids), kept, len(new), count, finish)


@dataclass(frozen=True)
class Turn:
    """The last turn, in tokens."""

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    answer_tokens: int
    finish: str | None


def _system(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the prefix that a and b have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
