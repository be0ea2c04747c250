"""What the store lends: the right bytes, in their places, for as long as they are leased."""

from __future__ import annotations

import random
import threading

import pytest
from store_kit import (
    ARENAS,
    LAYOUTS,
    FakeReader,
    Segments,
    StoreFactory,
    broken,
    check,
    fetch,
    flat_layout,
    key,
    prefetch,
    random_requests,
    receive,
    req,
    use_at_random,
    use_whole,
)

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.memory import Place
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import WINDOW, chunk_bytes, full_arena_bytes, min_arena_bytes
from dymoe_runtime.store.request import ExpertRequest
from dymoe_runtime.store.store import ExpertStore, memory_of

on_both = pytest.mark.parametrize("make", [None, load_kernels().reads], indirect=True, ids=["python", "compiled"])


@on_both
@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_content_is_right_under_random_use(make: StoreFactory, name: str, arena: str) -> None:
    """At most as many experts per token as can be held at once."""
    layout = LAYOUTS[name]
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=ARENAS[arena](layout))
    assert store.arena_bytes <= ARENAS[arena](layout)
    use_at_random(store, reader, 1, 150, most=WINDOW)
    prefetch(store)
    stats = store.stats
    assert stats.requests > stats.hits > 0
    assert stats.prefetch_hits + stats.prefetch_evicted <= stats.prefetch_reads
    assert (stats.evictions == 0) == (arena == "all")
    assert stats.read_bytes == sum(sum(layout.segment_spans[c.first : c.first + c.segments]) for c in reader.calls)


@on_both
@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_content_is_right_where_a_token_requests_more_than_can_be_held(
    make: StoreFactory, name: str, arena: str
) -> None:
    layout = LAYOUTS[name]
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=ARENAS[arena](layout))
    use_at_random(store, reader, 2, 100, most=16)


@on_both
@pytest.mark.parametrize("arena", ARENAS)
def test_content_is_right_where_leases_end_early(make: StoreFactory, arena: str) -> None:
    layout = LAYOUTS["real"]
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=ARENAS[arena](layout))
    use_at_random(store, reader, 3, 150, most=WINDOW, ending_early=True)
    assert not store.leased()


@on_both
@pytest.mark.parametrize("arena", ["smallest", "a little more", "half"])
def test_content_is_right_while_reads_fail_at_random(make: StoreFactory, arena: str) -> None:
    layout, rng = LAYOUTS["real"], random.Random(7)
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=ARENAS[arena](layout))
    failures = 0
    for _ in range(100):
        reader.failing = {key(e, layer): broken(e) for layer in range(3) for e in rng.sample(range(16), 2)}
        try:
            use_at_random(store, reader, rng.randrange(1 << 30), 3, most=16)
        except DymoeError as error:
            assert "checksum" in str(error)
            failures += 1
    assert 20 < failures < 100
    store.prefetch([])
    for expert in range(16):
        store.drain()
        reader.failing.clear()
        try:
            fetch(store, reader, req(expert))
        except DymoeError:  # of a prefetch while reads still failed
            fetch(store, reader, req(expert))
    assert not store.leased()
    store.check()


@on_both
@pytest.mark.parametrize("name", LAYOUTS)
def test_where_everything_fits_everything_is_read_once(make: StoreFactory, name: str) -> None:
    layout = LAYOUTS[name]
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=1 << 30)
    use_at_random(store, reader, 4, 150, most=16)
    read = [(c.expert, segment) for c in reader.calls for segment in range(c.first, c.first + c.segments)]
    assert len(read) == len(set(read))
    assert store.arena_bytes == full_arena_bytes(layout, 48)
    # A chunk that sizes do not divide wastes some; a layer must still fit in what is about its size.
    assert store.arena_bytes <= 1.5 * 48 * layout.record_bytes


