"""Threads that fill memory from files: the plain reference of the compiled `_native.Reads`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from dymoe_runtime import kernels
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.memory import Place, memory_at
from dymoe_runtime.tensorfile import fill

# How urgent reads may be: so many degrees, of which 0 goes first.
URGENCIES = 3


class Outcome(NamedTuple):
    """How a read ended: after `done` bytes, all of them unless an error (a number of errno) or the file's end came."""

    ticket: int
    error: int
    done: int
    seconds: float


class ReadThreads(Protocol):
    """What is done with reads by ticket; only those that no thread has begun are hurried or cancelled."""

    def submit(
        self, fd: int, offset: int, places: Sequence[Place], urgency: int, then: Callable[[], None] | None
    ) -> int:
        """Fill `places` in their order from `offset`; once they are full call `then` on that thread, which must not
        raise. Without a file, fd -1, only that."""

    def hurry(self, ticket: int, now: int, urgency: int) -> bool: ...
    def cancel(self, ticket: int, urgency: int) -> bool: ...
    def started(self) -> list[int]:
        """Since the last call."""

    def finished(self) -> Sequence[tuple[int, int, int, float]]:
        """Outcomes since the last call."""

    def pending(self) -> int:
        """How many have not ended."""

    def wait(self, ticket: int) -> None:
        """Until the read has ended."""

    def close(self, patience_s: float) -> bool:
        """End the threads; False where one still reads after some patience. It is left behind then."""


def read_threads(count: int) -> ReadThreads:
    """The compiled ones where the compiled kernels are in use; DymoeError where there can be none."""
    try:
        return PythonThreads(count) if kernels.isa() == kernels.REFERENCE else kernels.native.Reads(count)
    except RuntimeError as error:
        raise DymoeError(
            f"the system allows no thread more ({error}); raise the limit of this process's cgroup or user (ulimit -u)"
        ) from error


class _Read(NamedTuple):
    ticket: int
    fill: Callable[[], tuple[int, int]] | None  # -> error, bytes done
    nbytes: int
    then: Callable[[], None] | None


class PythonThreads:
    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._waiting: list[deque[_Read]] = [deque() for _ in range(URGENCIES)]
        self._pending: set[int] = set()
        self._started: list[int] = []
        self._finished: list[Outcome] = []
        self._tickets = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"reader-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, fd: int, offset: int, places: Sequence[Place], urgency: int, then: Callable[[], None] | None
    ) -> int:
        buffers = [memoryview(memory_at(place)) for place in places]
        filling = partial(fill, fd, offset, buffers) if fd >= 0 else None
        with self._changed:
            ticket, self._tickets = self._tickets, self._tickets + 1
            self._pending.add(ticket)
            self._waiting[urgency].append(_Read(ticket, filling, sum(size for _, size in places), then))
            self._changed.notify_all()
        return ticket

    def hurry(self, ticket: int, now: int, urgency: int) -> bool:
        with self._changed:
            read = self._take(ticket, now)
            if read is not None:
                self._waiting[urgency].append(read)
            return read is not None

    def cancel(self, ticket: int, urgency: int) -> bool:
        with self._changed:
            if self._take(ticket, urgency) is None:
                return False
            self._pending.remove(ticket)
            return True

    def started(self) -> list[int]:
        with self._changed:
            started, self._started = self._started, []
            return started

    def finished(self) -> Sequence[Outcome]:
        with self._changed:
            finished, self._finished = self._finished, []
            return finished

    def pending(self) -> int:
        return len(self._pending)

    def wait(self, ticket: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: ticket not in self._pending)

    def close(self, patience_s: float) -> bool:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        until = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _take(self, ticket: int, urgency: int) -> _Read | None:
        """Out of its queue; None where it is not there."""
        read = next((read for read in self._waiting[urgency] if read.ticket == ticket), None)
        if read is not None:
            self._waiting[urgency].remove(read)
        return read

    def _run(self) -> None:
        while (read := self._next()) is not None:
            begun = time.perf_counter()
            error, done = (0, 0) if read.fill is None else read.fill()
            if read.then is not None and (done == read.nbytes or read.fill is None):
                read.then()
            outcome = Outcome(read.ticket, error, done, time.perf_counter() - begun)
            with self._changed:
                self._pending.remove(read.ticket)
                self._finished.append(outcome)
                self._changed.notify_all()

    def _next(self) -> _Read | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(self._waiting))
            if self._closed:
                return None
            read = next(waiting for waiting in self._waiting if waiting).popleft()
            self._started.append(read.ticket)
            return read
