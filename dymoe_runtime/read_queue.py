"""Threads that fill buffers from a bundle, the most urgent first."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey

# Reads at the same time; two nearly saturate a disk.
IN_FLIGHT = 2

# What the newest read counts in how fast reads are.
LATELY = 0.1

# How long closing waits for a read that does not end; its thread is left behind then, and ends with the process.
PATIENCE_S = 5.0

# (key, first segment, buffers): fills the buffers with consecutive segments of an expert.
Reader = Callable[[ExpertKey, int, Sequence[torch.Tensor]], None]


class Urgency(IntEnum):
    """What a read is for; lower goes first."""

    DEMAND = 0  # somebody waits for it
    GUESS = 1  # look-ahead: perhaps for the next layer
    BACKGROUND = 2  # some time


@dataclass(eq=False)
class Read:
    """One read of consecutive segments of one expert."""

    key: ExpertKey
    first: int
    buffers: list[torch.Tensor]
    urgency: Urgency = Urgency.DEMAND
    purpose: Urgency = field(init=False)  # the urgency that it had at first
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.purpose = self.urgency

    @property
    def nbytes(self) -> int:
        return sum(buffer.numel() for buffer in self.buffers)


class ReadQueue:
    """Threads that take the most urgent reads first, among these the oldest."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._wake = threading.Condition()
        self._waiting: dict[Urgency, deque[Read]] = {urgency: deque() for urgency in Urgency}
        self._started: deque[Read] = deque()
        self._finished: deque[Read] = deque()
        self._closed = False
        self.bytes_per_s: float | None = None  # of one read, lately; None before the first
        self._threads = [threading.Thread(target=self._run, name=f"reader-{i}", daemon=True) for i in range(IN_FLIGHT)]
        for thread in self._threads:
            thread.start()
        self._process = os.getpid()
        # Python kills daemon threads as it ends, and some of what they call does not survive that.
        atexit.register(self.close)

    def submit(self, read: Read) -> None:
        with self._wake:
            assert not self._closed
            self._waiting[read.urgency].append(read)
            self._wake.notify()

    def hurry(self, read: Read, urgency: Urgency = Urgency.DEMAND) -> None:
        """The read is that urgent now."""
        if read.urgency <= urgency:
            return
        with self._wake:
            if read in self._waiting[read.urgency]:
                self._waiting[read.urgency].remove(read)
                read.urgency = urgency
                self._waiting[read.urgency].append(read)

    def take_back(self, urgency: Urgency, most: int | None = None, spared: Collection[ExpertKey] = ()) -> list[Read]:
        """Reads that no thread has started, the newest first; at most so many, and none of what is spared."""
        with self._wake:
            waiting = self._waiting[urgency]
            taken = list(itertools.islice((read for read in reversed(waiting) if read.key not in spared), most))
            for read in taken:
                waiting.remove(read)
            return taken

    def started(self) -> Iterator[Read]:
        """Reads that a thread has taken since the last call."""
        while self._started:
            yield self._started.popleft()

    def finished(self) -> Iterator[Read]:
        """Reads that have ended since the last call."""
        while self._finished:
            yield self._finished.popleft()

    def close(self) -> bool:
        """End the threads; False where one still reads after some patience."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:  # forked: the threads are not here, and may have held the lock
            return True
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        until = time.monotonic() + PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        for waiting in self._waiting.values():
            for read in waiting:
                read.error = DymoeError("the expert store was closed while an expert was read")
                read.done.set()
        return not any(thread.is_alive() for thread in self._threads)

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
        rate = read.nbytes / max(seconds, 1e-9)
        known = self.bytes_per_s
        self.bytes_per_s = rate if known is None else known + LATELY * (rate - known)

    def _next(self) -> Read | None:
        with self._wake:
            while not (any(self._waiting.values()) or self._closed):
                self._wake.wait()
            if self._closed:
                return None
            read = next(waiting for waiting in self._waiting.values() if waiting).popleft()
            self._started.append(read)
            return read
