"""The expert store: it keeps experts in an arena and leases them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.reads import ReadThreads
from dymoe_runtime.memory import Place, memory_at
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.admission import Admission
from dymoe_runtime.store.arena import WINDOW, full_arena_bytes, min_arena_bytes
from dymoe_runtime.store.entry import Entry, P
from dymoe_runtime.store.eviction import Eviction
from dymoe_runtime.store.lease import Lease, StreamedLease, WholeLease, demand
from dymoe_runtime.store.read_queue import PATIENCE_S, ReadQueue
from dymoe_runtime.store.read_threads import start_threads
from dymoe_runtime.store.request import ExpertRequest, Reader, Urgency
from dymoe_runtime.store.residency import Prepare, Residency, ResidencyListener
from dymoe_runtime.store.stats import StoreStats

# A prefetch reads this many times the bytes that fit into the idle time. A read that ends late still ends earlier.
IDLE_TIMES = 2
# Tokens whose uses are remembered while all experts fit.
RECENT_TOKENS = 256


def memory_of(tier: int, places: list[Place]) -> list[np.ndarray]:
    """Return an expert as views of its segments, uint8 [bytes] each; a `prepare` for `ExpertStore`."""
    return list(map(memory_at, places))


# Experts that a lease of few holds at once.
FEW = 6


class ExpertStore(Generic[P]):
    """Experts in an arena of `arena_bytes`, read with `reader`.

    `shape` is (layers, experts per layer). `experts` is the number of all experts, in case some layers have none.
    `eviction` chooses what to evict, by default the least used segment of all layers.

    `prepare(tier, places)` turns the leading segments of an expert into the object that is lent. It is called again
    only after segments have left or moved. `listener` is told which experts can be used without a lease. `threads`
    starts the reading threads, by default Python's.

    Without `overlap`, experts are delivered only once all that are held at once have arrived. Without `backed` the
    arena has no memory; that needs a `reader` without files and a `prepare` that does not access the places.
    """

    def __init__(
        self,
        layout: RecordLayout,
        shape: tuple[int, int],
        reader: Reader,
        arena_bytes: int,
        prepare: Prepare[P],
        eviction: Eviction | None = None,
        experts: int | None = None,
        listener: ResidencyListener[P] | None = None,
        threads: Callable[[int], ReadThreads] | None = None,
        overlap: bool = True,
        backed: bool = True,
    ) -> None:
        """Start the reading threads; raise DymoeError if the arena is too small or no thread can be started."""
        experts = experts or shape[0] * shape[1]
        self._min_bytes = min_arena_bytes(layout, experts)
        if arena_bytes < self._min_bytes:
            raise DymoeError(
                f"expert arena of {arena_bytes} bytes is too small; the least that works is {self._min_bytes} bytes"
            )
        self.layout = layout
        self._shape = shape
        self._eviction = eviction or Eviction(shape, len(layout.ladder))
        self._residency: Residency[P] = Residency(
            layout,
            shape[0],
            min(arena_bytes, full_arena_bytes(layout, shape[0] * shape[1])),
            lambda memory: ReadQueue(reader, memory, start_threads(threads)),
            self._eviction,
            prepare,
            listener,
            backed,
        )
        self._admission = Admission(self._residency)
        self._overlap = overlap
        self._full_bytes = full_arena_bytes(layout, experts)
        self._all_fit = self.arena_bytes >= self._full_bytes
        # While all experts fit, uses are not counted. `resize` counts the recent ones, should that end.
        self._recent: deque[Sequence[ExpertRequest]] = deque(maxlen=RECENT_TOKENS * shape[0])

    def close(self, patience_s: float = PATIENCE_S) -> bool:
        """End the reading threads; return False if one still reads after `patience_s`, so its file must stay open."""
        return self._residency.close(patience_s)

    @property
    def stats(self) -> StoreStats:
        """Return the counters since the start or the last reset."""
        return self._residency.stats

    def reset_stats(self) -> None:
        """Reset the counters."""
        self._residency.reset_stats()

    @property
    def all_fit(self) -> bool:
        """Return whether all experts fit into the arena, so that none is ever evicted."""
        return self._all_fit

    @property
    def arena_bytes(self) -> int:
        """Return the bytes of the arena."""
        return self._residency.arena_bytes

    @property
    def empty_memory(self) -> np.ndarray:
        """Return the arena's memory, uint8 [bytes], which may be used for measurements before the first read."""
        return self._residency.empty_memory

    @property
    def read_bytes_per_s(self) -> float | None:
        """Return how fast one read was lately; None before the first."""
        return self._residency.read_bytes_per_s

    def resident_bytes(self) -> int:
        """Return the bytes of all experts that are in memory or being read."""
        return self._residency.nbytes()

    def tick(self, tokens: int = 1) -> None:
        """Let tokens pass: uses from now on count a little more than earlier ones."""
        self._eviction.tick(tokens)

    def rates(self) -> np.ndarray:
        """Return how often a token used each expert lately, [layers, experts]."""
        return self._eviction.rates()

    def acquire(self, requests: Sequence[ExpertRequest], few: bool = False) -> Lease[P]:
        """Return a lease of the requested experts; the first reads of missing ones are queued on return.

        With `few`, missing ones are held a few at a time, so that those that are used more often stay.
        """
        residency = self._residency
        residency.reap()
        missing = [request for request in requests if not residency.is_resident(request)]
        if not missing:
            return self._lend_resident(requests)
        if few and len(missing) > FEW:
            window = min(FEW, self._window())
            return StreamedLease(residency, self._admission, requests, window, self._overlap, spares_used=False)
        if not self._fit_together(requests):
            return StreamedLease(residency, self._admission, requests, self._window(), self._overlap)
        return self._lend_together(requests, missing)

    def used(self, requests: Sequence[ExpertRequest]) -> None:
        """Count uses of experts that were announced to the listener and used without a lease."""
        residency = self._residency
        residency.count_hits(len(requests))
        if self._all_fit:
            self._recent.append(requests)
            return
        for request in requests:
            residency.count(request)
            residency.refresh(residency.resident_entry(request.key))

    def resident_tier(self, request: ExpertRequest) -> int:
        """Return the highest tier up to the requested one that can run without waiting, or 0 if there is none."""
        self._residency.reap()
        entry = self._residency.find(request.key)
        return 0 if entry is None else self._tier_of(entry.arrived(), request.tier)

    def arriving_tier(self, request: ExpertRequest) -> int:
        """Return the highest tier up to the requested one that is in memory or being read, or 0 if there is none."""
        entry = self._residency.find(request.key)
        return 0 if entry is None else self._tier_of(entry.segments, request.tier)

    def holds_layer(self, layer: int, tier: int) -> bool:
        """Return whether every expert of `layer` is in memory or being read up to `tier`."""
        return self._residency.resident_experts(layer, tier) == self._shape[1]

    def prefetch(
        self,
        requests: Sequence[ExpertRequest],
        needed_now: Sequence[ExpertRequest] = (),
        idle_s: float | None = None,
    ) -> None:
        """Start reads of experts that will probably be needed next, likeliest first.

        Cancels earlier prefetches that have not begun. Evicts the least used experts, but none of `requests` and
        `needed_now`. `idle_s`, if given, is the time until the experts are needed. Then the reads take at most
        IDLE_TIMES that time, at the recent speed of one read.
        """
        residency = self._residency
        residency.cancel(Urgency.PREFETCH)
        kept = {request.key for request in (*requests, *needed_now)}
        before, rate = residency.submitted_bytes, residency.read_bytes_per_s
        limit = None if idle_s is None or rate is None else IDLE_TIMES * idle_s * rate
        for request in requests:
            if limit is not None and residency.submitted_bytes - before >= limit:
                break
            if not self._volunteer(request, Urgency.PREFETCH, kept):
                break

    def preload(self, requests: Sequence[ExpertRequest]) -> None:
        """Start background reads of `requests` in their order, up to the first that finds no room."""
        for request in requests:
            if not self._volunteer(request, Urgency.BACKGROUND, {request.key}):
                break

    def promote(self, requests: Sequence[ExpertRequest], needed_now: Sequence[ExpertRequest] = ()) -> None:
        """Start background reads of the segments that `requests` lacked just now, evicting those that are used less.

        Raises the error of an earlier background read of these experts, which nobody would see otherwise.
        """
        residency = self._residency
        for request in requests:
            residency.raise_failure(request.key)
        kept = {request.key for request in (*requests, *needed_now)}
        for request in requests:
            residency.count_lacking(request, residency.entry(request.key).segments)
            self._volunteer(request, Urgency.BACKGROUND, kept)

    def resize(self, arena_bytes: int) -> None:
        """Shrink or grow the arena to about `arena_bytes`.

        It never falls below the minimum that always works, nor grows beyond its first size. Pinned experts may keep it
        larger than asked.
        """
        for requests in self._recent:
            for request in requests:
                self._residency.count(request)
        self._recent.clear()
        self._residency.refresh_all()
        self._admission.resize(max(arena_bytes, self._min_bytes))
        self._all_fit = self.arena_bytes >= self._full_bytes

    def drain(self) -> None:
        """Wait until all queued reads have ended."""
        self._residency.drain()

    def check(self) -> None:
        """Raise AssertionError if the bookkeeping is inconsistent; meant for tests, between calls."""
        self._residency.check()

    def leased(self) -> list[ExpertKey]:
        """Return the experts that leases pin."""
        return self._residency.pinned()

    def resident(self) -> set[ExpertKey]:
        """Return the experts that have segments in memory or being read."""
        return self._residency.keys()

    def announced(self) -> set[tuple[ExpertKey, int]]:
        """Return the experts and tiers that were announced to the listener."""
        return set(self._residency.announced())

    def _lend_resident(self, requests: Sequence[ExpertRequest]) -> Lease[P]:
        residency = self._residency
        entries = [residency.resident_entry(request.key) for request in requests]
        residency.count_hits(len(requests))
        if self._all_fit:  # nothing is ever evicted, so nothing needs a pin
            self._recent.append(requests)
            return WholeLease(residency, requests, entries, ())
        for request, entry in zip(requests, entries, strict=True):
            residency.count(request)
            residency.pin(entry)
        return WholeLease(residency, requests, entries, entries)

    def _lend_together(self, requests: Sequence[ExpertRequest], missing: Sequence[ExpertRequest]) -> Lease[P]:
        """Return a lease that pins all requested experts at once, and start the reads of the `missing` ones."""
        residency, pinned = self._residency, list[Entry[P]]()
        wanted, late = {request.key for request in requests}, {request.key for request in missing}
        try:
            for request in requests:
                if request.key not in late:
                    entry = residency.resident_entry(request.key)
                    residency.count(request)
                    residency.pin(entry)
                    pinned.append(entry)
            residency.count_hits(len(pinned))
            pinned += [demand(residency, self._admission, request, wanted) for request in missing]
            return WholeLease(residency, requests, [residency.resident_entry(r.key) for r in requests], pinned)
        except BaseException:
            for entry in pinned:
                residency.unpin(entry)
            raise

    def _fit_together(self, requests: Sequence[ExpertRequest]) -> bool:
        """Return whether all requested experts can be held at once, and each needs at most one read."""
        fit = self._overlap and len({request.key for request in requests}) == len(requests) <= self._window()
        return fit and not any(map(self._residency.reads_less, requests))

    def _window(self) -> int:
        """Return how many experts can always be held at once, in whatever chunks their segments lie."""
        return max(WINDOW, self._residency.chunks // len(self.layout.ladder))

    def _volunteer(self, request: ExpertRequest, urgency: Urgency, kept: set[ExpertKey]) -> bool:
        """Start a read of a request unless it is in memory or being read; return False if there is no room."""
        residency = self._residency
        entry, segments = residency.entry(request.key), residency.segments_of(request.tier)
        if entry.read is not None:
            residency.raise_urgency(entry, urgency)
            return True
        return entry.segments >= segments or self._admission.volunteer(entry, segments, urgency, kept)

    def _tier_of(self, segments: int, limit: int) -> int:
        """Return the highest tier up to `limit` that needs at most `segments` segments, or 0 if there is none."""
        fitting = (t for t in self.layout.ladder if t <= limit and self._residency.segments_of(t) <= segments)
        return max(fitting, default=0)
