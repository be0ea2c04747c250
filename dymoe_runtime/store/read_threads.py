"""Threads that fill memory from files: the Python reference for the compiled `_native.ReadThreads`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from dymoe_runtime.bundle.records import crc32
from dymoe_runtime.bundle.tensorfile import fill
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.reads import ReadThreads
from dymoe_runtime.memory import Place, memory_at

# Number of urgencies; reads of urgency 0 go first.
URGENCIES = 3
# Compiled threads divide large reads. Some of them check what they have read while others keep the disk busy. With six,
# a checked token takes 7% less than with two that read whole records; benchmarks/streaming/RESULTS.md has the figures.
COMPILED_READERS = 6
# Threads in Python make whole reads; two nearly saturate a disk.
PYTHON_READERS = 2


class Outcome(NamedTuple):
    """The result of a read: `done` bytes were read, all unless there was an error or the file ended."""

    ticket: int
    error: int  # errno, 0, or -1 - i if place i does not have its checksum
    done: int  # bytes
    seconds: float


def start_threads(make: Callable[[int], ReadThreads] | None, count: int | None = None) -> ReadThreads:
    """Start `count` reading threads with `make`, which makes compiled ones; without it, `PythonThreads`.

    Raises DymoeError if the system allows no more threads.
    """
    if count is None:
        count = PYTHON_READERS if make is None else COMPILED_READERS
    try:
        return (make or PythonThreads)(count)
    except RuntimeError as error:
        raise DymoeError(
            f"the system allows no more threads ({error}); raise the limit of this process's cgroup or user (ulimit -u)"
        ) from error


class _Read(NamedTuple):
    ticket: int
    fill: Callable[[], tuple[int, int]] | None  # () -> (errno or 0, bytes read); None if there is no file
    nbytes: int
    then: Callable[[], None] | None


def _fill(fd: int, offset: int, buffers: Sequence[memoryview], checksums: Sequence[int]) -> tuple[int, int]:
    """Fill `buffers` from a file and compare their checksums; return (error of an `Outcome`, bytes read)."""
    error, done = fill(fd, offset, buffers)
    if not error and done == sum(map(len, buffers)):
        wrong = (i for i, (data, known) in enumerate(zip(buffers, checksums, strict=False)) if crc32(data) != known)
        error = -1 - next(wrong, -1)
    return error, done


class PythonThreads:
    """Implementation of `ReadThreads` in Python."""

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
        self,
        fd: int,
        offset: int,
        places: Sequence[Place],
        urgency: int,
        then: Callable[[], None] | None,
        checksums: Sequence[int] = (),
    ) -> int:
        buffers = [memoryview(memory_at(place)) for place in places]
        filling = partial(_fill, fd, offset, buffers, checksums) if fd >= 0 else None
        with self._changed:
            ticket, self._tickets = self._tickets, self._tickets + 1
            self._pending.add(ticket)
            self._waiting[urgency].append(_Read(ticket, filling, sum(size for _, size in places), then))
            self._changed.notify_all()
        return ticket

    def reprioritize(self, ticket: int, now: int, urgency: int) -> bool:
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
        """Remove a read from the queue of `urgency`; return None if it is not there."""
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
