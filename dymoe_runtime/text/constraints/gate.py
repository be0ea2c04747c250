"""Where in an answer a constraint holds: after what the model thinks."""

from __future__ import annotations

import math

import numpy as np

from dymoe_runtime.text.constraints.constraint import Constraint
from dymoe_runtime.text.reasoning import Part, Splitter, TagSplitter
from dymoe_runtime.text.tokenizer import Tokenizer


class Gate:
    """A constraint that lets reasoning through, and begins with the answer.

    At the begin of an answer the model may also write the mark of reasoning. An end token does not follow reasoning.
    A constraint that has a place for reasoning itself holds from the first token on.
    """

    def __init__(self, constraint: Constraint, splitter: Splitter, tokenizer: Tokenizer) -> None:
        """Begin with an answer that `splitter` divides."""
        self._constraint, self._splitter, self._tokenizer = constraint, splitter, tokenizer
        self._stage = self._now()  # when the token was chosen that `accept` takes
        self._fits = True  # what was said so far could be an answer, too
        self._openers: list[list[int]] = []

    @property
    def ended(self) -> bool:
        """Return whether the text is complete."""
        return self._now() == "answer" and self._constraint.ended

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """Return logits that are -inf for forbidden ids, as `Constraint.allow` does."""
        self._stage = self._now()
        if self._stage == "answer":
            return self._constraint.allow(logits)
        if self._stage == "reasoning":
            return _without(logits, self._tokenizer.eos_ids)
        scores = self._constraint.allow(logits) if self._fits else np.full_like(logits, -math.inf)
        ids = [token_id for token_id in self._ways() if token_id < len(logits)]
        if ids and scores is not logits:
            scores[ids] = logits[ids]
        return scores

    def accept(self, token_id: int, part: Part) -> None:
        """Take the next token, and what the splitter made of it."""
        if self._stage == "answer":
            self._constraint.accept(token_id)
        elif self._stage == "start":
            self._fits = self._fits and self._constraint.permits(token_id)
            if self._fits:
                self._constraint.accept(token_id)
            if self._splitter.stage == "reasoning":
                self._constraint.restart()
                self._fits = True
        elif self._splitter.stage == "answer" and part.answer:  # the token that ends reasoning has text behind it
            for following in self._tokenizer.encode(part.answer, add_special_tokens=False):
                self._constraint.accept(following)

    def _now(self) -> str:
        return "answer" if self._constraint.whole else self._splitter.stage

    def _ways(self) -> list[int]:
        """Return the ids that begin the mark of reasoning, or go on with it."""
        splitter = self._splitter
        if not isinstance(splitter, TagSplitter):
            return []
        if not self._openers:
            self._openers = self._constraint.ways(splitter.begin)
        return self._openers[min(len(splitter.held.lstrip().encode()), len(self._openers) - 1)]


def _without(logits: np.ndarray, ids: frozenset[int]) -> np.ndarray:
    logits = logits.copy()
    logits[[token_id for token_id in ids if token_id < len(logits)]] = -math.inf
    return logits
