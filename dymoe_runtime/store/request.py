"""Requests for experts, and the reads that serve them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.memory import Place, memory_at
from dymoe_runtime.spec import ExpertKey


class ExpertRequest(NamedTuple):
    """A request for an expert up to a tier, and the number of tokens that will use it."""

    key: ExpertKey
    tier: int
    tokens: int = 1


@cache  # every token requests experts in every layer
def token_request(layer: int, expert: int, tier: int) -> ExpertRequest:
    """Return one token's request for an expert."""
    return ExpertRequest(ExpertKey(layer, expert), tier)


class Source(NamedTuple):
    """The place of a read's bytes in a file, and a function to call with its full buffers, uint8 [bytes] each.

    The reading thread calls `then`, which may raise. If `fd` is -1 there is no file, and `then` fills the buffers. The
    thread compares each buffer's CRC-32 with `checksums`, if there are any; `damaged(i)` is the error if that of buffer
    i is another.
    """

    fd: int
    path: Path
    offset: int
    then: Callable[[Sequence[np.ndarray]], None] | None
    checksums: Sequence[int] = ()
    damaged: Callable[[int], DymoeError] | None = None


# (key, first segment, number of segments) -> source of these consecutive segments.
Reader = Callable[[ExpertKey, int, int], Source]


class Urgency(IntEnum):
    """The urgency of a read; lower values go first."""

    DEMAND = 0  # the current layer waits for it
    PREFETCH = 1  # the next layer will probably want it
    BACKGROUND = 2  # a later token may want it


@dataclass(eq=False, slots=True)
class Read:
    """One read of consecutive segments of one expert."""

    key: ExpertKey
    first: int
    places: list[Place]
    urgency: Urgency = Urgency.DEMAND
    purpose: Urgency = field(init=False)  # the urgency when it was made
    nbytes: int = field(init=False)
    source: Source | None = None  # None until submitted
    done: bool = False  # set once the queue has seen that the read ended
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.purpose = self.urgency
        self.nbytes = sum(nbytes for _, nbytes in self.places)

    def submit(self, source: Source) -> Callable[[], None] | None:
        """Set the source; return the function that the reading thread must call at the end, if any."""
        self.source = source
        return None if source.then is None else self._call_then

    def reprioritize(self, urgency: Urgency) -> None:
        """Set the urgency."""
        self.urgency = urgency

    def end(self, error: BaseException | None) -> None:
        """Mark the read as ended, with `error` unless the source's `then` has raised one before."""
        self.done = True
        self.error = self.error or error

    def _call_then(self) -> None:
        assert self.source is not None and self.source.then is not None
        try:
            self.source.then([memory_at(place) for place in self.places])
        except BaseException as error:  # the thread that finishes the read raises it
            self.error = error
