"""Interfaces of reads that fill memory from files: reading threads, and reads in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dymoe_runtime.memory import Place


class ReadThreads(Protocol):
    """Threads that read by ticket. Only reads that no thread has begun can be reprioritized or cancelled."""

    def submit(
        self,
        fd: int,
        offset: int,
        places: Sequence[Place],
        urgency: int,
        then: Callable[[], None] | None,
        checksums: Sequence[int] = (),
    ) -> int:
        """Queue a read that fills `places`, in order, from `offset` of the file `fd`; return its ticket.

        Once the places are full, the thread compares their CRC-32 with `checksums`, if there are any, and calls `then`,
        which must not raise. If `fd` is -1 there is no file, and the thread only calls `then`.
        """

    def reprioritize(self, ticket: int, now: int, urgency: int) -> bool:
        """Move a read that waits at urgency `now` to the end of those of `urgency`.

        Returns False if the read no longer waits there.
        """

    def cancel(self, ticket: int, urgency: int) -> bool:
        """Cancel a read that waits at `urgency`; return False if it no longer waits there."""

    def started(self) -> list[int]:
        """Return the tickets of reads begun since the last call."""

    def finished(self) -> Sequence[tuple[int, int, int, float]]:
        """Return the reads that ended since the last call: (ticket, error, bytes read, seconds) each.

        The error is errno, 0, or -1 - i if the bytes of place i do not have their checksum.
        """

    def wait(self, ticket: int) -> None:
        """Wait until the read has ended."""

    def close(self, patience_s: float) -> bool:
        """End the threads; return False if one still reads after `patience_s`, which is then left behind."""


class ReadWaiter(Protocol):
    """The reader of experts, as far as the kernels need it."""

    def wait(self, ticket: int, /) -> None:
        """Wait until the read with this ticket has ended, whether it succeeded or not."""


@dataclass(slots=True)
class PendingReads:
    """Experts of a call whose reads are still in flight."""

    reads: ReadWaiter
    tickets: list[tuple[int, int]]  # (index of the expert in the call, ticket of its read)
    wait_s: float = 0.0  # seconds that the call has waited for the reads

    def wait(self, *tickets: int) -> None:
        """Wait for the reads with the given tickets, or for all reads if none is given."""
        started = time.perf_counter()
        for ticket in tickets or [ticket for _, ticket in self.tickets]:
            self.reads.wait(ticket)
        self.wait_s += time.perf_counter() - started
