"""The work of one expert in a call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dymoe_runtime.tiers import RecordLayout

if TYPE_CHECKING:
    from dymoe_runtime.read_threads import ReadThreads


@dataclass(eq=False, slots=True)
class Expert:
    """One expert at one tier, ready for calls of `moe` as long as its segments stay where they are."""

    layout: RecordLayout
    tier: int
    segments: Sequence[np.ndarray]
    views: Any = None  # what the compiled kernels look up in them once


class Job(NamedTuple):
    """An expert for rows [first, first + rows) of a call."""

    expert: Expert
    first: int
    rows: int


@dataclass(slots=True)
class Coming:
    """Those experts of a call that `reads` is still bringing, to be used once their reads have ended, however."""

    reads: ReadThreads
    tickets: list[tuple[int, int]]  # number of the expert in the call, ticket of its read
    wait_s: float = 0.0  # how long the call has waited for them

    def wait(self, *tickets: int) -> None:
        """For these, or for all."""
        started = time.perf_counter()
        for ticket in tickets or [ticket for _, ticket in self.tickets]:
            self.reads.wait(ticket)
        self.wait_s += time.perf_counter() - started
