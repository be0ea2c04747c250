"""A conversation: the messages so far, and reuse of the part that the model still has in its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from dymoe_runtime.text.generate import DEFAULT_MAX_TOKENS, LanguageModel, Token, generate
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

    def __init__(self, model: RewindableModel, tokenizer: Tokenizer, system: str | None = None) -> None:
        """Begin with a system message, if given.

        Raises DymoeError if there is no chat template, or none that takes the system message.
        """
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._model, self._tokenizer = model, tokenizer
        tokenizer.chat([*self.messages, {"role": "user", "content": ""}])

    def reply(
        self,
        text: str,
        params: SamplingParams | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Yield the tokens of the answer to the user's `text`; both become messages once it has ended.

        The arguments are those of `generate`. Raises DymoeError if the conversation no longer fits the context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.encode(self._tokenizer.chat(asked), add_special_tokens=False)
        # The model may have been used by others since. At least one token must run, for its logits.
        kept = self._model.reset(min(_shared_prefix(self._model.tokens, ids), len(ids) - 1))
        new, before, answer = ids[kept:], ids[:kept], ""
        for token in generate(self._model, self._tokenizer, new, params, max_tokens, stop, ignore_eos, before):
            answer += token.text
            yield token
        self.messages = [*asked, {"role": "assistant", "content": answer}]


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the prefix that a and b have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
