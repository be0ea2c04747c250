"""Leases of experts, which stay in place until their lease ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic

from dymoe_runtime.kernels.reads import PendingReads
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.admission import Admission
from dymoe_runtime.store.arena import IN_FLIGHT
from dymoe_runtime.store.entry import Entry, P
from dymoe_runtime.store.request import ExpertRequest, Urgency
from dymoe_runtime.store.residency import Residency

# A requested expert that is in memory, and what returns it as prepared for a tier up to the requested one. Named tuples
# cannot be generic before Python 3.11.
Delivered = tuple[ExpertRequest, Callable[[int], P]]


class Lease(Generic[P]):
    """Requested experts, pinned while the lease lasts.

    A lease is a context manager, whose exit releases the experts. The exit of a lease of all experts at once also waits
    for reads that nobody waited for, and raises their errors.

    If `experts` is not None, it has all requested experts in the order of the requests; `pending` has the reads of
    those that have not arrived. If it is None, not all experts can be held at once. `batches` works in both cases.
    """

    experts: Sequence[P] | None = None
    pending: PendingReads | None = None

    def __enter__(self) -> Lease[P]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.release(failed=kind is not None)

    def batches(self) -> Iterator[list[Delivered[P]]]:
        """Yield each requested expert once: first those in memory, then the others as their reads end.

        Raises the error of a read that failed. A batch may be used only until the next one is asked for.
        """
        raise NotImplementedError

    def release(self, failed: bool = False) -> None:
        """Unpin the experts; with `failed`, neither wait for reads nor raise their errors."""
        raise NotImplementedError


class WholeLease(Lease[P]):
    """A lease of all requested experts at once; some may still be being read."""

    def __init__(
        self,
        residency: Residency[P],
        requests: Sequence[ExpertRequest],
        entries: Sequence[Entry[P]],
        pinned: Sequence[Entry[P]],
    ) -> None:
        """Lend `entries`, one for each request; those in `pinned` are unpinned on release."""
        self._residency, self._requests = residency, requests
        self._entries, self._pinned = entries, pinned
        reading = self._still_reading()
        self._reading = reading
        if reading:
            self.experts = [residency.prepared_pending(e, r.tier) for e, r in zip(entries, requests, strict=True)]
            self.pending = residency.pending([(rank, entries[rank]) for rank in reading])
        else:
            self.experts = [residency.prepared(e, r.tier) for e, r in zip(entries, requests, strict=True)]

    def batches(self) -> Iterator[list[Delivered[P]]]:
        residency, late = self._residency, set(self._reading)
        yield [self._delivered(rank) for rank in range(len(self._requests)) if rank not in late]
        for rank in self._reading:
            residency.finish(self._entries[rank])
            yield [self._delivered(rank)]

    def release(self, failed: bool = False) -> None:
        residency, pinned, self._pinned = self._residency, self._pinned, ()
        try:
            if self.pending is not None and not failed:
                residency.count_wait(self.pending.wait_s)
                for rank in self._reading:
                    residency.finish(self._entries[rank])
                for entry, request in zip(self._entries, self._requests, strict=True):
                    residency.announce(entry, request.tier)
        finally:
            for entry in pinned:
                residency.unpin(entry)

    def _still_reading(self) -> list[int]:
        """Return the indices of requests whose segments are still being read; finish reads that have ended."""
        reading = []
        for rank, (request, entry) in enumerate(zip(self._requests, self._entries, strict=True)):
            read = entry.read
            if read is not None and read.first < self._residency.segments_of(request.tier):
                if read.done:
                    self._residency.finish(entry)
                else:
                    reading.append(rank)
        return reading

    def _delivered(self, rank: int) -> Delivered[P]:
        return self._requests[rank], partial(self._residency.prepared, self._entries[rank])


class StreamedLease(Lease[P]):
    """A lease of more experts than can be held at once, which are delivered in turn."""

    def __init__(
        self,
        residency: Residency[P],
        admission: Admission[P],
        requests: Sequence[ExpertRequest],
        window: int,
        overlap: bool,
        spares_used: bool = True,
    ) -> None:
        """Start the first reads, and hold at most `window` experts at once.

        Without `overlap`, experts are delivered only once all that are held have arrived. With `spares_used`, those
        that have been delivered are evicted last like those that are still to come, whatever the order of the reads.
        """
        self._residency, self._admission = residency, admission
        self._overlap, self._window, self._spares_used = overlap, window, spares_used
        self._wanted = {request.key for request in requests}
        self._coming = self._in_turn(requests)
        self._held: dict[ExpertRequest, Entry[P]] = {}
        try:
            self._hold_more()
        except BaseException:
            self.release(failed=True)
            raise

    def batches(self) -> Iterator[list[Delivered[P]]]:
        while self._coming or self._held:
            self._hold_more()
            self._residency.reap()
            if not self._overlap:
                for request, entry in self._held.items():
                    self._finish(request, entry)
            ready = [request for request, entry in self._held.items() if self._usable(request, entry)]
            if not ready:
                # Every held expert is still being read, and reads end in about this order.
                ready = [next(iter(self._held))]
                self._finish(ready[0], self._held[ready[0]])
            yield [(r, partial(self._residency.prepared, self._held[r])) for r in ready]
            for request in ready:
                self._residency.unpin(self._held.pop(request))
                if not self._spares_used:
                    self._wanted.discard(request.key)

    def release(self, failed: bool = False) -> None:
        while self._held:
            self._residency.unpin(self._held.popitem()[1])

    def _in_turn(self, requests: Sequence[ExpertRequest]) -> deque[ExpertRequest]:
        """Return the requests in the order of their delivery.

        A few resident experts and the first missing ones come first, so that these are read while those are used. Then
        come the other resident and the other missing ones. An expert that is being read at too low a tier needs two
        reads, so it is the last of the missing ones.
        """
        resident = [request for request in requests if self._residency.is_resident(request)]
        known = set(resident)
        missing = sorted((r for r in requests if r not in known), key=self._residency.reads_less)
        first = max(1, self._window - IN_FLIGHT)
        return deque([*resident[:first], *missing[:IN_FLIGHT], *resident[first:], *missing[IN_FLIGHT:]])

    def _hold_more(self) -> None:
        while self._coming and len(self._held) < self._window:
            request = self._coming.popleft()
            self._held[request] = demand(self._residency, self._admission, request, self._wanted)

    def _usable(self, request: ExpertRequest, entry: Entry[P]) -> bool:
        """Return whether all segments of the request are in memory; raise the error of a failed read."""
        segments = self._residency.segments_of(request.tier)
        if entry.read is not None and entry.read.first < segments:
            if not entry.read.done:
                return False
            self._residency.finish(entry)
        read_rest(self._admission, entry, segments, self._wanted)
        return not entry.lacks(segments)

    def _finish(self, request: ExpertRequest, entry: Entry[P]) -> None:
        """Wait until all segments of the request are in memory."""
        while not self._usable(request, entry):
            self._residency.finish(entry)


def demand(
    residency: Residency[P], admission: Admission[P], request: ExpertRequest, wanted: set[ExpertKey]
) -> Entry[P]:
    """Pin the entry of a request, start the read of what it lacks, and return it; `wanted` experts are evicted last."""
    entry = residency.entry(request.key)
    segments = residency.segments_of(request.tier)
    residency.count(request)
    # Pin before reading: making room for its missing segments must not evict the segments that it has.
    residency.pin(entry)
    try:
        if entry.read is not None and entry.read.first < segments:
            residency.raise_urgency(entry, Urgency.DEMAND)
        residency.count_demand(entry, segments)
        read_rest(admission, entry, segments, wanted)
    except BaseException:
        residency.unpin(entry)
        raise
    return entry


def read_rest(admission: Admission[P], entry: Entry[P], segments: int, wanted: set[ExpertKey]) -> None:
    """Start a read of what an entry lacks of its first `segments`, unless a read of it is under way.

    In that case the caller must call again once that read has ended.
    """
    if entry.read is None and entry.segments < segments:
        admission.demand(entry, segments, wanted)
