"""What an answer may say: a constraint on each next token."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """A constraint on the tokens of one answer."""

    @property
    def whole(self) -> bool:
        """Return whether it holds the reasoning, too, and all special tokens, and not the answer alone."""

    @property
    def ended(self) -> bool:
        """Return whether the text is complete: only an end token may follow."""

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """Return logits float32 [V] that are -inf for forbidden ids; the same array if nothing is forbidden.

        Raises DymoeError if finding that out takes too much time or memory.
        """

    def permits(self, token_id: int) -> bool:
        """Return whether a token may come next."""

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer; raise DymoeError if it is forbidden."""

    def restart(self) -> None:
        """Forget the tokens so far."""

    def ways(self, mark: str) -> list[list[int]]:
        """Return for each byte of `mark` the ids that go on with it from there, so that it can be completed."""


class Grammar(Protocol):
    """What answers must be; each answer takes a constraint of its own."""

    def constraint(self) -> Constraint:
        """Return a constraint for one answer."""
