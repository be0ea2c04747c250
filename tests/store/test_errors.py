"""Reads that fail, stores that end, and counts that start anew: no leak, no hang, nothing silent."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import asdict

import pytest
from helpers import reader_threads
from store_kit import (
    SPAN,
    FakeReader,
    SteppedThreads,
    StoreFactory,
    broken,
    check,
    fetch,
    flat_layout,
    key,
    one_by_one,
    prefetch,
    receive,
    req,
    use_whole,
)

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.store.read_threads import COMPILED_READERS, PYTHON_READERS
from dymoe_runtime.store.request import Read
from dymoe_runtime.store.store import ExpertStore, memory_of

COMPILED = load_kernels().reads
on_compiled_threads = pytest.mark.parametrize("make", [COMPILED], indirect=True, ids=["compiled"])

# Errors


def test_a_read_error_is_raised_as_it_is_instead_of_the_expert(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    reader.failing[key(2)] = broken(2)
    seen = []
    with pytest.raises(DymoeError) as caught, store.acquire([req(1), req(2), req(3)]) as lease:
        for request, at in one_by_one(lease.batches()):
            check(reader, request, at(request.tier))
            seen.append(request.key.expert)
    assert caught.value is reader.failing[key(2)]
    assert 2 not in seen


def test_an_error_of_what_is_leased_is_raised_at_the_end_of_the_lease(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    reader.failing[key(2)] = broken(2)
    for _ in range(4):
        lease = store.acquire([req(1), req(2), req(3)])
        assert lease.pending is not None
        lease.pending.wait()
        with pytest.raises(DymoeError) as caught:
            lease.release()
        assert caught.value is reader.failing[key(2)] and not store.leased()
    reader.failing.clear()
    use_whole(store, reader, [req(1), req(2), req(3)])
    use_whole(store, reader, [req(e, 4, layer=1) for e in range(3)])


def test_an_error_of_the_caller_is_not_hidden_by_one_of_a_read(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    reader.failing[key(2)] = broken(2)
    with pytest.raises(ZeroDivisionError), store.acquire([req(1), req(2)]):
        raise ZeroDivisionError
    assert not store.leased()


def test_after_a_read_error_the_expert_is_read_again(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    reader.failing[key(2)] = broken(2)
    for _ in range(2):
        with pytest.raises(DymoeError):
            fetch(store, reader, req(2))
    reader.failing.clear()
    assert fetch(store, reader, req(2)) == [(key(2), 0, 3)]


def test_a_failed_promotion_leaves_the_planes_below(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, req(2, 2))
    reader.failing[key(2)] = broken(2)
    with pytest.raises(DymoeError):
        fetch(store, reader, req(2, 4))
    assert fetch(store, reader, req(2, 2)) == []
    assert store.resident_bytes() == SPAN


def test_after_read_errors_all_memory_serves_other_experts(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for expert in range(16):
        reader.failing[key(expert)] = broken(expert)
    for expert in range(16):
        with pytest.raises(DymoeError):
            fetch(store, reader, req(expert))
    assert store.resident_bytes() == 0
    fetch(store, reader, *(req(e, 4, layer=1) for e in range(16)))


def test_an_error_while_others_are_being_read_costs_no_memory(make: StoreFactory) -> None:
    """The reads that had begun when a lease ended arrive, and are then like any other."""
    store, reader = make(segments=9)
    for first in range(0, 15, 3):
        reader.failing[key(first)] = broken(first)
        reader.hold(key(first + 1), key(first + 2))
        with pytest.raises(DymoeError):
            fetch(store, reader, *(req(first + i, 4) for i in range(3)))
        reader.release()
    fetch(store, reader, *(req(e, 4, layer=1) for e in range(3)))
    store.check()


def test_a_failed_prefetch_is_silent_where_it_is_not_demanded(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for expert in range(3):
        reader.failing[key(expert)] = broken(expert)
    prefetch(store, *(req(e, 4) for e in range(3)))
    store.prefetch([])
    fetch(store, reader, *(req(e, 4) for e in range(3, 10)))
    assert store.resident() <= {key(e) for e in range(3, 10)}


def test_a_failed_prefetch_is_read_again_where_it_is_demanded(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    reader.failing[key(1)] = DymoeError("once")
    prefetch(store, req(1))
    reader.failing.clear()
    assert fetch(store, reader, req(1)) == [(key(1), 0, 3)]


def test_a_prefetch_that_goes_on_failing_is_raised_where_it_is_demanded(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    reader.failing[key(1)] = broken(1)
    prefetch(store, req(1, 4))
    with pytest.raises(DymoeError) as caught:
        fetch(store, reader, req(1, 4))
    assert caught.value is reader.failing[key(1)]
    assert store.resident_bytes() == 0
    reader.failing.clear()
    assert fetch(store, reader, req(1, 4)) == [(key(1), 0, 3)]


def test_a_failed_prefetch_of_higher_planes_does_no_harm_where_the_lower_are_requested(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, req(1, 2))
    reader.failing[key(1)] = broken(1)
    prefetch(store, req(1, 4))
    assert fetch(store, reader, req(1, 2)) == []


def test_an_error_in_acquire_unpins_what_it_had_pinned(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for round_ in range(3):
        good, bad = 2 * round_, 2 * round_ + 1
        reader.failing[key(bad)] = broken(bad)
        prefetch(store, req(bad, 2))
        with pytest.raises(DymoeError):
            fetch(store, reader, req(good, 4), req(bad, 4))
    fetch(store, reader, *(req(e, 4, layer=1) for e in range(3)))
    assert not store.leased()


def test_an_arena_full_of_experts_in_use_is_an_error_and_passes(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    with store.acquire([req(e, 4) for e in range(2)]), store.acquire([req(5, 2)]):
        with pytest.raises(DymoeError, match=r"in use.*--memory"):
            fetch(store, reader, req(7, 4))  # two segments are free, and it needs three
        store.drain()
    assert store.resident_bytes() <= 7 * SPAN
    fetch(store, reader, req(7, 4), req(8, 4), req(9, 4))


# Ends


@on_compiled_threads
def test_the_books_do_not_grow(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for turn in range(60):
        fetch(store, reader, req(turn % 16), req((turn + 5) % 16))
        store.prefetch([req((turn + 9) % 16)])
    store.drain()
    store.check()
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Read]
    assert len(store.resident()) == 3


def test_ending_a_lease_early_releases_what_it_held(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for layer in (0, 1, 0, 1):
        reader.hold(key(1, layer), key(2, layer))
        with store.acquire([req(e, 4, layer) for e in range(3)]) as lease:
            delivered = one_by_one(lease.batches())
            for expert in range(2):
                request, at = next(delivered)
                check(reader, request, at(request.tier))
                assert request.key == key(expert, layer)
                reader.release(key(1 + expert, layer))
            store.drain()
        assert not store.leased()


def test_ending_a_lease_before_its_first_expert_releases_what_it_held(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    with store.acquire([req(e, 4) for e in range(3)]):
        assert len(store.leased()) == 3
    assert not store.leased()
    fetch(store, reader, *(req(e, 4, layer=1) for e in range(3)))


def test_reads_that_have_begun_when_a_lease_fails_cost_no_memory(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    for first in range(0, 9, 3):
        reader.hold(key(first + 1), key(first + 2))
        lease = store.acquire([req(first + i, 4) for i in range(3)])
        request, at = next(one_by_one(lease.batches()))
        check(reader, request, at(request.tier))
        lease.release(failed=True)
        reader.release()
    fetch(store, reader, *(req(e, 4, layer=1) for e in range(3)))


@pytest.mark.parametrize("threads", [COMPILED, None], ids=["compiled", "python"])
@pytest.mark.parametrize("ending", ["idle", "used", "failed", "ended early", "queued"])
def test_closing_the_store_ends_its_threads(ending: str, threads: object) -> None:
    assert not reader_threads()
    reader = FakeReader(flat_layout())
    store = ExpertStore(reader.layout, (2, 16), reader, 9 * SPAN, memory_of, threads=threads)  # type: ignore[arg-type]
    count = PYTHON_READERS if threads is None else COMPILED_READERS
    assert len(reader_threads(count)) == count
    if ending == "used":
        fetch(store, reader, req(1), req(2))
    if ending == "failed":
        reader.failing[key(1)] = broken(1)
        prefetch(store, req(1))
        with pytest.raises(DymoeError):
            fetch(store, reader, req(2), req(1))
    if ending == "ended early":
        with store.acquire([req(1), req(2), req(3)]) as lease:
            next(lease.batches())
    if ending == "queued":
        reader.hold(key(1), key(2))
        store.prefetch([req(e) for e in (1, 2, 3)])
        reader.wait_for(key(1), key(2))
        threading.Timer(0.05, reader.release).start()
    store.close()
    assert not reader_threads()
    store.close()  # again, to no effect


def test_a_lease_of_a_closed_store_does_not_wait_for_ever(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    reader.hold(key(1), key(2))
    lease = store.acquire([req(1), req(2), req(3)])
    reader.wait_for(key(1), key(2))
    threading.Timer(0.05, reader.release).start()
    store.close()
    with pytest.raises(DymoeError):
        receive(reader, lease.batches())


@on_compiled_threads
def test_memory_stays_as_long_as_a_thread_may_write_to_it(make: StoreFactory) -> None:
    reader = FakeReader(flat_layout())
    reader.hold(key(1))
    store = ExpertStore(reader.layout, (2, 16), reader, 9 * SPAN, memory_of, threads=COMPILED)
    memory = weakref.ref(store.empty_memory)
    store.prefetch([req(1)])
    reader.wait_for(key(1))
    assert not store.close(patience_s=0.05)
    del store
    gc.collect()
    assert memory() is not None
    reader.release()


# Counts


def test_counts_begin_anew_after_a_reset(make: StoreFactory) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, req(1), req(2))
    store.reset_stats()
    assert set(asdict(store.stats).values()) == {0}
    fetch(store, reader, req(1), req(3))
    assert (store.stats.requests, store.stats.hits, store.stats.read_bytes) == (2, 1, 3 * SPAN)


def test_counts_never_fall_below_zero(make: StoreFactory) -> None:
    """Prefetches that were counted before a reset and are cancelled after it."""
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.prefetch([req(e, 4) for e in range(4)])
    reader.wait_for(key(0), key(1))
    store.reset_stats()
    store.prefetch([])
    assert min(asdict(store.stats).values()) >= 0


def test_what_is_queued_counts_once_it_is_read(make: StoreFactory) -> None:
    """Not what is cancelled, nor what was read before a reset."""
    store, reader = make(segments=12)
    reader.hold(key(0), key(1))
    store.preload([req(expert) for expert in range(4)])
    reader.wait_for(key(0), key(1))
    assert store.stats.read_bytes == store.stats.background_bytes == 6 * SPAN
    store.reset_stats()
    threading.Timer(0.05, reader.release).start()
    fetch(store, reader, req(2), req(7), req(8))
    assert store.stats.read_bytes == 9 * SPAN and store.stats.background_bytes == 3 * SPAN
    assert min(asdict(store.stats).values()) >= 0


def test_prefetches_before_a_reset_are_none_after_it(make: StoreFactory) -> None:
    store, reader = make(segments=30)
    prefetch(store, req(1))
    store.reset_stats()
    fetch(store, reader, req(1))
    assert (store.stats.prefetch_reads, store.stats.prefetch_hits) == (0, 0)


class SlowThreads(SteppedThreads):
    """Whoever waits for a read waits for a while."""

    def wait(self, ticket: int) -> None:
        time.sleep(0.05)
        super().wait(ticket)


def test_waiting_for_room_is_waiting(make: StoreFactory) -> None:
    threads = SlowThreads()
    store, reader = make(segments=9, threads=lambda count: threads)
    store.prefetch([req(0), req(1), req(2)])
    threads.step()  # what has begun cannot be cancelled
    fetch(store, reader, req(5), req(6), req(7))
    assert store.stats.wait_s > 0.05
