"""The queue of expert reads, most urgent first. Only one thread may use a queue."""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Collection, Sequence

from dymoe_runtime.bundle.tensorfile import check_read
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.reads import PendingReads, ReadThreads
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.request import Read, Reader, Urgency

# Weight of the newest read in the moving average of read speed.
SMOOTHING = 0.1

# How long `close` waits for a read to end. After that it leaves the thread behind, which ends with the process.
PATIENCE_S = 5.0


class ReadQueue:
    """Reads that fill places in one `memory`. The most urgent begin first, and the oldest of equal urgency."""

    def __init__(self, reader: Reader, memory: object, threads: ReadThreads) -> None:
        """Read with `threads`, which `close` ends; keep `memory` alive as long as a thread may write to it."""
        self._reader = reader
        self._memory = memory
        self._threads = threads
        self._tickets: dict[Read, int] = {}  # of the reads not known to have ended
        self._reads: dict[int, Read] = {}
        self._waiting: list[dict[Read, None]] = [{} for _ in Urgency]  # by urgency; threads may have begun some of them
        self._begun: list[Read] = []
        self._ended: list[Read] = []
        self._closed = False
        self.bytes_per_s: float | None = None  # moving average of the speed of one read; None before the first
        self._process = os.getpid()
        # A reading thread that calls Python while the interpreter shuts down would crash.
        atexit.register(self.close)

    def submit(self, read: Read) -> None:
        """Queue a read."""
        assert not self._closed
        source = self._reader(read.key, read.first, len(read.places))
        then = read.submit(source)
        ticket = self._threads.submit(source.fd, source.offset, read.places, read.urgency, then, source.checksums)
        self._tickets[read], self._reads[ticket] = ticket, read
        self._waiting[read.urgency][read] = None

    def pending(self, reads: Sequence[tuple[int, Read]]) -> PendingReads:
        """Return `reads` as `PendingReads`, which can be waited for without this queue.

        Each of `reads` is a pair (index, read) whose read has not ended.
        """
        return PendingReads(self._threads, [(number, self._tickets[read]) for number, read in reads])

    def raise_urgency(self, read: Read, urgency: Urgency = Urgency.DEMAND) -> None:
        """Raise a read to `urgency`, unless a thread has begun it or it is at least as urgent already."""
        if read.urgency <= urgency or read not in self._tickets:
            return
        if self._threads.reprioritize(self._tickets[read], read.urgency, urgency):
            del self._waiting[read.urgency][read]
            read.reprioritize(urgency)
            self._waiting[urgency][read] = None

    def cancel(self, urgency: Urgency, limit: int | None = None, spared: Collection[ExpertKey] = ()) -> list[Read]:
        """Cancel reads of `urgency` that no thread has begun, the newest first; return them.

        Cancels at most `limit` reads, and no read of a `spared` expert.
        """
        waiting = self._waiting[urgency]
        if not waiting:
            return []
        others = (read for read in reversed(waiting) if read.key not in spared)
        cancelled = (read for read in others if self._threads.cancel(self._tickets[read], urgency))
        taken = list(itertools.islice(cancelled, limit))
        for read in taken:
            self._forget(read)
        return taken

    def started(self) -> Sequence[Read]:
        """Return the reads that a thread has begun since the last call."""
        self._look()
        self._note_begun()
        begun, self._begun = self._begun, []
        return begun

    def finished(self) -> Sequence[Read]:
        """Return the reads that have ended since the last call."""
        self._look()
        ended, self._ended = self._ended, []
        return ended

    def wait(self, read: Read) -> None:
        """Wait until the read has ended."""
        if not read.done:
            self._threads.wait(self._tickets[read])
            self._look()

    def wait_for_all(self) -> None:
        """Wait until all reads have ended."""
        for read in list(self._tickets):
            self.wait(read)

    def close(self, patience_s: float = PATIENCE_S) -> bool:
        """End the threads; return False if one still reads after `patience_s`.

        Reads that have not ended get a DymoeError as their error.
        """
        atexit.unregister(self.close)
        if os.getpid() != self._process:  # after a fork there are no threads, and their lock may be held
            return True
        self._closed = True
        ended = self._threads.close(patience_s)
        if not ended:
            atexit.register(lambda memory: None, self._memory)  # keeps the memory until the process ends
        self._look()
        self._note_begun()
        for read in list(self._tickets):
            read.end(DymoeError("the expert store was closed while an expert was read"))
            self._forget(read)
        return ended

    def _look(self) -> None:
        """Collect the reads that have ended."""
        outcomes = self._threads.finished() if self._reads else ()
        if outcomes:
            self._note_begun()
            for ticket, error, done, seconds in outcomes:
                if ticket in self._reads:  # unless an exception interrupted `submit`
                    self._end(self._reads[ticket], error, done, seconds)

    def _note_begun(self) -> None:
        self._begun += [self._reads[ticket] for ticket in self._threads.started() if ticket in self._reads]

    def _end(self, read: Read, error: int, done: int, seconds: float) -> None:
        problem, source = None, read.source
        if source is not None and source.fd >= 0 and read.error is None:
            try:
                if error < 0 and source.damaged is not None:
                    raise source.damaged(-1 - error)
                check_read(source.path, source.offset, read.nbytes, error, done)
            except DymoeError as found:
                problem = found
        read.end(problem)
        if read.error is None:
            rate = read.nbytes / max(seconds, 1e-9)
            known = self.bytes_per_s
            self.bytes_per_s = rate if known is None else known + SMOOTHING * (rate - known)
        self._forget(read)
        self._ended.append(read)

    def _forget(self, read: Read) -> None:
        del self._waiting[read.urgency][read]
        del self._reads[self._tickets.pop(read)]
