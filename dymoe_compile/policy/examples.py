"""Examples: what the original and each operating point take for the next token, at places spread over a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dymoe_compile.policy.sensitivity import Guess, Original, guesses_of
from dymoe_runtime.bundle.policy import OperatingPoint

# Places that are looked at, spread evenly over the text; so many of them, evenly again, become examples. In addition,
# so many of those where the smallest point takes another token than the original, evenly as well.
PLACES, EVEN, DIFFERING = 64, 8, 4

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A place of the text, and what is taken to follow there."""

    window: int
    position: int  # of the last token of the context
    differs: bool  # whether it is here because the smallest point differs, and not by even spacing
    original: Guess
    points: Mapping[str, Guess]  # by the name of the point


@dataclass(frozen=True)
class Examples:
    """Examples of a text, and how often each point agreed with the original at all `places` that were looked at."""

    places: int
    agreed: Mapping[str, int]  # by the name of the point
    shown: tuple[Example, ...]


def spread(windows: np.ndarray) -> list[tuple[int, int]]:
    """Return at most PLACES (window, position), evenly over the predictions of `windows` [n, W]; none is chosen."""
    each = windows.shape[1] - 1
    places = range(len(windows) * each)
    return [divmod(place, each) for place in evenly(places, PLACES)]


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Return `count` of the items, each from the middle of an equal share of them, or all if there are fewer.

    >>> evenly(range(100), 4)
    [12, 37, 62, 87]
    """
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def choose(
    places: Sequence[tuple[int, int]],
    original: Original,
    points: Sequence[OperatingPoint],
    guesses: Sequence[Sequence[Guess]],
) -> Examples:
    """Return the examples at `places`, where each of `points`, smallest first, has made one of `guesses` each."""
    wanted = original_guesses(places, original)
    agreed = {
        point.name: sum(guess.token == right.token for guess, right in zip(row, wanted, strict=True))
        for point, row in zip(points, guesses, strict=True)
    }
    differing = [i for i, right in enumerate(wanted) if guesses and guesses[0][i].token != right.token]
    even = evenly(range(len(places)), EVEN)
    odd = evenly([i for i in differing if i not in even], DIFFERING)

    def example(index: int, differs: bool) -> Example:
        made = {point.name: row[index] for point, row in zip(points, guesses, strict=True)}
        return Example(*places[index], differs, wanted[index], made)

    shown = (*(example(i, False) for i in even), *(example(i, True) for i in odd))
    return Examples(len(places), agreed, shown)


def original_guesses(places: Sequence[tuple[int, int]], original: Original) -> list[Guess]:
    """Return the guesses of the original model."""
    logits = [original.head(original.hidden[window][position : position + 1]) for window, position in places]
    return [guess for row in logits for guess in guesses_of(row, row)]