def test_an_expert_may_be_requested_twice(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    assert fetch(store, reader, req(1, 2), req(1, 4), req(1, 3)) == [(key(1), 0, 1), (key(1), 1, 2)]


def test_no_request_is_no_expert(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    assert fetch(store, reader) == []
    assert fetch(store, reader, req(1, 0)) == []
    assert store.resident_bytes() == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_arena_that_is_too_small_is_refused_with_the_least_that_works(name: str) -> None:
    layout = LAYOUTS[name]
    least = min_arena_bytes(layout)
    before = threading.active_count()
    with pytest.raises(DymoeError, match=rf"least.* {least} "):
        ExpertStore(layout, (3, 16), FakeReader(layout), least - 1, memory_of)
    assert threading.active_count() == before


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_a_model_of_few_experts_needs_no_more_than_all_of_them(make: StoreFactory, experts: int) -> None:
    layout = flat_layout()
    full = full_arena_bytes(layout, experts)
    store, reader = make(layout=layout, shape=(1, experts), arena_bytes=full)
    assert store.all_fit and min_arena_bytes(layout, experts) <= full
    for tier in (2, 4, 3):
        fetch(store, reader, *(req(expert, tier) for expert in range(experts)))
    store.resize(0)
    fetch(store, reader, *(req(expert, 4) for expert in range(experts)))


# Leases


@pytest.mark.parametrize("segments", [30, 96], ids=["some room", "room for all"])
def test_what_is_resident_is_lent_together(make: StoreFactory, segments: int) -> None:
    """And counts as hits, whether or not anything could ever be evicted."""
    store, reader = make(segments=segments)
    requests = [req(1, 4), req(2, 2), req(3, 3)]
    fetch(store, reader, *requests)
    before = len(reader.calls)
    with store.acquire(requests) as lease:
        assert lease.experts is not None and lease.pending is None
        (batch,) = (batch for batch in lease.batches() if batch)
        assert [request for request, _ in batch] == requests
        for request, segments_ in zip(requests, lease.experts, strict=True):
            check(reader, request, segments_)
    assert len(reader.calls) == before
    assert (store.stats.requests, store.stats.hits) == (6, 3)


def test_what_is_resident_comes_before_what_is_read(make: StoreFactory) -> None:
    """Together, and without waiting; then the others as their reads end."""
    store, reader = make(arena_bytes=1 << 20)
    fetch(store, reader, req(2), req(4), req(5, 2))
    reader.hold(key(1), key(3))
    with store.acquire([req(1), req(2), req(3), req(4), req(5, 2)]) as lease:
        batches = lease.batches()
        assert [request for request, _ in next(batches)] == [req(2), req(4), req(5, 2)]
        reader.release(key(1), key(3))
        assert {request for batch in batches for request, _ in batch} == {req(1), req(3)}


def test_the_first_reads_have_begun_when_acquire_returns(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    reader.hold(key(1), key(2))
    with store.acquire([req(e) for e in (1, 2, 3)]) as lease:
        reader.wait_for(key(1), key(2))
        reader.release()
        receive(reader, lease.batches())


def test_a_lease_holds_experts_in_the_order_of_the_requests(make: StoreFactory) -> None:
    """What is resident, what is being read and what is not; all of it stays until the lease ends."""
    store, reader = make(segments=12)
    fetch(store, reader, req(1), req(2, 2))
    reader.hold(key(2), key(3))
    store.prefetch([req(3)])
    reader.wait_for(key(3))
    requests = [req(3), req(1), req(2, 3)]
    with store.acquire(requests) as lease:
        assert lease.pending is not None and [rank for rank, _ in lease.pending.tickets] == [0, 2]
        store.prefetch([req(e) for e in range(4, 9)], requests)  # there is room for one
        reader.release()
        lease.pending.wait()
        store.drain()
        assert lease.experts is not None
        for request, segments in zip(requests, lease.experts, strict=True):
            check(reader, request, segments)
    stats = store.stats
    assert (stats.requests, stats.hits, stats.prefetch_hits) == (5, 2, 1) and stats.wait_s > 0
    with store.acquire(requests) as lease:
        assert lease.pending is None and store.stats.hits == 5
        assert set(store.leased()) == {request.key for request in requests}
    assert not store.leased()


def test_what_needs_more_than_a_read_each_comes_in_turn(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    with store.acquire([req(e) for e in range(WINDOW + 1)]) as lease:  # more than can be held at once
        assert lease.experts is None
    store.drain()
    reader.hold(key(9))
    store.prefetch([req(9, 2)])
    reader.wait_for(key(9))
    with store.acquire([req(9, 4)]) as lease:
        assert lease.experts is None
    with store.acquire([req(9, 2)]) as lease:
        assert lease.experts is not None
        reader.release()
    serial, _ = make(segments=9, overlap=False)
    with serial.acquire([req(1)]) as lease:
        assert lease.experts is None


def test_what_is_leased_stays_while_others_are_prefetched(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for expert in range(8):
        fetch(store, reader, req(expert, 2))
    with store.acquire([req(e, 4) for e in range(8, 16)]) as lease:
        for batch in lease.batches():
            store.prefetch([req(e, 4, layer=1) for e in range(5)])
            for request, at in batch:
                check(reader, request, at(request.tier))


@pytest.mark.parametrize("name", ["real", "four tiers"])
def test_what_is_leased_stays_in_its_place(make: StoreFactory, name: str) -> None:
    """Even where moving it would make room for others; the views are those taken before."""
    layout, lent = LAYOUTS[name], 0
    for seed in range(25):
        rng = random.Random(seed)
        arena = min_arena_bytes(layout) + seed % 5 * chunk_bytes(layout.segment_spans)
        store, reader = make(layout=layout, shape=(3, 16), arena_bytes=arena)
        for _ in range(40):
            fetch(store, reader, *random_requests(rng, layout, 3)[:WINDOW])
            store.drain()
            top = layout.ladder[-1]
            resident = [ExpertRequest(k, store.resident_tier(ExpertRequest(k, top))) for k in sorted(store.resident())]
            with store.acquire(rng.sample(resident, min(2, len(resident)))) as lease:
                for batch in lease.batches():
                    views = [(request, at(request.tier)) for request, at in batch]
                    prefetch(store, *[req(e, rng.choice(layout.ladder), rng.randrange(3)) for e in range(6)])
                    for request, segments in views:
                        check(reader, request, segments)
                    lent += len(views)
            store.tick()
    assert lent > 1000


def test_the_resident_tier_is_what_need_not_be_waited_for(make: StoreFactory) -> None:
    store, reader = make(arena_bytes=1 << 20)
    assert store.resident_tier(req(1)) == 0
    fetch(store, reader, req(1, 2), req(2, 3))
    assert [store.resident_tier(req(e, tier)) for e, tier in ((1, 4), (2, 4), (2, 2))] == [2, 3, 2]
    reader.hold(key(1))
    with store.acquire([req(1, 4)]) as lease:
        assert (store.resident_tier(req(1)), store.arriving_tier(req(1))) == (2, 4)
        reader.release(key(1))
        receive(reader, lease.batches())
    assert store.resident_tier(req(1)) == 4


def test_what_will_never_leave_need_not_be_held(make: StoreFactory) -> None:
    store, reader = make(segments=96)  # room for all
    fetch(store, reader, req(1, 4), req(2, 3))
    before = store.stats.hits
    for tier in 2, 3, 2:
        requests = [req(1, tier), req(2, tier)]
        with store.acquire(requests) as lease:
            assert lease.experts is not None and lease.pending is None and not store.leased()
            for request, segments in zip(requests, lease.experts, strict=True):
                check(reader, request, segments)
    assert store.stats.hits == before + 6


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_whole_lease_counts_and_keeps_what_one_in_batches_does(make: StoreFactory, name: str) -> None:
    """The same requests, by either way, leave the same in memory."""
    layout = LAYOUTS[name]
    for seed in range(10):
        arena = 8 * min_arena_bytes(layout) + 3 * seed * chunk_bytes(layout.segment_spans)
        stores = [make(layout=layout, shape=(3, 16), arena_bytes=arena) for _ in range(2)]
        rng = random.Random(seed)
        for _ in range(60):
            requests = [request for request in random_requests(rng, layout, 8) if request.tier]
            use_whole(*stores[0], requests)
            fetch(*stores[1], *requests)
            for store, _ in stores:
                store.tick()
        first, second = ((store.stats, store.resident_bytes(), store.resident()) for store, _ in stores)
        first[0].wait_s = second[0].wait_s = 0.0
        assert first == second and 0 < first[0].hits < first[0].requests


# What is prepared, and announced


def test_what_was_prepared_serves_until_a_segment_leaves(make: StoreFactory) -> None:
    asked = []

    def prepare(tier: int, places: list[Place]) -> Segments:
        asked.append(tier)
        return memory_of(tier, places)

    store, reader = make(segments=9, prepare=prepare)
    for _ in range(2):
        fetch(store, reader, req(1, 4), req(2, 2))
    assert asked == [4, 2]
    for _ in range(3):
        fetch(store, reader, req(3, 4), req(4, 4), req(5, 4))  # in all the room there is
    assert asked == [4, 2, 4, 4, 4]
    fetch(store, reader, req(1, 4))
    assert asked == [4, 2, 4, 4, 4, 4]


class Announced:
    """Keeps what a store announces, which must be what it says at any time."""

    def __init__(self) -> None:
        self.experts: dict[tuple[ExpertKey, int], Segments] = {}
        self.removed = 0

    def put(self, key: ExpertKey, tier: int, prepared: Segments) -> None:
        assert (key, tier) not in self.experts
        self.experts[key, tier] = prepared

    def remove(self, key: ExpertKey, tier: int) -> None:
        del self.experts[key, tier]
        self.removed += 1

    def check(self, reader: FakeReader) -> None:
        for (expert, tier), segments in self.experts.items():
            check(reader, ExpertRequest(expert, tier), segments)


@on_both
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_announced_is_resident(make: StoreFactory, name: str) -> None:
    """At any time, whatever else is read, leaves or moves; and using it is counted as acquiring it is."""
    layout, used, removed = LAYOUTS[name], 0, 0
    for seed in range(6):
        rng = random.Random(seed)
        arena = min_arena_bytes(layout) * (1 + seed) + seed * chunk_bytes(layout.segment_spans)
        announced = Announced()
        store, reader = make(layout=layout, shape=(3, 16), arena_bytes=arena, listener=announced)
        reader.jitter = random.Random(seed)
        for turn in range(60):
            requests = [request for request in random_requests(rng, layout, 5) if request.tier]
            before = store.stats.requests, store.stats.hits
            if requests and all((request.key, request.tier) in announced.experts for request in requests):
                store.used(requests)
                used += len(requests)
                assert (store.stats.requests, store.stats.hits) == tuple(n + len(requests) for n in before)
            else:
                reader.failing = {key(rng.randrange(16)): broken(0)} if rng.random() < 0.1 else {}
                try:
                    use_whole(store, reader, requests)
                except DymoeError:
                    reader.failing = {}
            announced.check(reader)
            if rng.random() < 0.5:
                store.prefetch(random_requests(rng, layout, 6), requests)
            if turn % 20 == 10:
                store.resize(arena - rng.randrange(3) * chunk_bytes(layout.segment_spans))
            announced.check(reader)
            store.tick()
        removed += announced.removed
        assert {expert for expert, _ in announced.experts} <= store.resident()
        assert store.announced() == set(announced.experts)
        store.check()
    assert used > 15 and removed > 15


def test_using_what_is_announced_keeps_it_as_acquiring_it_does(make: StoreFactory) -> None:
    for direct in False, True:
        store, reader = make(segments=9, listener=Announced())
        for _ in range(5):
            use_whole(store, reader, [req(1)])
            store.tick()
        use_whole(store, reader, [req(2)])
        use_whole(store, reader, [req(3)])
        for _ in range(10):
            if direct:
                store.used([req(2)])
            else:
                use_whole(store, reader, [req(2)])
            store.tick()
        use_whole(store, reader, [req(4)])
        use_whole(store, reader, [req(5)])
        assert key(2) in store.resident() and store.stats.hits == 14
