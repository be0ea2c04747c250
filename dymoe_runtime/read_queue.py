"""Reads of experts out of a bundle, the most urgent first. Only one thread may use a queue."""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.job import Coming
from dymoe_runtime.memory import Place, memory_at
from dymoe_runtime.read_threads import read_threads
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tensorfile import check_read

# Reads at the same time; two nearly saturate a disk.
IN_FLIGHT = 2

# What the newest read counts in how fast reads are.
LATELY = 0.1

# How long closing waits for a read that does not end; its thread is left behind then, and ends with the process.
PATIENCE_S = 5.0


class Source(NamedTuple):
    """Where the bytes of a read are, and what is to be done with its buffers, uint8 [bytes], once they are full.

    The reading thread does it, and it may raise. Without a file, which is fd -1, it fills them.
    """

    fd: int
    path: Path
    offset: int
    then: Callable[[Sequence[np.ndarray]], None] | None


# (key, first segment, how many) -> where consecutive segments of an expert are.
Reader = Callable[[ExpertKey, int, int], Source]


class Urgency(IntEnum):
    """What a read is for; lower goes first."""

    DEMAND = 0  # somebody waits for it
    GUESS = 1  # look-ahead: perhaps for the next layer
    BACKGROUND = 2  # some time


@dataclass(eq=False, slots=True)
class Read:
    """One read of consecutive segments of one expert."""

    key: ExpertKey
    first: int
    places: list[Place]
    urgency: Urgency = Urgency.DEMAND
    purpose: Urgency = field(init=False)  # the urgency that it had at first
    nbytes: int = field(init=False)
    source: Source = field(init=False)
    done: bool = False  # once the queue was asked
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.purpose = self.urgency
        self.nbytes = sum(nbytes for _, nbytes in self.places)

    def finish(self) -> None:
        """What the source says is to be done at last, on the reading thread."""
        assert self.source.then is not None
        try:
            self.source.then([memory_at(place) for place in self.places])
        except BaseException as error:  # handed to the caller, who raises it
            self.error = error


class ReadQueue:
    """Of the most urgent reads the oldest is begun first. All fill places in `memory`."""

    def __init__(self, reader: Reader, memory: object) -> None:
        self._reader = reader
        self._memory = memory  # lives as long as something may be read into it
        self._threads = read_threads(IN_FLIGHT)
        self._tickets: dict[Read, int] = {}  # of reads that are not known to have ended
        self._reads: dict[int, Read] = {}
        self._waiting: list[dict[Read, None]] = [{} for _ in Urgency]  # of each urgency; some may have begun
        self._begun: list[Read] = []
        self._ended: list[Read] = []
        self._closed = False
        self.bytes_per_s: float | None = None  # of one read, lately; None before the first
        self._process = os.getpid()
        # Threads do not survive it that Python ends while they call it.
        atexit.register(self.close)

    def submit(self, read: Read) -> None:
        assert not self._closed
        fd, _, offset, then = read.source = self._reader(read.key, read.first, len(read.places))
        ticket = self._threads.submit(fd, offset, read.places, read.urgency, None if then is None else read.finish)
        self._tickets[read], self._reads[ticket] = ticket, read
        self._waiting[read.urgency][read] = None

    def coming(self, reads: Sequence[tuple[int, Read]]) -> Coming:
        """Numbered reads that have not ended, for who can wait for them without this queue."""
        return Coming(self._threads, [(number, self._tickets[read]) for number, read in reads])

    def hurry(self, read: Read, urgency: Urgency = Urgency.DEMAND) -> None:
        """The read is that urgent now."""
        if read.urgency <= urgency or read not in self._tickets:
            return
        if self._threads.hurry(self._tickets[read], read.urgency, urgency):
            del self._waiting[read.urgency][read]
            read.urgency = urgency
            self._waiting[urgency][read] = None

    def take_back(self, urgency: Urgency, most: int | None = None, spared: Collection[ExpertKey] = ()) -> list[Read]:
        """Reads that no thread has begun, the newest first; at most so many, and none of what is spared."""
        waiting = self._waiting[urgency]
        if not waiting:
            return []
        others = (read for read in reversed(waiting) if read.key not in spared)
        taken = list(itertools.islice((r for r in others if self._threads.cancel(self._tickets[r], urgency)), most))
        for read in taken:
            self._forget(read)
        return taken

    def started(self) -> Sequence[Read]:
        """Reads that a thread has begun since the last call."""
        self._look()
        self._note_begun()
        begun, self._begun = self._begun, []
        return begun

    def finished(self) -> Sequence[Read]:
        """Reads that have ended since the last call."""
        self._look()
        ended, self._ended = self._ended, []
        return ended

    def wait(self, read: Read) -> None:
        """Until the read has ended."""
        if not read.done:
            self._threads.wait(self._tickets[read])
            self._look()

    def pending(self) -> int:
        """Reads that have not ended."""
        return self._threads.pending()

    def close(self) -> bool:
        """End the threads; False where one still reads after some patience."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:  # forked: the threads are not here, and may have held the lock
            return True
        self._closed = True
        ended = self._threads.close(PATIENCE_S)
        if not ended:
            atexit.register(lambda memory: None, self._memory)
        self._look()
        self._note_begun()
        for read in list(self._tickets):
            read.done, read.error = True, DymoeError("the expert store was closed while an expert was read")
            self._forget(read)
        return ended

    def _look(self) -> None:
        """Take note of what has ended."""
        outcomes = self._threads.finished() if self._reads else ()
        if outcomes:
            self._note_begun()
            for ticket, error, done, seconds in outcomes:
                if ticket in self._reads:  # else its submission was interrupted
                    self._end(self._reads[ticket], error, done, seconds)

    def _note_begun(self) -> None:
        self._begun += [self._reads[ticket] for ticket in self._threads.started() if ticket in self._reads]

    def _end(self, read: Read, error: int, done: int, seconds: float) -> None:
        read.done = True
        if read.source.fd >= 0 and read.error is None:
            try:
                check_read(read.source.path, read.source.offset, read.nbytes, error, done)
            except DymoeError as problem:
                read.error = problem
        if read.error is None:
            rate = read.nbytes / max(seconds, 1e-9)
            known = self.bytes_per_s
            self.bytes_per_s = rate if known is None else known + LATELY * (rate - known)
        self._forget(read)
        self._ended.append(read)

    def _forget(self, read: Read) -> None:
        del self._waiting[read.urgency][read]
        del self._reads[self._tickets.pop(read)]
