"""Bookkeeping of the experts in memory: the arena, the reads into it, and the candidates for eviction.

Only the caller's thread changes this state; reading threads only fill buffers and verify checksums. An eviction always
takes the last segment that an expert has. Refinement planes are used no more often than the planes below them, so they
leave first.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.kernels.reads import PendingReads
from dymoe_runtime.memory import Place
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import Arena, Slot
from dymoe_runtime.store.entry import Entry, P
from dymoe_runtime.store.eviction import Eviction
from dymoe_runtime.store.read_queue import PATIENCE_S, ReadQueue
from dymoe_runtime.store.request import ExpertRequest, Read, Urgency
from dymoe_runtime.store.stats import StoreStats

# (tier, places of the leading segments of an expert) -> the prepared expert.
Prepare = Callable[[int, list[Place]], P]
# (arena memory) -> the queue that reads into it.
MakeQueue = Callable[[np.ndarray], ReadQueue]
Shown = TypeVar("Shown", contravariant=True)  # a prepared expert


class ResidencyListener(Protocol[Shown]):
    """A listener that is told which prepared experts can be used without a lease."""

    def put(self, key: ExpertKey, tier: int, prepared: Shown) -> None:
        """Add an expert that can be used at `tier` from now on."""

    def remove(self, key: ExpertKey, tier: int) -> None:
        """Remove an expert at `tier`; called before the prepared expert becomes invalid."""


class Residency(Generic[P]):
    """The experts in an arena of `arena_bytes`, each with some leading segments.

    `prepare` makes the prepared experts, `listener` is told of them, and `backed` is as in `Arena`.
    """

    def __init__(
        self,
        layout: RecordLayout,
        layers: int,
        arena_bytes: int,
        queue: MakeQueue,
        eviction: Eviction,
        prepare: Prepare[P],
        listener: ResidencyListener[P] | None = None,
        backed: bool = True,
    ) -> None:
        self._arena = Arena(layout.segment_spans, arena_bytes, _movable, self._on_move, backed)
        self._queue = queue(self._arena.memory)
        self._eviction = eviction
        self._prepare = prepare
        self._listener = listener
        self._entries: dict[ExpertKey, Entry[P]] = {}
        self._failed: dict[ExpertKey, BaseException] = {}  # errors of background reads that nobody has waited for
        self._resident = [[0] * len(layout.ladder) for _ in range(layers)]  # [layers][segments]: experts that have it
        self._segments = {tier: layout.segments_of(tier) for tier in (0, *layout.ladder)}
        self._spans = layout.segment_spans
        self._stats = StoreStats()
        self._submitted_bytes = 0

    def close(self, patience_s: float = PATIENCE_S) -> bool:
        """End the reading threads; return False if one still reads after `patience_s`."""
        return self._queue.close(patience_s)

    # State

    @property
    def arena_bytes(self) -> int:
        """Return the bytes of the arena."""
        return self._arena.nbytes

    @property
    def chunks(self) -> int:
        """Return the number of chunks of the arena."""
        return self._arena.chunks

    @property
    def chunk_bytes(self) -> int:
        """Return the bytes of one chunk of the arena."""
        return self._arena.chunk_bytes

    @property
    def empty_memory(self) -> np.ndarray:
        """Return the arena's memory, uint8 [bytes], which may be used for measurements before the first read."""
        assert not self._entries
        return self._arena.memory

    def segments_of(self, tier: int) -> int:
        """Return the number of segments that a tier needs."""
        return self._segments[tier]

    def nbytes(self) -> int:
        """Return the bytes of all segments that are in memory or being read."""
        return sum(slot.place[1] for entry in self._entries.values() for slot in entry.slots)

    def resident_experts(self, layer: int, tier: int) -> int:
        """Return the number of experts of `layer` that are in memory or being read up to `tier`."""
        return self._resident[layer][self._segments[tier] - 1]

    def find(self, key: ExpertKey) -> Entry[P] | None:
        """Return the entry of an expert, or None if no segment of it is in memory or being read."""
        return self._entries.get(key)

    def entry(self, key: ExpertKey) -> Entry[P]:
        """Return the entry of an expert, creating it if needed; if it has a read, reap finished reads first."""
        entry = self._entries.get(key)
        if entry is not None and entry.read is not None:
            self.reap()
            entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(key)
        return entry

    def resident_entry(self, key: ExpertKey) -> Entry[P]:
        """Return the entry of an expert, which must exist."""
        return self._entries[key]

    def is_resident(self, request: ExpertRequest) -> bool:
        """Return whether a request needs no read and claims no prefetch."""
        entry, segments = self._entries.get(request.key), self._segments[request.tier]
        if entry is None or not segments or entry.lacks(segments):
            return False
        return not (entry.prefetched and entry.prefetched[0] < segments)

    def reads_less(self, request: ExpertRequest) -> bool:
        """Return whether the expert is being read, but only up to a tier below the requested one."""
        entry = self._entries.get(request.key)
        return entry is not None and entry.read is not None and entry.segments < self._segments[request.tier]

    def prepared(self, entry: Entry[P], tier: int) -> P:
        """Return an expert prepared for `tier`, and announce it; all segments of the tier must be in memory."""
        prepared = self._prepared(entry, tier)
        self.announce(entry, tier)
        return prepared

    def prepared_pending(self, entry: Entry[P], tier: int) -> P:
        """Return an expert prepared for `tier`, some segments of which may still be being read."""
        return self._prepared(entry, tier)

    def announce(self, entry: Entry[P], tier: int) -> None:
        """Tell the listener, once, of an expert that is in memory and prepared at `tier`."""
        if self._listener is not None and tier and tier not in entry.announced:
            entry.announced.add(tier)
            self._listener.put(entry.key, tier, entry.prepared[tier])

    # Uses

    def count(self, request: ExpertRequest) -> None:
        """Count a use of the segments of a request."""
        self._eviction.use(request.key, self._segments[request.tier], request.tokens)

    def count_lacking(self, request: ExpertRequest, first: int) -> None:
        """Count a use of the segments of a request from `first` on, which were missing when they were wanted."""
        self._eviction.use(request.key, self._segments[request.tier], first=first)

    def count_hits(self, requests: int) -> None:
        """Count requests that needed no read."""
        self._stats.requested(requests, requests)

    def count_demand(self, entry: Entry[P], segments: int) -> None:
        """Count a request for an expert that may have to be read, and claim its prefetches."""
        self._stats.requested(entry.segments >= segments)
        self._stats.used_prefetches(entry.claim_prefetches(segments))

    def count_wait(self, seconds: float) -> None:
        """Count seconds spent outside this class waiting for its reads."""
        self._stats.waited(seconds)

    def pin(self, entry: Entry[P]) -> None:
        """Hold an expert's segments in place until `unpin`."""
        entry.pin()
        self._eviction.keep(entry.key)

    def unpin(self, entry: Entry[P]) -> None:
        """Undo one `pin`."""
        entry.unpin()
        if not entry.pins:
            self.refresh(entry)

    def refresh(self, entry: Entry[P]) -> None:
        """Update an entry after its read or its pins have changed.

        Ends the read of an unpinned entry if it is done. Offers the last segment for eviction if nothing uses the
        entry. A failed read is undone; the error of a background read is kept for `raise_failure`. An entry without
        segments and pins is removed.
        """
        read = entry.read
        if read is not None and read.done and not entry.pins:
            if read.error is not None:
                if read.purpose is Urgency.BACKGROUND:
                    self._failed[read.key] = read.error
                self._undo(read)
                return
            entry.end()
            self._failed.pop(read.key, None)
        if entry.free and entry.slots:
            self._eviction.offer(entry.key, len(entry.slots) - 1)
            return
        self._eviction.keep(entry.key)
        if not entry.slots and not entry.pins:
            self._entries.pop(entry.key, None)

    def refresh_all(self) -> None:
        """Update all entries as `refresh` does."""
        for entry in list(self._entries.values()):
            self.refresh(entry)

    def raise_failure(self, key: ExpertKey) -> None:
        """Raise the error of a failed background read of the expert, if it has not been raised yet."""
        if (error := self._failed.pop(key, None)) is not None:
            raise error

    # Reads

    @property
    def read_bytes_per_s(self) -> float | None:
        """Return the moving average of the speed of one read, or None before the first."""
        return self._queue.bytes_per_s

    @property
    def submitted_bytes(self) -> int:
        """Return the bytes of all reads submitted since the start."""
        return self._submitted_bytes

    def submit(self, entry: Entry[P], slots: list[Slot], urgency: Urgency = Urgency.DEMAND) -> None:
        """Queue a read of the next segments of an entry into `slots`."""
        first = entry.segments
        read = Read(entry.key, first, [slot.place for slot in slots], urgency)
        entry.begin(read, slots)
        self._count_segments(entry.key.layer, first, entry.segments, 1)
        if urgency is Urgency.PREFETCH:
            entry.prefetched.append(first)
        self._submitted_bytes += read.nbytes
        self._queue.submit(read)

    def raise_urgency(self, entry: Entry[P], urgency: Urgency) -> None:
        """Raise the urgency of an entry's read, if it has one, to at least `urgency`."""
        if entry.read is not None:
            self._queue.raise_urgency(entry.read, urgency)

    def cancel(self, urgency: Urgency, limit: int | None = None, spared: Collection[ExpertKey] = ()) -> int:
        """Cancel reads as `ReadQueue.cancel` does and free their slots; return their bytes."""
        cancelled = self._queue.cancel(urgency, limit, spared)
        freed = 0
        for read in cancelled:
            self._undo(read)
            freed += read.nbytes
        return freed

    def pending(self, entries: Sequence[tuple[int, Entry[P]]]) -> PendingReads:
        """Return the reads of `entries`, pairs (index, entry), as `PendingReads`."""
        return self._queue.pending([(number, entry.read) for number, entry in entries if entry.read is not None])

    def reap(self) -> None:
        """Collect the reads that have ended; unpinned experts among them may be evicted from now on."""
        ended = self._queue.finished()
        for read in ended:
            entry = self._entries.get(read.key)
            if entry is not None and entry.read is read:
                self.refresh(entry)
        if ended:
            self._count_started()

    def finish(self, entry: Entry[P]) -> None:
        """Wait for an entry's read, if it has one; if the read failed, free its slots and raise its error."""
        read = entry.read
        if read is None:
            return
        self._wait(read)
        entry.end()
        if read.error is not None:
            self._drop(entry, read.first)
            raise read.error
        self._failed.pop(read.key, None)

    def wait_for_unpinned(self) -> bool:
        """Wait for the read of some unpinned entry, which can then be evicted; return False if there is none."""
        unpinned = next((e.read for e in self._entries.values() if e.read is not None and e.pins == 0), None)
        if unpinned is not None:
            self._wait(unpinned)
        return unpinned is not None

    def drain(self) -> None:
        """Wait until all queued reads have ended."""
        self._queue.wait_for_all()
        self.reap()

    # Memory

    def allocate(self, size_class: int, compact: bool) -> Slot | None:
        """Return a slot for a segment, or None if there is no room; with `compact`, other slots may be moved."""
        return self._arena.allocate(size_class, compact)

    def free(self, slots: Collection[Slot]) -> None:
        """Free slots that no read fills."""
        for slot in slots:
            self._arena.free(slot)

    def give_back_chunk(self) -> bool:
        """Give a free chunk of the arena back to the system; return False if none is free or can be emptied."""
        return self._arena.give_back()

    def take_chunk(self) -> bool:
        """Take back a chunk that was given to the system; return False if there is none."""
        return self._arena.take_again()

    def span(self, segment: int) -> int:
        """Return the bytes of a segment, padding included."""
        return self._spans[segment]

    def worth(self, key: ExpertKey, segment: int) -> float:
        """Return the cost of not having a segment, as `Eviction.worth` does."""
        return self._eviction.worth(key, segment)

    def cheapest(self, spared: Collection[ExpertKey], layer: int | None) -> ExpertKey | None:
        """Return the expert whose last segment should be evicted for one of `layer`, or None if there is none."""
        return self._eviction.cheapest(spared, layer)

    def cost(self, key: ExpertKey) -> float:
        """Return the cost of evicting an expert's last segment, inf if it must stay."""
        return self._eviction.cost(key)

    def evict(self, key: ExpertKey, missing: int = 0) -> int:
        """Evict an expert's last segment; return the bytes freed.

        Until `missing` bytes are free, this also evicts the segments before it that are worth no more than it.
        """
        entry, cost, freed = self._entries[key], self._eviction.cost(key), 0
        left = before = entry.segments
        while left and (not freed or (freed < missing and self._eviction.worth(key, left - 1) <= cost)):
            left -= 1
            freed += self._spans[left]
        self._drop(entry, left)
        self._stats.evicted(before - left, entry.drop_prefetches(left))
        self.refresh(entry)
        return freed

    # Statistics and checks

    @property
    def stats(self) -> StoreStats:
        """Return the counters; a read counts once a thread has begun it."""
        self._count_started()
        return self._stats

    def reset_stats(self) -> None:
        """Reset the counters; cancel prefetches that have not begun, and no longer count the others as prefetches."""
        self.cancel(Urgency.PREFETCH)
        for entry in self._entries.values():
            entry.drop_prefetches(0)
        self._queue.started()  # begun before the reset, so they count no more
        self._stats = StoreStats()

    def check(self) -> None:
        """Raise AssertionError if the bookkeeping is inconsistent; meant for tests, between calls."""
        slots = [slot for entry in self._entries.values() for slot in entry.slots]
        spans = sorted((slot.place[0], slot.place[0] + slot.place[1]) for slot in slots)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "slots overlap"
        assert self.nbytes() <= self.arena_bytes, "more is in the arena than it holds"
        for key, entry in self._entries.items():
            assert entry.key == key and entry.pins >= 0, key
            assert all(slot.owner is entry for slot in entry.slots), key
            assert all(self._segments[tier] <= entry.segments for tier in entry.prepared), key
            assert entry.announced <= entry.prepared.keys(), key
            assert (self._eviction.cost(key) < np.inf) <= (entry.free and bool(entry.slots)), key

    def pinned(self) -> list[ExpertKey]:
        """Return the pinned experts."""
        return [key for key, entry in self._entries.items() if entry.pins]

    def announced(self) -> Iterator[tuple[ExpertKey, int]]:
        """Yield the experts and tiers that were announced to the listener."""
        return ((key, tier) for key, entry in self._entries.items() for tier in entry.announced)

    def keys(self) -> set[ExpertKey]:
        """Return the experts that have an entry: segments in memory or being read, or a pin."""
        return set(self._entries)

    def _prepared(self, entry: Entry[P], tier: int) -> P:
        prepared = entry.prepared.get(tier)
        if prepared is None:
            needed = self._segments[tier]
            assert entry.segments >= needed, entry.key
            prepared = entry.prepared[tier] = self._prepare(tier, entry.places(needed))
        return prepared

    def _count_started(self) -> None:
        for read in self._queue.started():
            prefetch, background = read.purpose is Urgency.PREFETCH, read.purpose is Urgency.BACKGROUND
            self._stats.began(read.nbytes, prefetch, background)

    def _count_segments(self, layer: int, first: int, stop: int, more: int) -> None:
        for segment in range(first, stop):
            self._resident[layer][segment] += more

    def _wait(self, read: Read) -> None:
        self._queue.raise_urgency(read)
        started = time.perf_counter()
        self._queue.wait(read)
        self._stats.waited(time.perf_counter() - started)

    def _undo(self, read: Read) -> None:
        """Free the slots of a cancelled read, or of one that failed while nobody waited for it."""
        entry = self._entries[read.key]
        entry.end()
        self._drop(entry, read.first)
        entry.drop_prefetches(read.first)
        self.refresh(entry)

    def _drop(self, entry: Entry[P], first: int) -> None:
        """Free the segments of an entry from `first` on."""
        self._forget_prepared(entry, first)
        self._count_segments(entry.key.layer, first, entry.segments, -1)
        self.free(entry.cut(first))

    def _forget_prepared(self, entry: Entry[P], segments: int) -> None:
        """Drop prepared experts that need more than `segments` segments."""
        for tier in [tier for tier in entry.prepared if self._segments[tier] > segments]:
            if tier in entry.announced:
                entry.announced.remove(tier)
                assert self._listener is not None
                self._listener.remove(entry.key, tier)
            del entry.prepared[tier]

    def _on_move(self, slot: Slot) -> None:
        self._forget_prepared(slot.owner, 0)


def _movable(slot: Slot) -> bool:
    """Return whether a slot may be moved; one without an owner was just allocated and must stay."""
    return slot.owner is not None and slot.owner.free
