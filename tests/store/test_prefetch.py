"""What is read before somebody waits for it: prefetches, preloads and promotions, and what goes before them."""

from __future__ import annotations

import threading

import pytest
from store_kit import (
    SPAN,
    SteppedThreads,
    StoreFactory,
    broken,
    check,
    fetch,
    key,
    one_by_one,
    prefetch,
    receive,
    req,
    wait_until,
)

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import IN_FLIGHT
from dymoe_runtime.store.eviction import Eviction
from dymoe_runtime.store.request import ExpertRequest
from dymoe_runtime.store.store import IDLE_TIMES

# Prefetch


def test_a_prefetch_that_is_used_is_a_hit(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    prefetch(store, req(1, 4), req(2, 2))
    assert sorted(reader.calls) == [(key(1), 0, 3), (key(2), 0, 1)]
    assert fetch(store, reader, req(1, 4), req(2, 2)) == []
    stats = store.stats
    assert (stats.requests, stats.hits) == (2, 2)
    assert (stats.prefetch_reads, stats.prefetch_hits, stats.prefetch_evicted) == (2, 2, 0)
    assert stats.prefetch_bytes == stats.read_bytes == 4 * SPAN


def test_a_prefetch_counts_once(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    prefetch(store, req(1, 4))
    for _ in range(3):
        fetch(store, reader, req(1, 4))
    prefetch(store, req(1, 4))
    fetch(store, reader, req(1, 4))
    assert (store.stats.prefetch_reads, store.stats.prefetch_hits) == (1, 1)


def test_a_prefetch_that_is_still_being_read_is_a_hit(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    reader.hold(key(1))
    store.prefetch([req(1, 4)])
    reader.wait_for(key(1))
    with store.acquire([req(1, 4)]) as lease:
        reader.release()
        receive(reader, lease.batches())
    assert reader.calls == [(key(1), 0, 3)]
    assert (store.stats.hits, store.stats.prefetch_hits) == (1, 1)


def test_a_prefetch_at_too_low_a_tier_leaves_the_rest_to_be_read(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    prefetch(store, req(1, 2))
    assert fetch(store, reader, req(1, 4)) == [(key(1), 1, 2)]
    assert (store.stats.hits, store.stats.prefetch_hits) == (0, 1)


def test_a_prefetch_promotes_what_is_resident(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    fetch(store, reader, req(1, 2))
    prefetch(store, req(1, 4))
    assert reader.calls[1:] == [(key(1), 1, 2)]
    assert fetch(store, reader, req(1, 4)) == []


def test_planes_above_those_requested_change_nothing(make: StoreFactory) -> None:
    store, reader = make(segments=96)  # room for all
    fetch(store, reader, req(1, 2))
    prefetch(store, req(1, 4))
    assert fetch(store, reader, req(1, 2)) == [] and store.stats.prefetch_hits == 0
    prefetch(store, req(2, 2))
    prefetch(store, req(2, 4))
    fetch(store, reader, req(2, 3))
    assert (store.stats.prefetch_reads, store.stats.prefetch_hits) == (3, 2)


def test_a_prefetch_that_has_not_begun_is_cancelled_by_the_next_and_its_memory_freed(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.prefetch([req(e, 4) for e in range(5)])
    reader.wait_for(key(0), key(1))
    assert store.resident_bytes() == 15 * SPAN
    store.prefetch([])
    assert store.resident_bytes() == 6 * SPAN
    assert (store.stats.prefetch_reads, store.stats.prefetch_bytes) == (2, 6 * SPAN)
    assert store.stats.read_bytes == 6 * SPAN
    reader.release()
    assert fetch(store, reader, *(req(e, 4) for e in range(10))) != []
    assert [c.expert for c in reader.calls].count(key(2)) == 1
    assert (store.stats.prefetch_hits, store.stats.prefetch_evicted) == (2, 0)


def test_prefetch_evicts_nothing_that_is_needed_now(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for _ in range(5):
        prefetch(store, req(15, 4))
        fetch(store, reader, req(15, 4))
    for expert in range(14):  # 15 is evicted, but its uses count
        for _ in range(6):
            fetch(store, reader, req(expert, 2))
    fetch(store, reader, *(req(e, 2) for e in range(9)))
    for _ in range(4):
        fetch(store, reader, req(15, 4))
    needed = [ExpertRequest(expert, 2) for expert in store.resident()]
    store.prefetch([req(14, 4), req(9, 2)], needed)
    assert fetch(store, reader, *needed) == []


@pytest.mark.parametrize("needed", [True, False])
def test_prefetch_displaces_what_is_used_least_unless_it_is_needed_now(make: StoreFactory, needed: bool) -> None:
    store, reader = make(segments=9)
    for _ in range(4):
        for expert in range(1, 9):
            fetch(store, reader, req(expert, 2))
    fetch(store, reader, req(0, 2))
    now = [req(0, 2)] if needed else []
    store.prefetch([req(15, 2)], now)  # never used, but soon
    wait_until(lambda: reader.calls[-1].expert == key(15))
    assert (fetch(store, reader, req(0, 2)) == []) == needed
    assert store.stats.prefetch_reads == 1


def test_a_guess_that_does_not_fit_whole_takes_no_memory(make: StoreFactory) -> None:
    store, reader = make(segments=10)
    now = [req(expert, 2) for expert in range(8)]
    fetch(store, reader, *now)
    store.prefetch([req(15, 4)], now)
    assert store.resident_bytes() == 8 * SPAN
    assert fetch(store, reader, req(8, 2), req(9, 2)) != []
    assert store.stats.evictions == 0


def test_prefetch_reads_what_there_is_time_for(make: StoreFactory) -> None:
    store, _ = make(arena_bytes=1 << 20)
    guesses = [req(expert) for expert in range(8)]
    prefetch(store, req(9))
    size = store.stats.prefetch_bytes
    for reads_that_fit, reads in ((0.0, 0), (0.25, 1), (1.25, 3), (None, 4)):
        before, rate = store.stats.prefetch_reads, store.read_bytes_per_s
        assert rate is not None
        # What comes in too late is still read earlier, so more is read than fits.
        idle_s = None if reads_that_fit is None else 2 * reads_that_fit * size / rate / IDLE_TIMES
        store.prefetch(guesses, (), idle_s)
        store.drain()
        assert store.stats.prefetch_reads - before == reads


def test_as_many_reads_as_agreed_are_in_flight(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    keys = [key(e) for e in range(IN_FLIGHT)]
    reader.hold(*keys)
    store.prefetch([ExpertRequest(k, 4) for k in keys] + [req(9)])
    reader.wait_for(*keys)
    assert len(reader.calls) == IN_FLIGHT


# Preload


def test_what_is_preloaded_is_a_hit(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    store.preload([req(1), req(2, 2)])
    fetch(store, reader, req(1), req(2, 2))
    assert set(reader.calls) == {(key(1), 0, 3), (key(2), 0, 1)} and len(reader.calls) == 2
    assert fetch(store, reader, req(1), req(2, 2)) == []
    assert (store.stats.hits, store.stats.background_bytes) == (4, 4 * SPAN)


def test_preloading_takes_the_first_as_far_as_there_is_room(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    store.preload([req(expert) for expert in range(9)])
    store.drain()
    assert {call.expert for call in reader.calls} == {key(0), key(1), key(2)} and len(reader.calls) == 3
    assert store.resident_bytes() == 9 * SPAN and store.stats.evictions == 0


def test_what_is_read_in_the_background_displaces_nothing_that_is_used_as_much(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for expert in range(10):
        fetch(store, reader, req(expert, 2))
    store.preload([req(0, 2)])  # it had to go for the last, and was used once like all others
    assert store.stats.background_bytes == 0
    assert fetch(store, reader, *(req(e, 2) for e in range(1, 10))) == []
    assert store.stats.evictions == 1


def test_demands_and_prefetches_go_before_what_is_preloaded_and_take_its_room(make: StoreFactory) -> None:
    store, reader = make(segments=18)
    reader.hold(key(0), key(1))
    store.preload([req(expert) for expert in range(6)])
    reader.wait_for(key(0), key(1))
    with store.acquire([req(9)]) as lease:  # in place of 5, which nobody has begun to read
        store.prefetch([req(10)], [req(9)])  # in place of 4
        reader.release()
        receive(reader, lease.batches())
    wait_until(lambda: len(reader.calls) == 6)
    assert {call.expert for call in reader.calls[2:4]} == {key(9), key(10)}
    assert {call.expert for call in reader.calls} == {key(e) for e in (0, 1, 2, 3, 9, 10)}
    assert store.stats.evictions == 0 and store.stats.background_bytes == 4 * 3 * SPAN


def test_what_is_being_preloaded_becomes_urgent_where_it_is_demanded(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.preload([req(expert) for expert in range(8)])
    reader.wait_for(key(0), key(1))
    with store.acquire([req(7)]) as lease:
        reader.release()
        receive(reader, lease.batches())
    wait_until(lambda: len(reader.calls) >= 4)
    assert key(7) in {call.expert for call in reader.calls[2:4]} and store.stats.hits == 1


def test_a_background_read_that_is_requested_now_is_not_cancelled_for_room(make: StoreFactory) -> None:
    store, reader = make(segments=18)
    reader.hold(key(0), key(1))
    store.preload([req(expert) for expert in range(6)])
    reader.wait_for(key(0), key(1))
    threading.Timer(0.05, reader.release).start()
    fetch(store, reader, req(9), req(5), req(4))
    assert store.stats.hits == 2


def test_prefetch_makes_what_is_read_in_the_background_more_urgent(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.preload([req(expert) for expert in range(6)])
    reader.wait_for(key(0), key(1))
    store.prefetch([req(5)])
    reader.release()
    wait_until(lambda: len(reader.calls) == 6)
    assert key(5) in {call.expert for call in reader.calls[2:4]}


# Promotion


def test_a_promotion_reads_only_refinement_planes_and_only_in_place_of_what_is_used_less(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, req(1, 2), req(2, 3))
    store.promote([req(1, 4), req(2, 4)])
    store.drain()
    assert {tuple(call) for call in reader.calls[2:]} == {(key(1), 1, 2), (key(2), 2, 1)}
    assert store.resident_tier(req(1)) == store.resident_tier(req(2)) == 4
    for _ in range(3):
        fetch(store, reader, req(3, 4))
    store.promote([req(4, 4)])  # requested once, the others as often or more
    assert store.resident_bytes() == 9 * SPAN and store.resident_tier(req(1)) == 4
    for _ in range(4):
        store.promote([req(4, 4)])
    store.drain()
    assert store.resident_tier(req(4)) > 0


def test_a_promotion_that_failed_is_raised_where_it_is_requested_again(make: StoreFactory) -> None:
    """Nobody waits for it, so the error would not be seen otherwise."""
    store, reader = make(segments=9)
    fetch(store, reader, req(1, 2), req(2, 2))
    reader.failing[key(1)] = broken(1)
    store.promote([req(1, 4)])
    store.drain()
    assert store.resident_tier(req(1)) == 2
    store.promote([req(2, 4)])
    with pytest.raises(DymoeError) as caught:
        store.promote([req(1, 4)])
    assert caught.value is reader.failing[key(1)]
    assert store.resident_tier(req(1, 2)) == 2


def test_a_promotion_that_failed_and_was_read_since_is_forgotten(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, req(1, 2))
    reader.failing[key(1)] = broken(1)
    store.promote([req(1, 4)])
    store.drain()
    assert store.resident_tier(req(1)) == 2
    reader.failing.clear()
    fetch(store, reader, req(1, 3))
    store.promote([req(1, 4)])
    store.drain()
    assert store.resident_tier(req(1)) == 4


# What is demanded goes first


def test_what_is_read_at_too_low_a_tier_holds_up_no_other(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    fetch(store, reader, req(5))
    reader.hold(key(1))
    store.prefetch([req(1, 2)])
    reader.wait_for(key(1))
    with store.acquire([req(1, 4), req(2), req(5)]) as lease:
        reader.wait_for(key(2))
        delivered = one_by_one(lease.batches())
        assert {next(delivered)[0] for _ in range(2)} == {req(2), req(5)}
        reader.release()
        request, at = next(delivered)
        check(reader, request, at(request.tier))
        assert request == req(1, 4) and not list(delivered)


def test_demanded_reads_overtake_prefetches(make: StoreFactory) -> None:
    store, reader = make(segments=40)
    reader.hold(key(0), key(1))
    store.prefetch([req(e, 4) for e in (0, 1, 2, 3)])
    reader.wait_for(key(0), key(1))
    with store.acquire([req(8, 4), req(9, 4)]) as lease:
        reader.release()
        receive(reader, lease.batches())
    reader.wait_for(key(2), key(3))
    assert {c.expert for c in reader.calls[2:4]} == {key(8), key(9)}


def test_a_prefetch_that_is_demanded_overtakes_the_others(make: StoreFactory) -> None:
    store, reader = make(segments=40)
    reader.hold(key(0), key(1))
    store.prefetch([req(e, 4) for e in (0, 1, 2, 3, 4)])
    reader.wait_for(key(0), key(1))
    with store.acquire([req(4, 4)]) as lease:
        reader.release(key(0))
        receive(reader, lease.batches())
    reader.wait_for(key(2), key(3))
    assert [c.expert for c in reader.calls[2:]] == [key(4), key(2), key(3)]


def test_a_demand_cancels_queued_prefetches_where_memory_is_short(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    reader.hold(key(0), key(1))
    store.prefetch([req(e, 4) for e in (0, 1, 2)])
    reader.wait_for(key(0), key(1))
    with store.acquire([req(9, 4)]) as lease:  # takes the room of 2
        reader.release()
        receive(reader, lease.batches())
    assert key(2) not in {c.expert for c in reader.calls}
    assert store.stats.prefetch_reads == 2


def test_a_demand_waits_for_prefetches_that_have_begun_where_memory_is_short(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    reader.hold(key(0), key(1))
    store.prefetch([req(e, 4) for e in (0, 1)])
    reader.wait_for(key(0), key(1))
    threading.Timer(0.05, reader.release).start()
    fetch(store, reader, req(8, 4), req(9, 4), req(10, 4))


def test_a_demand_cancels_queued_prefetches_before_it_evicts_what_is_needed_now(make: StoreFactory) -> None:
    store, reader = make(segments=12)
    resident = [req(e, 2) for e in range(6)]
    fetch(store, reader, *resident)
    reader.hold(key(6, 1), key(7, 1))
    now = [*resident, req(9, 2)]
    with store.acquire(now) as lease:
        store.prefetch([req(e, 2, layer=1) for e in range(6, 12)], now)  # four of these are only queued
        reader.wait_for(key(6, 1), key(7, 1))
        for request, at in one_by_one(lease.batches()):
            check(reader, request, at(request.tier))
            if request == now[4]:  # by now all have been demanded
                reader.release()
    assert [c.expert for c in reader.calls if c.expert.layer == 0] == [*(key(e) for e in range(6)), key(9)]
    assert {request.key for request in resident} <= store.resident() and store.stats.evictions == 0


class EndingReads(Eviction):
    """Lets all reads end once expert 2 is used."""

    threads: SteppedThreads

    def use(self, key: ExpertKey, segments: int, tokens: int = 1, first: int = 0) -> None:
        while key.expert == 2 and self.threads.step():
            pass
        super().use(key, segments, tokens, first)


@pytest.mark.parametrize("failing", [False, True])
def test_a_read_that_ends_while_room_is_made_for_others_is_not_waited_for(make: StoreFactory, failing: bool) -> None:
    """And what kept it from coming is raised at once."""
    threads, eviction = SteppedThreads(), EndingReads((2, 16), 3)
    eviction.threads = threads
    store, reader = make(segments=9, threads=lambda count: threads, eviction=eviction)
    fetch(store, reader, req(5), req(6), req(7, 3))
    store.prefetch([req(1, 2)], [req(5), req(6), req(7, 3)])  # in the room that is left
    assert store.arriving_tier(req(1)) == 2 and not [call for call in reader.calls if call.expert == key(1)]
    if failing:
        reader.failing[key(1)] = broken(1)
        with pytest.raises(DymoeError, match="checksum"), store.acquire([req(1, 2), req(2)]):
            pass
    else:
        with store.acquire([req(1, 2), req(2)]) as lease:  # 2 needs room, and meanwhile the read of 1 ends
            assert lease.pending is not None and [rank for rank, _ in lease.pending.tickets] == [1]
            receive(reader, lease.batches())
    assert not store.leased()
    store.check()
