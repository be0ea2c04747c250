"""The store as a state machine: whatever is asked of it in whatever order, its invariants hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_kit import LAYOUTS, FakeReader, Segments, SteppedThreads, Store, broken, check, one_by_one

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import EVICTIONS
from dymoe_runtime.store.arena import WINDOW, chunk_bytes, full_arena_bytes, min_arena_bytes
from dymoe_runtime.store.eviction import Eviction
from dymoe_runtime.store.lease import Lease
from dymoe_runtime.store.request import ExpertRequest
from dymoe_runtime.store.store import ExpertStore, memory_of

# Hypothesis runs many examples as one test.
HANG_S = 120.0
LAYERS, EXPERTS = 2, 6


class Announcements:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.experts: dict[tuple[ExpertKey, int], Segments] = {}

    def put(self, key: ExpertKey, tier: int, prepared: Segments) -> None:
        assert (key, tier) not in self.experts
        self.experts[key, tier] = prepared

    def remove(self, key: ExpertKey, tier: int) -> None:
        del self.experts[key, tier]


def requests(tiers: Sequence[int], most: int) -> st.SearchStrategy[list[ExpertRequest]]:
    """Distinct experts of one layer."""

    def of_layer(layer: int) -> st.SearchStrategy[list[ExpertRequest]]:
        one = st.builds(
            ExpertRequest, st.builds(ExpertKey, st.just(layer), st.integers(0, EXPERTS - 1)), st.sampled_from(tiers)
        )
        return st.lists(one, max_size=most, unique_by=lambda request: request.key)

    return st.integers(0, LAYERS - 1).flatmap(of_layer)


class StoreMachine(RuleBasedStateMachine):
    """Acquires, prefetches, preloads, promotes, shrinks and fails in any order; reads end when a step says so."""

    @initialize(
        name=st.sampled_from(sorted(LAYOUTS)),
        chunks=st.integers(0, 8),
        eviction=st.sampled_from(EVICTIONS[:2]),
        everything=st.booleans(),
        overlap=st.booleans(),
    )
    def begin(self, name: str, chunks: int, eviction: str, everything: bool, overlap: bool) -> None:
        self.layout = LAYOUTS[name]
        self.reader, self.threads = FakeReader(self.layout), SteppedThreads()
        self.announced = Announcements()
        self.least = min_arena_bytes(self.layout, LAYERS * EXPERTS)
        full = full_arena_bytes(self.layout, LAYERS * EXPERTS)
        self.budget = full if everything else min(full, self.least + chunks * chunk_bytes(self.layout.segment_spans))
        self.store: Store = ExpertStore(
            self.layout,
            (LAYERS, EXPERTS),
            self.reader,
            self.budget,
            memory_of,
            Eviction((LAYERS, EXPERTS), len(self.layout.ladder), per_layer=eviction == "per-layer"),
            listener=self.announced,
            threads=lambda count: self.threads,
            overlap=overlap,
        )
        self.views: list[tuple[Lease[Segments], ExpertRequest, Segments]] = []
        self.lease: Lease[Segments] | None = None

    def teardown(self) -> None:
        if hasattr(self, "store"):
            if self.lease is not None:
                self.lease.release(failed=True)
            self.store.drain()
            self.store.check()
            assert not self.store.leased()
            assert self.store.close()

    def tiers(self) -> tuple[int, ...]:
        return (0, *self.layout.ladder)

    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        """Hold a lease over the next steps; the one before ends."""
        self.end_lease()
        asked = data.draw(requests(self.tiers(), WINDOW))
        try:
            self.lease = self.store.acquire(asked)
            if self.lease.pending is not None:
                self.lease.pending.wait()
            elif self.lease.experts is not None:
                self.views = [(self.lease, r, v) for r, v in zip(asked, self.lease.experts, strict=True)]
        except DymoeError as error:
            self.lease = None
            assert "checksum" in str(error)

    @rule()
    def end_lease(self) -> None:
        lease, self.lease, self.views = self.lease, None, []
        if lease is not None:
            try:
                lease.release()
            except DymoeError as error:
                assert "checksum" in str(error)
            assert not self.store.leased()

    @rule(data=st.data())
    def use_in_batches(self, data: st.DataObject) -> None:
        """More experts than can be held at once, if need be; each comes once, and whole."""
        self.end_lease()
        asked = data.draw(requests(self.tiers(), EXPERTS))
        seen = []
        try:
            with self.store.acquire(asked, few=data.draw(st.booleans())) as lease:
                for request, at in one_by_one(lease.batches()):
                    check(self.reader, request, at(request.tier))
                    seen.append(request)
            assert sorted(seen) == sorted(asked)
        except DymoeError as error:
            assert "checksum" in str(error) and self.reader.failing
        assert not self.store.leased()

    @rule()
    def use_directly(self) -> None:
        """Use what was announced, as compiled code does."""
        if self.announced.experts:
            self.store.used([ExpertRequest(key, tier) for key, tier in self.announced.experts][:2])

    @rule(data=st.data(), idle_s=st.none() | st.floats(0, 1e-2))
    def prefetch(self, data: st.DataObject, idle_s: float | None) -> None:
        needed = [request for _, request, _ in self.views]
        self.store.prefetch(data.draw(requests(self.tiers(), EXPERTS)), needed, idle_s)

    @rule(data=st.data())
    def preload(self, data: st.DataObject) -> None:
        self.store.preload(data.draw(requests(self.layout.ladder, EXPERTS)))

    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        try:
            self.store.promote(data.draw(requests(self.layout.ladder, 3)))
        except DymoeError as error:
            assert "checksum" in str(error)

    @rule(chunks=st.integers(-6, 6))
    def resize(self, chunks: int) -> None:
        nbytes = min(self.budget, self.store.arena_bytes + chunks * chunk_bytes(self.layout.segment_spans))
        self.store.resize(nbytes)
        if not self.store.leased():
            assert self.store.arena_bytes <= max(nbytes, self.least)

    @rule(tokens=st.integers(1, 5))
    def tick(self, tokens: int) -> None:
        self.store.tick(tokens)

    @rule()
    def reset_stats(self) -> None:
        self.store.reset_stats()

    @rule(expert=st.integers(0, EXPERTS - 1), layer=st.integers(0, LAYERS - 1))
    def fail(self, expert: int, layer: int) -> None:
        self.reader.failing[ExpertKey(layer, expert)] = broken(expert)

    @rule()
    def heal(self) -> None:
        self.reader.failing.clear()

    @rule(steps=st.integers(1, 4))
    def let_reads_end(self, steps: int) -> None:
        for _ in range(steps):
            self.threads.step()

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check()
        assert self.store.announced() == set(self.announced.experts)
        assert self.store.resident_bytes() <= self.store.arena_bytes <= self.budget

    @invariant()
    def what_is_lent_or_announced_is_right(self) -> None:
        if not hasattr(self, "store"):
            return
        for _, request, segments in self.views:
            check(self.reader, request, segments)
        for (key, tier), segments in self.announced.experts.items():
            check(self.reader, ExpertRequest(key, tier), segments)

    @invariant()
    def counts_make_sense(self) -> None:
        if hasattr(self, "store"):
            counts: dict[str, Any] = vars(self.store.stats)
            assert min(counts.values()) >= 0
            assert counts["hits"] <= counts["requests"]
            assert counts["prefetch_bytes"] + counts["background_bytes"] <= counts["read_bytes"]
            assert np.isfinite(self.store.rates()).all()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
