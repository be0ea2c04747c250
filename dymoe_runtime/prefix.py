"""The prefix that two sequences of token ids have in common."""

from __future__ import annotations

from collections.abc import Sequence


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the prefix that a and b have in common.

    >>> shared_prefix([5, 6, 7], [5, 6, 8, 9])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
