"""Threads that fill buffers from a bundle, demanded ones before guessed ones."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey

# Reads at the same time; two nearly saturate a disk.
IN_FLIGHT = 2

# What the newest read counts in how fast reads are.
LATELY = 0.1

# (key, first segment, buffers): fills the buffers with consecutive segments of an expert.
Reader = Callable[[ExpertKey, int, Sequence[torch.Tensor]], None]


@dataclass(eq=False)
class Read:
    """One read of consecutive segments of one expert."""

    key: ExpertKey
    first: int
    buffers: list[torch.Tensor]
    guess: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class ReadQueue:
    """Threads that take demanded reads first and look-ahead reads otherwise."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._wake = threading.Condition()
        self._demands: deque[Read] = deque()
        self._guesses: deque[Read] = deque()
        self._finished: deque[Read] = deque()
        self._closed = False
        self.bytes_per_s: float | None = None  # of one read, lately; None before the first
        self._threads = [threading.Thread(target=self._run, name=f"reader-{i}", daemon=True) for i in range(IN_FLIGHT)]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Read) -> None:
        with self._wake:
            (self._guesses if read.guess else self._demands).append(read)
            self._wake.notify()

    def hurry(self, read: Read) -> None:
        """A look-ahead read is demanded now."""
        with self._wake:
            if read in self._guesses:
                self._guesses.remove(read)
                self._demands.append(read)

    def cancel_guesses(self) -> list[Read]:
        """Take back look-ahead reads that no thread has started."""
        with self._wake:
            cancelled = list(self._guesses)
            self._guesses.clear()
            return cancelled

    def finished(self) -> Iterator[Read]:
        """Reads that have ended since the last call."""
        while self._finished:
            yield self._finished.popleft()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        for read in (*self._demands, *self._guesses):
            read.error = DymoeError("the expert store was closed while an expert was read")
            read.done.set()

    def _run(self) -> None:
        while (read := self._next()) is not None:
            started = time.perf_counter()
            try:
                self._reader(read.key, read.first, read.buffers)
                self._clock(read, time.perf_counter() - started)
            except Exception as error:  # handed to the caller, who raises it
                read.error = error
            read.done.set()
            self._finished.append(read)

    def _clock(self, read: Read, seconds: float) -> None:
        rate = sum(len(buffer) for buffer in read.buffers) / max(seconds, 1e-9)
        known = self.bytes_per_s
        self.bytes_per_s = rate if known is None else known + LATELY * (rate - known)

    def _next(self) -> Read | None:
        with self._wake:
            while not (self._demands or self._guesses or self._closed):
                self._wake.wait()
            if self._closed:
                return None
            return (self._demands or self._guesses).popleft()
