"""What is read, what stays in memory, and what leaves it."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from store_kit import LAYOUTS, SPAN, Call, StoreFactory, fetch, flat_layout, key, prefetch, req, wait_until

from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import DECAY
from dymoe_runtime.store.arena import full_arena_bytes, min_arena_bytes
from dymoe_runtime.store.eviction import Eviction

# Reads


def test_a_hit_reads_nothing(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    assert fetch(store, reader, req(1), req(2), req(3)) == [(key(e), 0, 3) for e in (1, 2, 3)]
    assert fetch(store, reader, req(3), req(1), req(2)) == []
    assert (store.stats.requests, store.stats.hits) == (6, 3)
    assert store.stats.read_bytes == 9 * SPAN == store.resident_bytes()


def test_a_lower_tier_of_what_is_resident_is_a_hit(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    fetch(store, reader, req(1, 4))
    assert fetch(store, reader, req(1, 3)) == fetch(store, reader, req(1, 2)) == []
    assert store.stats.hits == 2


@pytest.mark.parametrize(
    ("tiers", "reads"),
    [
        ((2, 3, 4), [(0, 1), (1, 1), (2, 1)]),
        ((2, 4), [(0, 1), (1, 2)]),
        ((3, 4), [(0, 2), (2, 1)]),
        ((4, 2, 3), [(0, 3)]),
    ],
    ids=str,
)
def test_a_higher_tier_reads_only_what_is_missing(
    make: StoreFactory, tiers: Sequence[int], reads: Sequence[tuple[int, int]]
) -> None:
    store, reader = make(segments=30)
    for tier in tiers:
        fetch(store, reader, req(1, tier))
    assert reader.calls == [(key(1), first, count) for first, count in reads]
    assert store.stats.hits == len(tiers) - len(reads)


def test_a_layer_is_held_once_all_of_it_is_resident_and_until_something_is_evicted(make: StoreFactory) -> None:
    store, reader = make(segments=48)
    fetch(store, reader, *(req(e, 4) for e in range(15)), req(15, 3))
    assert store.holds_layer(0, 2) and store.holds_layer(0, 3) and not store.holds_layer(0, 4)
    fetch(store, reader, req(15, 4))
    assert store.holds_layer(0, 4) and not store.holds_layer(1, 2)
    fetch(store, reader, req(0, 2, layer=1))
    assert store.holds_layer(0, 2) and not store.holds_layer(0, 4)


# Eviction


class PlainStore:
    """What the store must read, one expert at a time, for segments of one size: least used last segment goes first."""

    def __init__(self, segments: int, decay: float = DECAY) -> None:
        self.free, self.decay, self.weight = segments, decay, 1.0
        self.resident: dict[ExpertKey, int] = {}
        self.uses: dict[tuple[ExpertKey, int], float] = {}

    def fetch(self, expert: ExpertKey, segments: int) -> list[Call]:
        for segment in range(segments):
            self.uses[expert, segment] = self.uses.get((expert, segment), 0.0) + self.weight
        have = self.resident.get(expert, 0)
        if segments <= have:
            return []
        while self.free < segments - have:
            victims = [k for k, count in self.resident.items() if count and k != expert]
            victim = min(victims, key=lambda k: (self.uses[k, self.resident[k] - 1], k))
            self.resident[victim] -= 1
            self.free += 1
        self.free -= segments - have
        self.resident[expert] = segments
        return [Call(expert, have, segments - have)]

    def tick(self) -> None:
        self.weight *= self.decay


@pytest.mark.parametrize("segments", [9, 14, 40])
@pytest.mark.parametrize("seed", range(3))
def test_reads_and_evictions_equal_those_of_a_plain_store(make: StoreFactory, seed: int, segments: int) -> None:
    store, reader = make(segments=segments)
    plain, rng = PlainStore(segments), random.Random(seed)
    for _ in range(250):
        request = req(min(int(rng.expovariate(0.2)), 15), rng.choice((2, 2, 3, 4)), rng.randrange(2))
        assert fetch(store, reader, request) == plain.fetch(request.key, store.layout.segments_of(request.tier))
        if rng.random() < 0.5:
            store.tick()
            plain.tick()
    assert store.resident_bytes() == SPAN * sum(plain.resident.values())


def test_refinement_planes_of_little_used_experts_go_before_base_planes(make: StoreFactory) -> None:
    store, reader = make(segments=12)
    fetch(store, reader, *(req(e, 4) for e in (0, 1, 2, 3)))
    fetch(store, reader, *(req(e, 2) for e in (0, 1, 2)))  # now base planes were used twice, but that of 3 once
    fetch(store, reader, req(3, 4))
    fetch(store, reader, *(req(e, 2) for e in range(4, 10)))
    # Six segments had to go: the refinement planes of 0, 1 and 2.
    assert fetch(store, reader, req(3, 4), *(req(e, 2) for e in (0, 1, 2))) == []
    assert store.stats.evictions == 6


def test_counts_survive_eviction(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for _ in range(3):
        fetch(store, reader, req(0, 2))
    for expert in range(1, 10):
        for _ in range(4):
            fetch(store, reader, req(expert, 2))
    assert fetch(store, reader, req(0, 2)) != []  # it had been evicted
    fetch(store, reader, req(0, 2))  # its fifth use
    fetch(store, reader, req(10, 2))
    fetch(store, reader, req(11, 2))  # in place of 10, which was used once
    assert fetch(store, reader, req(0, 2)) == []
    assert fetch(store, reader, req(10, 2)) != []


def test_no_more_leaves_than_must(make: StoreFactory) -> None:
    store, reader = make(segments=11)
    fetch(store, reader, req(1), req(2), req(3))
    fetch(store, reader, req(4))  # there was room for two segments of three
    assert (store.stats.evictions, store.resident_bytes()) == (1, 11 * SPAN)


def test_what_is_worth_as_little_leaves_together(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, req(1), req(2), req(3))
    for _ in range(3):
        fetch(store, reader, req(2, 2), req(3))
    assert fetch(store, reader, req(4, 3)) == [(key(4), 0, 2)]  # in place of refinements of 1 and 2, used once
    assert store.resident_bytes() == 9 * SPAN
    assert fetch(store, reader, req(2, 2), req(3)) == []


def test_uses_decay_as_tokens_pass(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for _ in range(3):
        fetch(store, reader, req(0, 2))
    for _ in range(200):
        store.tick()
    for expert in range(1, 10):
        fetch(store, reader, req(expert, 2))
    assert fetch(store, reader, *(req(e, 2) for e in range(1, 10))) == []


def test_counts_are_rescaled_before_they_overflow(make: StoreFactory) -> None:
    logs = []
    for limit in (1e200, 1.5):
        eviction = Eviction((2, 16), 3, decay=2.0, rescale_at=limit)
        store, reader = make(segments=9, eviction=eviction)
        rng = random.Random(0)
        for _ in range(200):
            fetch(store, reader, req(rng.randrange(8), rng.choice((2, 3, 4))))
            store.tick()
        logs.append(reader.calls)
        assert (max(eviction.worth(key(e), 0) for e in range(8)) < 4) == (limit == 1.5)
    assert logs[0] == logs[1]


def test_a_prior_makes_early_evictions_less_blind(make: StoreFactory) -> None:
    prior = np.zeros((2, 16))
    prior[0, 0] = 5.0
    for known in prior, None:
        store, reader = make(segments=9, prior=known)
        for expert in range(10):
            fetch(store, reader, req(expert, 2))
        assert (fetch(store, reader, req(0, 2)) == []) == (known is not None)


def test_an_expert_that_is_promoted_does_not_lose_the_planes_it_has(make: StoreFactory) -> None:
    """Even where all that may be evicted is requested by the same token, and it is the least used of it."""
    store, reader = make(segments=9)
    fetch(store, reader, req(0, 2), *(req(e, 3) for e in (1, 2, 3, 4)))
    for _ in range(3):
        fetch(store, reader, *(req(e, 3) for e in (1, 2, 3, 4)))
    fetch(store, reader, req(0, 4), *(req(e, 3) for e in (1, 2, 3, 4)))


# Memory that is given back


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_store_that_shrinks_keeps_what_is_used_most_and_right(make: StoreFactory, name: str) -> None:
    layout = LAYOUTS[name]
    store, reader = make(layout=layout, arena_bytes=full_arena_bytes(layout, 32))
    for expert in range(16):
        for _ in range(1 + (expert < 3)):
            fetch(store, reader, req(expert, layout.ladder[-1]))
    before = store.arena_bytes
    store.resize(before // 2)
    assert store.arena_bytes <= max(before // 2, min_arena_bytes(layout)) and not store.all_fit
    assert fetch(store, reader, *(req(e, layout.ladder[-1]) for e in range(3))) == []
    for expert in range(16):  # what has left is read again, and right
        fetch(store, reader, req(expert, layout.ladder[-1]))
    store.resize(0)
    assert store.arena_bytes == min_arena_bytes(layout)
    fetch(store, reader, *(req(e, layout.ladder[-1]) for e in range(16)))
    store.check()


def test_what_was_used_most_stays_where_all_did_fit_before(make: StoreFactory) -> None:
    """Uses are not counted while nothing has to leave, but remembered."""
    store, reader = make(arena_bytes=full_arena_bytes(flat_layout(), 32))
    everything = [req(expert, 4, layer) for layer in range(2) for expert in range(16)]
    for request in everything:
        fetch(store, reader, request)
    hot = everything[2::4]
    for _ in range(3):
        assert fetch(store, reader, *hot[:4]) == fetch(store, reader, *hot[4:]) == []
    before = store.arena_bytes
    store.resize(before // 3)
    assert fetch(store, reader, *hot) == []
    store.resize(before)
    assert store.all_fit and store.arena_bytes == before
    fetch(store, reader, *everything)


def test_a_store_shrinks_while_it_reads(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.preload([req(expert) for expert in range(8)])
    reader.wait_for(key(0), key(1))
    threading.Timer(0.05, reader.release).start()
    store.resize(0)
    assert store.arena_bytes == min_arena_bytes(flat_layout())
    fetch(store, reader, *(req(e) for e in range(10)))


def test_what_is_leased_stays_while_the_store_shrinks(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    fetch(store, reader, *(req(e) for e in range(10)))
    with store.acquire([req(7), req(8)]) as lease:
        store.resize(0)
        assert lease.experts is not None and {key(7), key(8)} <= store.resident()
        assert store.resident_tier(req(7)) == store.resident_tier(req(8)) == 4
    store.check()


def test_rates_tell_what_was_used_lately(make: StoreFactory) -> None:
    store, reader = make(segments=9, prior=np.zeros((2, 16)))
    for _ in range(100):
        fetch(store, reader, req(1, 2))
        store.tick()
    rates = store.rates()
    assert rates.shape == (2, 16) and rates[0, 1] > 0.9 and rates.sum() == rates[0, 1]


def test_a_prefetch_that_nobody_uses_may_leave_like_anything_else(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    prefetch(store, req(15, 2))
    for expert in range(9):
        fetch(store, reader, req(expert, 2))
    wait_until(lambda: key(15) not in store.resident())
    assert (store.stats.prefetch_hits, store.stats.prefetch_evicted) == (0, 1)
    assert fetch(store, reader, req(15, 2)) == [(key(15), 0, 1)]
    assert store.stats.prefetch_hits == 0
