"""The expert store over a made-up reader: right bytes, few reads, no leak and no hang."""

from __future__ import annotations

import gc
import itertools
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import reader_threads

from dymoe_runtime import eviction as eviction_module
from dymoe_runtime import read_queue
from dymoe_runtime.arena import chunk_bytes
from dymoe_runtime.delivery import WINDOW, Delivered, Want
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.eviction import Eviction
from dymoe_runtime.read_queue import IN_FLIGHT, Read, Source
from dymoe_runtime.read_threads import PythonThreads, read_threads
from dymoe_runtime.residency import Entry
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import ExpertStore, Held, full_arena_bytes, least_arena_bytes
from dymoe_runtime.tiers import RecordLayout, make_layout

# What should come at once has not come.
TIMEOUT_S = 2.0
# A test has hung.
HANG_S = 20.0
SPAN = 256


class Call(NamedTuple):
    """What the reader was asked for."""

    expert: ExpertKey
    first: int
    segments: int


class FakeReader:
    """Fills buffers with bytes that follow from (expert, segment); can be held up, and can fail."""

    def __init__(self, layout: RecordLayout) -> None:
        self.layout = layout
        self.calls: list[Call] = []
        self.failing: dict[ExpertKey, DymoeError] = {}
        self.jitter: random.Random | None = None
        self._held: dict[ExpertKey, threading.Event] = {}
        self._started = threading.Condition()
        self._contents: dict[tuple[ExpertKey, int], np.ndarray] = {}

    def __call__(self, key: ExpertKey, first: int, segments: int) -> Source:
        return Source(-1, Path(), 0, partial(self._fill, key, first))

    def _fill(self, key: ExpertKey, first: int, buffers: Sequence[np.ndarray]) -> None:
        with self._started:
            self.calls.append(Call(key, first, len(buffers)))
            self._started.notify_all()
        if key in self._held:
            assert self._held[key].wait(10 * TIMEOUT_S)
        if self.jitter is not None:
            time.sleep(self.jitter.choice((0, 0, 1e-5, 2e-4)))
        assert [len(buffer) for buffer in buffers] == list(self.layout.segment_spans[first : first + len(buffers)])
        error = self.failing.get(key)  # asked once: the test's thread may clear it meanwhile
        if error is not None:
            for buffer in buffers:
                buffer[:] = 0xEE
            raise error
        for segment, buffer in enumerate(buffers, first):
            buffer[:] = self.content(key, segment)

    def content(self, key: ExpertKey, segment: int) -> np.ndarray:
        if (key, segment) not in self._contents:
            seed = (key.layer * 1000 + key.expert) * 10 + segment
            size = (self.layout.segment_spans[segment],)
            content = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
            self._contents[key, segment] = content
        return self._contents[key, segment]

    def hold(self, *keys: ExpertKey) -> None:
        """Reads of these experts do not end before `release`."""
        self._held.update((key, threading.Event()) for key in keys)

    def release(self, *keys: ExpertKey) -> None:
        for key in keys or tuple(self._held):
            self._held[key].set()

    def wait_for(self, *keys: ExpertKey) -> None:
        """Until a read of each of these experts has begun."""
        with self._started:
            begun = self._started.wait_for(lambda: set(keys) <= {call.expert for call in self.calls}, TIMEOUT_S)
        assert begun, f"no read of all of {keys} began; calls were {self.calls}"


Make = Callable[..., tuple[ExpertStore, FakeReader]]


def flat_layout(tiers: Sequence[int] = (2, 3, 4)) -> RecordLayout:
    """Segments of one size, so that a chunk of the arena is a segment, and room is easily counted."""
    spans = (SPAN,) * len(tiers)
    return RecordLayout(tuple(tiers), {}, spans, spans)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's threads, but for tests that ask for others: the compiled ones call the reader in no exact order."""
    monkeypatch.setattr(read_queue, "read_threads", getattr(request, "param", PythonThreads))


on_compiled_threads = pytest.mark.parametrize("threads", [read_threads], indirect=True, ids=["compiled"])


@pytest.fixture
def make(no_hang: None, threads: None) -> Iterator[Make]:
    """Stores that are closed after the test, whatever it held up."""
    made: list[tuple[ExpertStore, FakeReader]] = []

    def build(
        segments: int = 0,
        layout: RecordLayout | None = None,
        shape: tuple[int, int] = (2, 16),
        arena_bytes: int = 0,
        prior: np.ndarray | None = None,
    ) -> tuple[ExpertStore, FakeReader]:
        layout = layout or flat_layout()
        reader = FakeReader(layout)
        store = ExpertStore(
            layout,
            shape,
            reader,
            arena_bytes or SPAN * segments,
            Eviction(shape, len(layout.ladder), prior=prior, prior_tokens=1.0),
        )
        made.append((store, reader))
        return store, reader

    yield build
    for store, reader in made:
        reader.release()
        store.close()


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that hangs fails, be it in a loop or waiting for a lock."""

    def stop(signum: int, frame: object) -> None:
        raise AssertionError(f"still not done after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def key(expert: int, layer: int = 0) -> ExpertKey:
    return ExpertKey(layer, expert)


def want(expert: int, tier: int = 4, layer: int = 0) -> Want:
    return Want(key(expert, layer), tier)


def check(reader: FakeReader, wanted: Want, at: Callable[[int], list[np.ndarray]]) -> None:
    """All segments of the wanted tier, and their own bytes."""
    segments = at(wanted.tier)
    assert len(segments) == reader.layout.segments_of(wanted.tier)
    for number, segment in enumerate(segments):
        assert np.array_equal(segment, reader.content(wanted.key, number)), f"{wanted.key}, segment {number}"


def receive(reader: FakeReader, delivery: Iterator[list[Delivered]]) -> list[Want]:
    """Check all that is delivered, and say what it was."""
    received = []
    for wanted, at in one_by_one(delivery):
        check(reader, wanted, at)
        received.append(wanted)
    return received


def one_by_one(delivery: Iterator[list[Delivered]]) -> Iterator[Delivered]:
    for batch in delivery:
        yield from batch


def fetch(store: ExpertStore, reader: FakeReader, *wants: Want) -> list[Call]:
    """Fetch and check `wants`; the reads that this took."""
    before = len(reader.calls)
    assert sorted(receive(reader, store.begin(wants))) == sorted(wants)
    return reader.calls[before:]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def look_ahead(store: ExpertStore, reader: FakeReader, *wants: Want) -> None:
    """Look ahead, and wait until all of it has arrived."""
    store.look_ahead(wants)
    wait_until(lambda: not store._memory.reads.pending())


def slots_overlap(store: ExpertStore) -> bool:
    slots = [slot for entry in store._memory.entries.values() for slot in entry.slots]
    spans = sorted((s.place[0], s.place[0] + len(s.memory)) for s in slots)
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))


# Content

LAYOUTS = {
    "flat": flat_layout(),
    "real": make_layout({"gate": (4, 64), "up": (4, 64), "down": (64, 4)}, (2, 3, 4), page=64),
    "four tiers": make_layout({"gate": (5, 70), "up": (5, 70), "down": (70, 5)}, (2, 3, 4, 8), page=128),
    "one tier": make_layout({"gate": (3, 65), "down": (65, 3)}, (4,), page=64),
}
ARENAS: dict[str, Callable[[RecordLayout], int]] = {
    "least": least_arena_bytes,
    "a little more": lambda layout: least_arena_bytes(layout) + 3 * chunk_bytes(layout.segment_spans) + 1,
    "half": lambda layout: max(least_arena_bytes(layout), full_arena_bytes(layout, 48) // 2),
    "all": lambda layout: 1 << 30,
}


def random_wants(rng: random.Random, layout: RecordLayout, most: int) -> list[Want]:
    """Distinct experts of one layer at random tiers, some far more often than others."""
    layer = rng.randrange(3)
    experts = {min(int(rng.expovariate(0.2)), 15) for _ in range(rng.randint(0, most))}
    return [Want(ExpertKey(layer, expert), rng.choice((0, *layout.ladder))) for expert in experts]


def use_at_random(
    store: ExpertStore, reader: FakeReader, seed: int, rounds: int, most: int = 8, closing: bool = False
) -> None:
    """Tokens of random wants and look-ahead; content is checked when it comes and again before it may go."""
    rng = random.Random(seed)
    reader.jitter = random.Random(seed)
    budget = store.arena_bytes
    for _ in range(rounds):
        wants = random_wants(rng, reader.layout, most)
        guesses = random_wants(rng, reader.layout, 6)
        delivery = store.begin(wants)
        if rng.random() < 0.7:
            store.look_ahead(guesses, wants)
        left = set(wants)
        for wanted, at in one_by_one(delivery):
            left.remove(wanted)
            check(reader, wanted, at)
            if rng.random() < 0.2:
                store.look_ahead(random_wants(rng, reader.layout, 6), wants)
            if rng.random() < 0.1:
                assert not slots_overlap(store)
            assert store.resident_bytes() <= budget
            check(reader, wanted, at)
            if closing and rng.random() < 0.1:
                break
        delivery.close()
        store.tick()


@on_compiled_threads
@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_content_is_right_under_random_use(make: Make, name: str, arena: str) -> None:
    """At most as many experts per token as are held at once."""
    layout = LAYOUTS[name]
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=ARENAS[arena](layout))
    assert store.arena_bytes <= ARENAS[arena](layout)
    use_at_random(store, reader, 1, 300, most=WINDOW)
    look_ahead(store, reader)
    stats = store.stats
    assert stats.requests > stats.hits > 0
    assert stats.look_ahead_hits + stats.look_ahead_evicted <= stats.look_ahead_reads
    assert (stats.evictions == 0) == (arena == "all")
    assert stats.read_bytes == sum(sum(layout.segment_spans[c.first : c.first + c.segments]) for c in reader.calls)


@on_compiled_threads
@pytest.mark.parametrize("arena", ARENAS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_content_is_right_where_a_token_wants_more_than_is_held(make: Make, name: str, arena: str) -> None:
    layout = LAYOUTS[name]
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=ARENAS[arena](layout))
    use_at_random(store, reader, 2, 150, most=16)


@on_compiled_threads
@pytest.mark.parametrize("arena", ARENAS)
def test_content_is_right_where_deliveries_end_early(make: Make, arena: str) -> None:
    layout = LAYOUTS["real"]
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=ARENAS[arena](layout))
    use_at_random(store, reader, 3, 150, most=WINDOW, closing=True)


@on_compiled_threads
@pytest.mark.parametrize("name", LAYOUTS)
def test_where_everything_fits_everything_is_read_once(make: Make, name: str) -> None:
    layout = LAYOUTS[name]
    store, reader = make(layout=layout, shape=(3, 16), arena_bytes=1 << 30)
    use_at_random(store, reader, 4, 150, most=16)
    read = [(c.expert, segment) for c in reader.calls for segment in range(c.first, c.first + c.segments)]
    assert len(read) == len(set(read))
    assert store.arena_bytes == full_arena_bytes(layout, 48)
    # A chunk that sizes do not divide wastes some; a layer must still fit in what is about its size.
    assert store.arena_bytes <= 1.5 * 48 * layout.record_bytes


def test_an_expert_may_be_wanted_twice(make: Make) -> None:
    store, reader = make(segments=9)
    assert fetch(store, reader, want(1, 2), want(1, 4), want(1, 3)) == [(key(1), 0, 1), (key(1), 1, 2)]


def test_nothing_wanted_is_nothing_delivered(make: Make) -> None:
    store, reader = make(segments=9)
    assert fetch(store, reader) == []
    assert fetch(store, reader, want(1, 0)) == []
    assert store.resident_bytes() == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_arena_that_is_too_small_is_refused_with_the_least_that_works(name: str) -> None:
    layout = LAYOUTS[name]
    least = least_arena_bytes(layout)
    before = threading.active_count()
    with pytest.raises(DymoeError, match=rf"least.* {least} "):
        ExpertStore(layout, (3, 16), FakeReader(layout), least - 1)
    assert threading.active_count() == before


# Reads


def test_a_hit_reads_nothing(make: Make) -> None:
    store, reader = make(segments=30)
    assert fetch(store, reader, want(1), want(2), want(3)) == [(key(e), 0, 3) for e in (1, 2, 3)]
    assert fetch(store, reader, want(3), want(1), want(2)) == []
    assert (store.stats.requests, store.stats.hits) == (6, 3)
    assert store.stats.read_bytes == 9 * SPAN == store.resident_bytes()


def test_a_lower_tier_of_what_is_resident_is_a_hit(make: Make) -> None:
    store, reader = make(segments=30)
    fetch(store, reader, want(1, 4))
    assert fetch(store, reader, want(1, 3)) == fetch(store, reader, want(1, 2)) == []
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
def test_a_promotion_reads_only_what_is_missing(
    make: Make, tiers: Sequence[int], reads: Sequence[tuple[int, int]]
) -> None:
    store, reader = make(segments=30)
    for tier in tiers:
        fetch(store, reader, want(1, tier))
    assert reader.calls == [(key(1), first, count) for first, count in reads]
    assert store.stats.hits == len(tiers) - len(reads)


def test_the_first_reads_are_under_way_when_begin_returns(make: Make) -> None:
    store, reader = make(segments=30)
    reader.hold(key(1), key(2))
    delivery = store.begin([want(e) for e in (1, 2, 3)])
    reader.wait_for(key(1), key(2))
    reader.release()
    receive(reader, delivery)


@pytest.mark.parametrize("segments", [30, 96], ids=["some room", "room for all"])
def test_what_is_resident_is_delivered_together(make: Make, segments: int) -> None:
    """And counts as hits, whether or not anything could ever be evicted."""
    store, reader = make(segments=segments)
    wants = [want(1, 4), want(2, 2), want(3, 3)]
    assert receive(reader, store.begin(wants))
    before = len(reader.calls)
    (batch,) = store.begin(wants)
    assert [wanted for wanted, _ in batch] == wants
    for wanted, parts in batch:
        check(reader, wanted, parts)
    assert len(reader.calls) == before
    assert (store.stats.requests, store.stats.hits) == (6, 3)
    reader.hold(key(3))
    delivery = store.begin([want(3, 4), want(1, 4)])
    first = next(delivery)
    reader.release()
    assert [[wanted for wanted, _ in batch] for batch in (first, *delivery)] == [[want(1, 4)], [want(3, 4)]]


def test_what_is_there_comes_before_what_is_read(make: Make) -> None:
    """Together, and without waiting; then the others as they come."""
    store, reader = make(arena_bytes=1 << 20)
    fetch(store, reader, want(2), want(4), want(5, 2))
    reader.hold(key(1), key(3))
    delivery = store.begin([want(1), want(2), want(3), want(4), want(5, 2)])
    assert [wanted for wanted, _ in next(delivery)] == [want(2), want(4), want(5, 2)]
    reader.release(key(1), key(3))
    assert {wanted for batch in delivery for wanted, _ in batch} == {want(1), want(3)}


@pytest.mark.parametrize("name", ["real", "four tiers"])
def test_what_is_lent_stays_in_place_while_others_are_read_ahead(make: Make, name: str) -> None:
    """Even where that would be the room for them; the views are those taken before."""
    layout, lent = LAYOUTS[name], 0
    for seed in range(25):
        rng = random.Random(seed)
        arena = least_arena_bytes(layout) + seed % 5 * chunk_bytes(layout.segment_spans)
        store, reader = make(layout=layout, shape=(3, 16), arena_bytes=arena)
        for _ in range(40):
            fetch(store, reader, *random_wants(rng, layout, 3)[:WINDOW])
            there = [
                Want(e.key, layout.ladder[len(e.slots) - 1]) for e in store._memory.entries.values() if e.read is None
            ]
            for batch in store.begin(rng.sample(there, min(2, len(there)))):
                views = [(wanted, at(wanted.tier)) for wanted, at in batch]
                look_ahead(store, reader, *[want(e, rng.choice(layout.ladder), rng.randrange(3)) for e in range(6)])
                for wanted, segments in views:
                    for number, segment in enumerate(segments):
                        assert np.array_equal(segment, reader.content(wanted.key, number))
                lent += len(views)
            store.tick()
    assert lent > 1000


def test_the_tier_at_hand_is_what_need_not_be_waited_for(make: Make) -> None:
    store, reader = make(arena_bytes=1 << 20)
    assert store.tier_at_hand(want(1)) == 0
    fetch(store, reader, want(1, 2), want(2, 3))
    assert [store.tier_at_hand(want(e, tier)) for e, tier in ((1, 4), (2, 4), (2, 2))] == [2, 3, 2]
    reader.hold(key(1))
    delivery = store.begin([want(1, 4)])
    assert store.tier_at_hand(want(1)) == 2
    reader.release(key(1))
    receive(reader, delivery)
    assert store.tier_at_hand(want(1)) == 4


def test_look_ahead_reads_what_there_is_time_for(make: Make) -> None:
    store, reader = make(arena_bytes=1 << 20)
    guesses = [want(expert) for expert in range(8)]
    look_ahead(store, reader, want(9))
    size = store.stats.look_ahead_bytes
    store._memory.reads.bytes_per_s = 10.0 * size  # a tenth of a second for each
    for idle_s, reads in ((0.0, 0), (0.025, 1), (0.125, 3), (None, 4)):
        before = store.stats.look_ahead_reads
        store.look_ahead(guesses, (), idle_s)
        wait_until(lambda: not store._memory.reads.pending())
        assert store.stats.look_ahead_reads - before == reads
        store._memory.reads.bytes_per_s = 10.0 * size  # what was read has changed it


def test_what_will_never_leave_is_at_hand_once_it_is_there(make: Make) -> None:
    store, reader = make(segments=96)  # room for all
    assert store.at_hand([want(1), want(2)]) is None
    fetch(store, reader, want(1, 4), want(2, 3))
    assert store.at_hand([want(1), want(2)]) is None
    before = store.stats.hits
    for tier in 2, 3, 2:
        one, two = store.at_hand([want(1, tier), want(2, tier)]) or ()
        check(reader, want(1, tier), lambda _: one)  # noqa: B023
        check(reader, want(2, tier), lambda _: two)  # noqa: B023
    assert store.stats.hits == before + 6 and not any(entry.pins for entry in store._memory.entries.values())


def test_what_is_at_hand_stays_until_the_next_are_asked_for(make: Make) -> None:
    store, reader = make(segments=9)
    now = [want(1), want(2)]
    fetch(store, reader, *now)
    found = store.at_hand(now)
    assert found is not None and store.stats.hits == 2
    store.look_ahead([want(e) for e in range(3, 9)])  # there is room for one
    wait_until(lambda: not store._memory.reads.pending())
    for wanted, segments in zip(now, found, strict=True):
        check(reader, wanted, lambda _: segments)  # noqa: B023
    fetch(store, reader, want(5), want(6), want(7))
    assert store.at_hand(now) is None


def have(store: ExpertStore, reader: FakeReader, wants: Sequence[Want]) -> None:
    """Ask for `wants` as the experts of a token are, and check all of them."""
    held = store.hold(wants)
    if held is None:
        assert sorted(receive(reader, store.begin(wants))) == sorted(wants)
        return
    finish(store, held)
    for wanted, segments in zip(wants, held.experts, strict=True):
        check(reader, wanted, lambda _: segments)  # noqa: B023


def finish(store: ExpertStore, held: Held) -> None:
    if held.coming is not None:
        held.coming.wait()
    store.arrived(held)


def test_what_is_held_comes_in_its_place(make: Make) -> None:
    """What is there, what is being read and what is not, in order; all of it stays until the next are asked for."""
    store, reader = make(segments=12)
    fetch(store, reader, want(1), want(2, 2))
    reader.hold(key(2), key(3))
    store.look_ahead([want(3)])
    reader.wait_for(key(3))
    wants = [want(3), want(1), want(2, 3)]
    held = store.hold(wants)
    assert held is not None and held.coming is not None and [rank for rank, _ in held.coming.tickets] == [0, 2]
    store.look_ahead([want(e) for e in range(4, 9)], wants)  # there is room for one
    reader.release()
    finish(store, held)
    wait_until(lambda: not store._memory.reads.pending())
    for wanted, segments in zip(wants, held.experts, strict=True):
        check(reader, wanted, lambda _: segments)  # noqa: B023
    stats = store.stats
    assert (stats.requests, stats.hits, stats.look_ahead_hits) == (5, 2, 1) and stats.wait_s > 0
    assert store.at_hand(wants) == held.experts and store.stats.hits == 5
    store.at_hand([want(9)])
    assert not any(entry.pins for entry in store._memory.entries.values())


def test_what_needs_more_than_a_read_each_is_not_held(make: Make) -> None:
    store, reader = make(segments=9)
    assert store.hold([want(e) for e in range(WINDOW + 1)]) is None  # more than can be had at once
    reader.hold(key(1))
    store.look_ahead([want(1, 2)])
    reader.wait_for(key(1))
    assert store.hold([want(1, 4)]) is None
    assert store.hold([want(1, 2)]) is not None
    reader.release()
    serial = ExpertStore(reader.layout, (2, 16), reader, 9 * SPAN, overlap=False)
    assert serial.hold([want(1)]) is None
    serial.close()


def test_an_error_of_what_is_held_is_raised_once_it_has_come(make: Make) -> None:
    store, reader = make(segments=9)
    reader.failing[key(2)] = broken(2)
    for _ in range(4):
        held = store.hold([want(1), want(2), want(3)])
        assert held is not None
        with pytest.raises(DymoeError) as caught:
            finish(store, held)
        assert caught.value is reader.failing[key(2)]
    reader.failing.clear()
    have(store, reader, [want(1), want(2), want(3)])
    have(store, reader, [want(e, 4, layer=1) for e in range(3)])


def test_a_read_that_ends_while_room_is_made_for_others_is_not_waited_for(make: Make) -> None:
    """And what kept it from coming is raised at once."""
    for failing in False, True:
        store, reader = make(segments=9)
        fetch(store, reader, want(5), want(6), want(7))
        reader.hold(key(1))
        store.look_ahead([want(1)], [want(6), want(7)])
        reader.wait_for(key(1))
        demand, asked = store._delivery.demand, []

        def demanded(wanted: Want, all_wanted: set[ExpertKey]) -> Entry:
            entry = demand(wanted, all_wanted)  # noqa: B023
            if not asked:  # noqa: B023
                if failing:  # noqa: B023
                    reader.failing[key(1)] = broken(1)  # noqa: B023
                reader.release(key(1))  # noqa: B023
                wait_until(lambda: not store._memory.reads.pending())  # noqa: B023
            asked.append(wanted)  # noqa: B023
            return entry

        store._delivery.demand = demanded  # type: ignore[method-assign]
        if failing:
            with pytest.raises(DymoeError, match="checksum"):
                store.hold([want(1), want(2)])
        else:
            held = store.hold([want(1), want(2)])
            assert held is not None and held.coming is not None and [rank for rank, _ in held.coming.tickets] == [1]
            finish(store, held)
        assert len(asked) == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_held_is_counted_and_kept_as_what_is_delivered(make: Make, name: str) -> None:
    """The same requests, by either way, leave the same in memory."""
    layout = LAYOUTS[name]
    for seed in range(10):
        arena = 8 * least_arena_bytes(layout) + 3 * seed * chunk_bytes(layout.segment_spans)
        stores = [make(layout=layout, shape=(3, 16), arena_bytes=arena) for _ in range(2)]
        rng = random.Random(seed)
        for _ in range(60):
            wants = [wanted for wanted in random_wants(rng, layout, 8) if wanted.tier]
            have(*stores[0], wants)
            fetch(*stores[1], *wants)
            for store, _ in stores:
                store.tick()
        first, second = ((store.stats, store.resident_bytes(), set(store._memory.entries)) for store, _ in stores)
        first[0].wait_s = second[0].wait_s = 0.0
        assert first == second and 0 < first[0].hits < first[0].requests


class Table:
    """Keeps what a store shows, which must be what it says at any time."""

    def __init__(self, reader: FakeReader) -> None:
        self.reader = reader
        self.shown: dict[tuple[ExpertKey, int], list[np.ndarray]] = {}
        self.removed = 0

    def put(self, key: ExpertKey, tier: int, prepared: list[np.ndarray]) -> None:
        assert (key, tier) not in self.shown
        self.shown[key, tier] = prepared

    def remove(self, key: ExpertKey, tier: int) -> None:
        del self.shown[key, tier]
        self.removed += 1

    def check(self) -> None:
        for (key, tier), segments in self.shown.items():
            check(self.reader, Want(key, tier), lambda _: segments)  # noqa: B023


@on_compiled_threads
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_shown_is_there(make: Make, name: str) -> None:
    """At any time, whatever else is read, leaves or moves; and using it is counted as asking for it is."""
    layout, used, removed = LAYOUTS[name], 0, 0
    for seed in range(6):
        rng = random.Random(seed)
        arena = least_arena_bytes(layout) * (1 + seed) + seed * chunk_bytes(layout.segment_spans)
        store, reader = make(layout=layout, shape=(3, 16), arena_bytes=arena)
        reader.jitter = random.Random(seed)
        table = Table(reader)
        store.show(table)
        for turn in range(60):
            wants = [wanted for wanted in random_wants(rng, layout, 5) if wanted.tier]
            before = store.stats.requests, store.stats.hits
            if wants and all((wanted.key, wanted.tier) in table.shown for wanted in wants):
                store.used(wants)
                used += len(wants)
                assert (store.stats.requests, store.stats.hits) == tuple(n + len(wants) for n in before)
            else:
                reader.failing = {key(rng.randrange(16)): broken(0)} if rng.random() < 0.1 else {}
                try:
                    have(store, reader, wants)
                except DymoeError:
                    reader.failing = {}
            table.check()
            if rng.random() < 0.5:
                store.look_ahead(random_wants(rng, layout, 6), wants)
            if turn % 20 == 10:
                store.resize(arena - rng.randrange(3) * chunk_bytes(layout.segment_spans))
            table.check()
            store.tick()
        removed += table.removed
        assert {k for k, _ in table.shown} <= set(store._memory.entries)
        shown = {(e.key, tier) for e in store._memory.entries.values() for tier in layout.ladder if e.shown >> tier & 1}
        assert shown == set(table.shown)
    assert used > 15 and removed > 15


def test_using_what_is_shown_keeps_it_as_asking_for_it_does(make: Make) -> None:
    for shows in False, True:
        store, reader = make(segments=9)
        table = Table(reader)
        store.show(table)
        for _ in range(5):
            have(store, reader, [want(1)])
            store.tick()
        have(store, reader, [want(2)])
        have(store, reader, [want(3)])
        for _ in range(10):
            if shows:
                store.used([want(2)])
            else:
                have(store, reader, [want(2)])
            store.tick()
        have(store, reader, [want(4)])
        have(store, reader, [want(5)])
        assert key(2) in store._memory.entries and store.stats.hits == 14


def test_what_was_prepared_serves_until_a_segment_leaves(make: Make) -> None:
    store, reader = make(segments=9)
    asked = []
    prepare = store._memory._prepare
    store._memory._prepare = lambda tier, places: asked.append(tier) or prepare(tier, places)
    for _ in range(2):
        fetch(store, reader, want(1, 4), want(2, 2))
    assert asked == [4, 2]
    for _ in range(3):
        fetch(store, reader, want(3, 4), want(4, 4), want(5, 4))  # in all the room there is
    assert asked == [4, 2, 4, 4, 4]
    fetch(store, reader, want(1, 4))
    assert asked == [4, 2, 4, 4, 4, 4]


def test_a_layer_is_held_once_all_of_it_is_resident_and_until_it_is_evicted(make: Make) -> None:
    store, reader = make(segments=48)
    fetch(store, reader, *(want(e, 4) for e in range(15)), want(15, 3))
    assert store.holds(0, 2) and store.holds(0, 3) and not store.holds(0, 4)
    fetch(store, reader, want(15, 4))
    assert store.holds(0, 4) and not store.holds(1, 2)
    fetch(store, reader, want(0, 2, layer=1))
    assert store.holds(0, 2) and not store.holds(0, 4)


def test_as_many_reads_as_agreed_are_in_flight(make: Make) -> None:
    store, reader = make(segments=30)
    keys = [key(e) for e in range(IN_FLIGHT)]
    reader.hold(*keys)
    store.look_ahead([Want(k, 4) for k in keys] + [want(9)])
    reader.wait_for(*keys)
    assert len(reader.calls) == IN_FLIGHT


# Eviction


class PlainStore:
    """What the store must read, one expert at a time, for segments of one size: least used last segment goes first."""

    def __init__(self, segments: int, growth: float = eviction_module.GROWTH) -> None:
        self.free, self.growth, self.weight = segments, growth, 1.0
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
        self.weight *= self.growth


@pytest.mark.parametrize("segments", [9, 14, 40])
@pytest.mark.parametrize("seed", range(3))
def test_reads_and_evictions_equal_those_of_a_plain_store(make: Make, seed: int, segments: int) -> None:
    store, reader = make(segments=segments)
    plain, rng = PlainStore(segments), random.Random(seed)
    for _ in range(250):
        wanted = want(min(int(rng.expovariate(0.2)), 15), rng.choice((2, 2, 3, 4)), rng.randrange(2))
        assert fetch(store, reader, wanted) == plain.fetch(wanted.key, store.layout.segments_of(wanted.tier))
        if rng.random() < 0.5:
            store.tick()
            plain.tick()
    assert store.resident_bytes() == SPAN * sum(plain.resident.values())


def test_refinement_planes_of_little_used_experts_go_before_base_planes(make: Make) -> None:
    store, reader = make(segments=12)
    fetch(store, reader, *(want(e, 4) for e in (0, 1, 2, 3)))
    fetch(store, reader, *(want(e, 2) for e in (0, 1, 2)))  # now base planes were used twice, but that of 3 once
    fetch(store, reader, want(3, 4))
    fetch(store, reader, *(want(e, 2) for e in range(4, 10)))
    # Six segments had to go: the refinement planes of 0, 1 and 2.
    assert fetch(store, reader, want(3, 4), *(want(e, 2) for e in (0, 1, 2))) == []
    assert store.stats.evictions == 6


def test_counts_survive_eviction(make: Make) -> None:
    store, reader = make(segments=9)
    for _ in range(3):
        fetch(store, reader, want(0, 2))
    for expert in range(1, 10):
        for _ in range(4):
            fetch(store, reader, want(expert, 2))
    assert fetch(store, reader, want(0, 2)) != []  # it had been evicted
    fetch(store, reader, want(0, 2))  # its fifth use
    fetch(store, reader, want(10, 2))
    fetch(store, reader, want(11, 2))  # in place of 10, which was used once
    assert fetch(store, reader, want(0, 2)) == []
    assert fetch(store, reader, want(10, 2)) != []


def test_no_more_leaves_than_must(make: Make) -> None:
    store, reader = make(segments=11)
    fetch(store, reader, want(1), want(2), want(3))
    fetch(store, reader, want(4))  # there was room for two segments of three
    assert (store.stats.evictions, store.resident_bytes()) == (1, 11 * SPAN)


def test_what_is_worth_as_little_leaves_together(make: Make) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, want(1), want(2), want(3))
    for _ in range(3):
        fetch(store, reader, want(2, 2), want(3))
    assert fetch(store, reader, want(4, 3)) == [(key(4), 0, 2)]  # in place of refinements of 1 and 2, used once
    assert store.resident_bytes() == 9 * SPAN
    assert fetch(store, reader, want(2, 2), want(3)) == []


def test_uses_fade_as_tokens_pass(make: Make) -> None:
    store, reader = make(segments=9)
    for _ in range(3):
        fetch(store, reader, want(0, 2))
    for _ in range(200):
        store.tick()
    for expert in range(1, 10):
        fetch(store, reader, want(expert, 2))
    assert fetch(store, reader, *(want(e, 2) for e in range(1, 10))) == []


def test_counts_are_rescaled_before_they_overflow(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = []
    for limit in (1e30, 1.5):
        monkeypatch.setattr(eviction_module, "RESCALE_AT", limit)
        store, reader = make(segments=9)
        rng = random.Random(0)
        for _ in range(200):
            fetch(store, reader, want(rng.randrange(8), rng.choice((2, 3, 4))))
            store.tick()
        logs.append(reader.calls)
        assert store._eviction._weight <= limit
    assert logs[0] == logs[1]


def test_a_prior_makes_early_evictions_less_blind(make: Make) -> None:
    prior = np.zeros((2, 16))
    prior[0, 0] = 5.0
    store, reader = make(segments=9, prior=prior)
    for expert in range(10):
        fetch(store, reader, want(expert, 2))
    assert fetch(store, reader, want(0, 2)) == []
    store, reader = make(segments=9)
    for expert in range(10):
        fetch(store, reader, want(expert, 2))
    assert fetch(store, reader, want(0, 2)) != []


def test_what_is_delivered_stays_until_the_next_is_asked_for(make: Make) -> None:
    store, reader = make(segments=9)
    for expert in range(8):
        fetch(store, reader, want(expert, 2))

    for wanted, segments in one_by_one(store.begin([want(e, 4) for e in range(8, 16)])):
        store.look_ahead([want(e, 4, layer=1) for e in range(5)])
        check(reader, wanted, segments)


def test_an_expert_that_is_promoted_does_not_lose_the_planes_it_has(make: Make) -> None:
    """Even where all that may be evicted is wanted by the same token, and it is the least used of it."""
    store, reader = make(segments=9)
    fetch(store, reader, want(0, 2), *(want(e, 3) for e in (1, 2, 3, 4)))
    for _ in range(3):
        fetch(store, reader, *(want(e, 3) for e in (1, 2, 3, 4)))
    fetch(store, reader, want(0, 4), *(want(e, 3) for e in (1, 2, 3, 4)))


# Look-ahead


def test_a_look_ahead_that_is_used_is_a_hit(make: Make) -> None:
    store, reader = make(segments=30)
    look_ahead(store, reader, want(1, 4), want(2, 2))
    assert reader.calls == [(key(1), 0, 3), (key(2), 0, 1)]
    assert fetch(store, reader, want(1, 4), want(2, 2)) == []
    stats = store.stats
    assert (stats.requests, stats.hits) == (2, 2)
    assert (stats.look_ahead_reads, stats.look_ahead_hits, stats.look_ahead_evicted) == (2, 2, 0)
    assert stats.look_ahead_bytes == stats.read_bytes == 4 * SPAN


def test_a_look_ahead_counts_once(make: Make) -> None:
    store, reader = make(segments=30)
    look_ahead(store, reader, want(1, 4))
    for _ in range(3):
        fetch(store, reader, want(1, 4))
    look_ahead(store, reader, want(1, 4))
    fetch(store, reader, want(1, 4))
    assert (store.stats.look_ahead_reads, store.stats.look_ahead_hits) == (1, 1)


def test_a_look_ahead_on_its_way_is_a_hit(make: Make) -> None:
    store, reader = make(segments=30)
    reader.hold(key(1))
    store.look_ahead([want(1, 4)])
    reader.wait_for(key(1))
    delivery = store.begin([want(1, 4)])
    reader.release()
    receive(reader, delivery)
    assert reader.calls == [(key(1), 0, 3)]
    assert (store.stats.hits, store.stats.look_ahead_hits) == (1, 1)


def test_a_look_ahead_at_too_low_a_tier_leaves_the_rest_to_be_read(make: Make) -> None:
    store, reader = make(segments=30)
    look_ahead(store, reader, want(1, 2))
    assert fetch(store, reader, want(1, 4)) == [(key(1), 1, 2)]
    assert (store.stats.hits, store.stats.look_ahead_hits) == (0, 1)


def test_a_look_ahead_promotes_what_is_resident(make: Make) -> None:
    store, reader = make(segments=30)
    fetch(store, reader, want(1, 2))
    look_ahead(store, reader, want(1, 4))
    assert reader.calls[1:] == [(key(1), 1, 2)]
    assert fetch(store, reader, want(1, 4)) == []


def test_a_look_ahead_that_is_evicted_is_waste(make: Make) -> None:
    store, reader = make(segments=9)
    look_ahead(store, reader, want(15, 2))
    for expert in range(9):
        fetch(store, reader, want(expert, 2))
    assert (store.stats.look_ahead_hits, store.stats.look_ahead_evicted) == (0, 1)
    assert fetch(store, reader, want(15, 2)) == [(key(15), 0, 1)]
    assert store.stats.look_ahead_hits == 0


def test_a_look_ahead_that_was_not_started_is_taken_back_and_its_memory_freed(make: Make) -> None:
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.look_ahead([want(e, 4) for e in range(5)])
    reader.wait_for(key(0), key(1))
    assert store.resident_bytes() == 15 * SPAN
    store.look_ahead([])
    assert store.resident_bytes() == 6 * SPAN
    assert (store.stats.look_ahead_reads, store.stats.look_ahead_bytes) == (2, 6 * SPAN)
    assert store.stats.read_bytes == 6 * SPAN
    reader.release()
    assert fetch(store, reader, *(want(e, 4) for e in range(10))) != []
    assert [c.expert for c in reader.calls].count(key(2)) == 1
    assert (store.stats.look_ahead_hits, store.stats.look_ahead_evicted) == (2, 0)


def test_look_ahead_evicts_nothing_that_is_needed_now(make: Make) -> None:
    store, reader = make(segments=9)
    for _ in range(5):
        look_ahead(store, reader, want(15, 4))
        fetch(store, reader, want(15, 4))
    for expert in range(14):  # 15 is evicted, but its uses count
        for _ in range(6):
            fetch(store, reader, want(expert, 2))
    fetch(store, reader, *(want(e, 2) for e in range(9)))
    for _ in range(4):
        fetch(store, reader, want(15, 4))
    needed = [k for k, entry in store._memory.entries.items() if entry.slots]
    store.look_ahead([want(14, 4), want(9, 2)], [Want(k, 2) for k in needed])
    assert fetch(store, reader, *(Want(k, 2) for k in needed)) == []


@pytest.mark.parametrize("needed", [True, False])
def test_look_ahead_displaces_what_is_used_least_unless_it_is_needed_now(make: Make, needed: bool) -> None:
    store, reader = make(segments=9)
    for _ in range(4):
        for expert in range(1, 9):
            fetch(store, reader, want(expert, 2))
    fetch(store, reader, want(0, 2))
    now = [want(0, 2)] if needed else []
    store.look_ahead([want(15, 2)], now)  # never used, but soon
    wait_until(lambda: reader.calls[-1].expert == key(15))
    assert (fetch(store, reader, want(0, 2)) == []) == needed
    assert store.stats.look_ahead_reads == 1


def test_what_is_read_in_the_background_displaces_nothing_that_is_used_as_much(make: Make) -> None:
    store, reader = make(segments=9)
    for expert in range(10):
        fetch(store, reader, want(expert, 2))
    store.preload([want(0, 2)])  # it had to go for the last, and was used once like all others
    assert store.stats.background_bytes == 0
    assert fetch(store, reader, *(want(e, 2) for e in range(1, 10))) == []
    assert store.stats.evictions == 1


def test_a_guess_that_does_not_fit_whole_takes_no_memory(make: Make) -> None:
    store, reader = make(segments=10)
    now = [want(expert, 2) for expert in range(8)]
    fetch(store, reader, *now)
    store.look_ahead([want(15, 4)], now)
    assert store.resident_bytes() == 8 * SPAN
    assert fetch(store, reader, want(8, 2), want(9, 2)) != []
    assert store.stats.evictions == 0


# What is read before anybody wants it


def test_what_is_preloaded_is_a_hit(make: Make) -> None:
    store, reader = make(segments=30)
    store.preload([want(1), want(2, 2)])
    fetch(store, reader, want(1), want(2, 2))
    assert set(reader.calls) == {(key(1), 0, 3), (key(2), 0, 1)} and len(reader.calls) == 2
    assert fetch(store, reader, want(1), want(2, 2)) == []
    assert (store.stats.hits, store.stats.background_bytes) == (4, 4 * SPAN)


def test_preloading_takes_the_first_as_far_as_there_is_room(make: Make) -> None:
    store, reader = make(segments=9)
    store.preload([want(expert) for expert in range(9)])
    wait_until(lambda: len(reader.calls) == 3)
    wait_until(lambda: not store._memory.reads.pending())
    assert {call.expert for call in reader.calls} == {key(0), key(1), key(2)}
    assert store.resident_bytes() == 9 * SPAN and store.stats.evictions == 0


def test_demands_and_look_ahead_go_before_what_is_preloaded_and_take_its_room(make: Make) -> None:
    store, reader = make(segments=18)
    reader.hold(key(0), key(1))
    store.preload([want(expert) for expert in range(6)])
    reader.wait_for(key(0), key(1))
    delivery = store.begin([want(9)])  # in place of 5, which nobody has begun to read
    store.look_ahead([want(10)], [want(9)])  # in place of 4
    reader.release()
    receive(reader, delivery)
    wait_until(lambda: len(reader.calls) == 6)
    assert {call.expert for call in reader.calls[2:4]} == {key(9), key(10)}
    assert {call.expert for call in reader.calls} == {key(e) for e in (0, 1, 2, 3, 9, 10)}
    assert store.stats.evictions == 0 and store.stats.background_bytes == 4 * 3 * SPAN


def test_what_is_being_preloaded_is_hurried_where_it_is_demanded(make: Make) -> None:
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.preload([want(expert) for expert in range(8)])
    reader.wait_for(key(0), key(1))
    delivery = store.begin([want(7)])
    reader.release()
    receive(reader, delivery)
    wait_until(lambda: len(reader.calls) >= 4)
    assert key(7) in {call.expert for call in reader.calls[2:4]} and store.stats.hits == 1


def test_a_promotion_reads_only_refinement_planes_and_only_in_place_of_what_is_used_less(make: Make) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, want(1, 2), want(2, 3))
    store.promote([want(1, 4), want(2, 4)])
    wait_until(lambda: len(reader.calls) == 4)
    assert {tuple(call) for call in reader.calls[2:]} == {(key(1), 1, 2), (key(2), 2, 1)}
    wait_until(lambda: store.tier_at_hand(want(1)) == store.tier_at_hand(want(2)) == 4)
    for _ in range(3):
        fetch(store, reader, want(3, 4))
    store.promote([want(4, 4)])  # wanted once, the others as often or more
    assert store.resident_bytes() == 9 * SPAN and store.tier_at_hand(want(1)) == 4
    for _ in range(4):
        store.promote([want(4, 4)])
    wait_until(lambda: store.tier_at_hand(want(4)) > 0)


def test_what_is_read_at_too_low_a_tier_holds_up_no_other(make: Make) -> None:
    store, reader = make(segments=30)
    fetch(store, reader, want(5))
    reader.hold(key(1))
    store.look_ahead([want(1, 2)])
    reader.wait_for(key(1))
    delivery = store.begin([want(1, 4), want(2), want(5)])
    reader.wait_for(key(2))
    batches = one_by_one(delivery)
    assert {next(batches).want for _ in range(2)} == {want(2), want(5)}
    reader.release()
    wanted, at = next(batches)
    check(reader, wanted, at)
    assert wanted == want(1, 4) and not list(batches)


def test_a_background_read_that_is_wanted_now_is_not_taken_back_for_room(make: Make) -> None:
    store, reader = make(segments=18)
    reader.hold(key(0), key(1))
    store.preload([want(expert) for expert in range(6)])
    reader.wait_for(key(0), key(1))
    threading.Timer(0.05, reader.release).start()
    fetch(store, reader, want(9), want(5), want(4))
    assert store.stats.hits == 2


def test_look_ahead_hurries_what_is_read_in_the_background(make: Make) -> None:
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.preload([want(expert) for expert in range(6)])
    reader.wait_for(key(0), key(1))
    store.look_ahead([want(5)])
    reader.release()
    wait_until(lambda: len(reader.calls) == 6)
    assert key(5) in {call.expert for call in reader.calls[2:4]}


def test_a_read_that_failed_while_nobody_wanted_it_is_done_again(make: Make) -> None:
    store, reader = make(segments=30)
    reader.failing[key(1)] = DymoeError("once")
    look_ahead(store, reader, want(1))
    reader.failing.clear()
    assert fetch(store, reader, want(1)) == [(key(1), 0, 3)]


def test_planes_above_those_wanted_change_nothing(make: Make) -> None:
    store, reader = make(segments=96)  # room for all
    fetch(store, reader, want(1, 2))
    look_ahead(store, reader, want(1, 4))
    assert store.at_hand([want(1, 2)]) is not None and store.stats.look_ahead_hits == 0
    look_ahead(store, reader, want(2, 2))
    look_ahead(store, reader, want(2, 4))
    fetch(store, reader, want(2, 3))
    assert (store.stats.look_ahead_reads, store.stats.look_ahead_hits) == (3, 2)


# Memory that is given back


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_store_that_shrinks_keeps_what_is_used_most_and_right(make: Make, name: str) -> None:
    layout = LAYOUTS[name]
    store, reader = make(layout=layout, arena_bytes=full_arena_bytes(layout, 32))
    for expert in range(16):
        for _ in range(1 + (expert < 3)):
            fetch(store, reader, want(expert, layout.ladder[-1]))
    before = store.arena_bytes
    store.resize(before // 2)
    assert store.arena_bytes <= max(before // 2, least_arena_bytes(layout)) and not store.roomy
    assert fetch(store, reader, *(want(e, layout.ladder[-1]) for e in range(3))) == []
    for expert in range(16):  # what has left is read again, and right
        fetch(store, reader, want(expert, layout.ladder[-1]))
    store.resize(0)
    assert store.arena_bytes == least_arena_bytes(layout)
    fetch(store, reader, *(want(e, layout.ladder[-1]) for e in range(16)))


def test_what_was_used_most_stays_where_all_did_fit_before(make: Make) -> None:
    """Uses are not counted while nothing has to leave, but remembered."""
    store, reader = make(arena_bytes=full_arena_bytes(flat_layout(), 32))
    everything = [want(expert, 4, layer) for layer in range(2) for expert in range(16)]
    for wanted in everything:
        fetch(store, reader, wanted)
    hot = everything[2::4]
    for _ in range(3):
        assert store.at_hand(hot[:4]) and fetch(store, reader, *hot[4:]) == []
    before = store.arena_bytes
    store.resize(before // 3)
    assert fetch(store, reader, *hot) == []
    store.resize(before)
    assert store.roomy and store.arena_bytes == before
    fetch(store, reader, *everything)


def test_a_store_shrinks_while_it_reads(make: Make) -> None:
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.preload([want(expert) for expert in range(8)])
    reader.wait_for(key(0), key(1))
    threading.Timer(0.05, reader.release).start()
    store.resize(0)
    assert store.arena_bytes == least_arena_bytes(flat_layout())
    fetch(store, reader, *(want(e) for e in range(10)))


def test_demanded_reads_overtake_look_ahead(make: Make) -> None:
    store, reader = make(segments=40)
    reader.hold(key(0), key(1))
    store.look_ahead([want(e, 4) for e in (0, 1, 2, 3)])
    reader.wait_for(key(0), key(1))
    delivery = store.begin([want(8, 4), want(9, 4)])
    reader.release()
    receive(reader, delivery)
    reader.wait_for(key(2), key(3))
    assert {c.expert for c in reader.calls[2:4]} == {key(8), key(9)}


def test_a_look_ahead_that_is_demanded_overtakes_the_others(make: Make) -> None:
    store, reader = make(segments=40)
    reader.hold(key(0), key(1))
    store.look_ahead([want(e, 4) for e in (0, 1, 2, 3, 4)])
    reader.wait_for(key(0), key(1))
    delivery = store.begin([want(4, 4)])
    reader.release(key(0))
    receive(reader, delivery)
    reader.wait_for(key(2), key(3))
    assert [c.expert for c in reader.calls[2:]] == [key(4), key(2), key(3)]


def test_a_demand_takes_back_queued_look_ahead_where_memory_is_short(make: Make) -> None:
    store, reader = make(segments=9)
    reader.hold(key(0), key(1))
    store.look_ahead([want(e, 4) for e in (0, 1, 2)])
    reader.wait_for(key(0), key(1))
    delivery = store.begin([want(9, 4)])  # takes the room of 2
    reader.release()
    receive(reader, delivery)
    assert key(2) not in {c.expert for c in reader.calls}
    assert store.stats.look_ahead_reads == 2


def test_a_demand_waits_for_look_ahead_under_way_where_memory_is_short(make: Make) -> None:
    store, reader = make(segments=9)
    reader.hold(key(0), key(1))
    store.look_ahead([want(e, 4) for e in (0, 1)])
    reader.wait_for(key(0), key(1))
    threading.Timer(0.05, reader.release).start()
    fetch(store, reader, want(8, 4), want(9, 4), want(10, 4))


def test_a_demand_takes_back_queued_look_ahead_before_it_evicts_what_is_needed_now(make: Make) -> None:
    store, reader = make(segments=12)
    fetch(store, reader, *(want(e, 2) for e in range(6)))
    reader.hold(key(6, 1), key(7, 1))
    now = [*(want(e, 2) for e in range(6)), want(9, 2)]
    delivery = store.begin(now)
    store.look_ahead([want(e, 2, layer=1) for e in range(6, 12)], now)  # four of these are only queued
    reader.wait_for(key(6, 1), key(7, 1))
    before = [store._memory.entries[key(e)] for e in range(6)]
    for wanted, at in one_by_one(delivery):
        check(reader, wanted, at)
        if wanted == now[4]:  # by now all have been demanded
            reader.release()
    assert [c.expert for c in reader.calls if c.expert.layer == 0] == [*(key(e) for e in range(6)), key(9)]
    assert [store._memory.entries.get(key(e)) for e in range(6)] == before


# Errors


def broken(expert: int) -> DymoeError:
    return DymoeError(f"experts-00000.safetensors: checksum of expert {key(expert)} is wrong")


def test_a_read_error_is_raised_as_it_is_instead_of_the_expert(make: Make) -> None:
    store, reader = make(segments=9)
    reader.failing[key(2)] = broken(2)
    seen = []
    with pytest.raises(DymoeError) as caught:
        for wanted, at in one_by_one(store.begin([want(1), want(2), want(3)])):
            check(reader, wanted, at)
            seen.append(wanted.key.expert)
    assert caught.value is reader.failing[key(2)]
    assert 2 not in seen


def test_after_a_read_error_the_expert_is_read_again(make: Make) -> None:
    store, reader = make(segments=9)
    reader.failing[key(2)] = broken(2)
    for _ in range(2):
        with pytest.raises(DymoeError):
            fetch(store, reader, want(2))
    reader.failing.clear()
    assert fetch(store, reader, want(2)) == [(key(2), 0, 3)]


def test_a_failed_promotion_leaves_the_planes_below(make: Make) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, want(2, 2))
    reader.failing[key(2)] = broken(2)
    with pytest.raises(DymoeError):
        fetch(store, reader, want(2, 4))
    assert fetch(store, reader, want(2, 2)) == []
    assert store.resident_bytes() == SPAN


def test_after_read_errors_all_memory_serves_other_experts(make: Make) -> None:
    store, reader = make(segments=9)
    for expert in range(16):
        reader.failing[key(expert)] = broken(expert)
    for expert in range(16):
        with pytest.raises(DymoeError):
            fetch(store, reader, want(expert))
    assert store.resident_bytes() == 0
    fetch(store, reader, *(want(e, 4, layer=1) for e in range(16)))


def test_an_error_while_others_are_being_read_costs_no_memory(make: Make) -> None:
    """The reads that were under way when a delivery ended arrive, and are then like any other."""
    store, reader = make(segments=9)
    for first in range(0, 15, 3):
        reader.failing[key(first)] = broken(first)
        reader.hold(key(first + 1), key(first + 2))
        with pytest.raises(DymoeError):
            fetch(store, reader, *(want(first + i, 4) for i in range(3)))
        reader.release()
    fetch(store, reader, *(want(e, 4, layer=1) for e in range(3)))


def test_a_failed_look_ahead_is_silent_where_it_is_not_demanded(make: Make) -> None:
    store, reader = make(segments=9)
    for expert in range(3):
        reader.failing[key(expert)] = broken(expert)
    look_ahead(store, reader, *(want(e, 4) for e in range(3)))
    store.look_ahead([])
    fetch(store, reader, *(want(e, 4) for e in range(3, 10)))
    assert set(store._memory.entries) <= {key(e) for e in range(3, 10)}


def test_a_failed_look_ahead_is_raised_where_it_is_demanded(make: Make) -> None:
    store, reader = make(segments=9)
    reader.failing[key(1)] = broken(1)
    look_ahead(store, reader, want(1, 4))
    with pytest.raises(DymoeError) as caught:
        fetch(store, reader, want(1, 4))
    assert caught.value is reader.failing[key(1)]
    assert store.resident_bytes() == 0
    reader.failing.clear()
    assert fetch(store, reader, want(1, 4)) == [(key(1), 0, 3)]


def test_a_failed_look_ahead_to_higher_planes_does_no_harm_where_the_lower_are_wanted(make: Make) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, want(1, 2))
    reader.failing[key(1)] = broken(1)
    look_ahead(store, reader, want(1, 4))
    assert fetch(store, reader, want(1, 2)) == []


def test_an_error_in_begin_lets_go_of_what_it_had_pinned(make: Make) -> None:
    store, reader = make(segments=9)
    for round_ in range(3):
        good, bad = 2 * round_, 2 * round_ + 1
        reader.failing[key(bad)] = broken(bad)
        look_ahead(store, reader, want(bad, 2))
        with pytest.raises(DymoeError):
            fetch(store, reader, want(good, 4), want(bad, 4))
    fetch(store, reader, *(want(e, 4, layer=1) for e in range(3)))
    assert not any(entry.pins for entry in store._memory.entries.values())


def test_an_arena_full_of_experts_in_use_is_an_error_and_passes(make: Make) -> None:
    store, reader = make(segments=9)
    first = store.begin([want(e, 4) for e in range(2)])
    next(first)
    second = store.begin([want(5, 2)])
    next(second)
    with pytest.raises(DymoeError, match=r"in use.*--memory"):
        fetch(store, reader, want(7, 4))  # two segments are free, and it needs three
    first.close()
    second.close()
    assert store.resident_bytes() <= 7 * SPAN
    fetch(store, reader, want(7, 4), want(8, 4), want(9, 4))


@on_compiled_threads
@pytest.mark.parametrize("arena", ["least", "a little more", "half"])
def test_content_is_right_while_reads_fail_at_random(make: Make, arena: str) -> None:
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
    store.look_ahead([])
    for expert in range(16):
        wait_until(lambda: not store._memory.reads.pending())
        reader.failing.clear()
        try:
            fetch(store, reader, want(expert))
        except DymoeError:  # of a look-ahead while reads still failed
            fetch(store, reader, want(expert))
    assert not any(entry.pins for entry in store._memory.entries.values())


# Ends


@on_compiled_threads
def test_the_books_do_not_grow(make: Make) -> None:
    store, reader = make(segments=9)
    for turn in range(60):
        fetch(store, reader, want(turn % 16), want((turn + 5) % 16))
        store.look_ahead([want((turn + 9) % 16)])
    wait_until(lambda: not store._memory.reads.pending())
    store._memory.settle()
    reads = store._memory.reads
    assert not any(map(len, (reads._reads, reads._tickets, *reads._waiting, reads._ended, reads._begun)))
    assert len(store._memory.entries) == 3


def test_closing_a_delivery_early_lets_go_of_what_it_held(make: Make) -> None:
    store, reader = make(segments=9)

    for layer in (0, 1, 0, 1):
        reader.hold(key(1, layer), key(2, layer))
        delivery = store.begin([want(e, 4, layer) for e in range(3)])
        check(reader, *next(delivery)[0])
        reader.release(key(1, layer))
        check(reader, *next(delivery)[0])
        reader.release(key(2, layer))
        wait_until(lambda: not store._memory.reads.pending())
        delivery.close()

    assert not any(entry.pins for entry in store._memory.entries.values())


def test_closing_a_delivery_before_its_first_expert_lets_go_of_what_it_held(make: Make) -> None:
    store, reader = make(segments=9)
    store.begin([want(e, 4) for e in range(3)]).close()
    assert not any(entry.pins for entry in store._memory.entries.values())
    fetch(store, reader, *(want(e, 4, layer=1) for e in range(3)))


def test_reads_under_way_when_a_delivery_is_closed_cost_no_memory(make: Make) -> None:
    store, reader = make(segments=9)
    for first in range(0, 9, 3):
        reader.hold(key(first + 1), key(first + 2))
        delivery = store.begin([want(first + i, 4) for i in range(3)])
        check(reader, *next(delivery)[0])
        delivery.close()
        reader.release()
    fetch(store, reader, *(want(e, 4, layer=1) for e in range(3)))


@pytest.mark.parametrize("threads", [read_threads, PythonThreads], indirect=True)
@pytest.mark.parametrize("ending", ["idle", "used", "failed", "closed early", "queued"])
def test_closing_the_store_ends_its_threads(ending: str) -> None:
    assert not reader_threads()
    reader = FakeReader(flat_layout())
    store = ExpertStore(reader.layout, (2, 16), reader, 9 * SPAN)
    assert len(reader_threads(IN_FLIGHT)) == IN_FLIGHT
    if ending == "used":
        fetch(store, reader, want(1), want(2))
    if ending == "failed":
        reader.failing[key(1)] = broken(1)
        look_ahead(store, reader, want(1))
        with pytest.raises(DymoeError):
            fetch(store, reader, want(2), want(1))
    if ending == "closed early":
        delivery = store.begin([want(1), want(2), want(3)])
        next(delivery)
        delivery.close()
    if ending == "queued":
        reader.hold(key(1), key(2))
        store.look_ahead([want(e) for e in (1, 2, 3)])
        reader.wait_for(key(1), key(2))
        threading.Timer(0.05, reader.release).start()
    store.close()
    assert not reader_threads()
    store.close()  # again, to no effect


def test_a_delivery_of_a_closed_store_does_not_wait_for_ever(make: Make) -> None:
    store, reader = make(segments=9)
    reader.hold(key(1), key(2))
    delivery = store.begin([want(1), want(2), want(3)])
    reader.wait_for(key(1), key(2))
    threading.Timer(0.05, reader.release).start()
    store.close()

    with pytest.raises(DymoeError):
        list(delivery)


def test_counts_begin_anew_after_a_reset(make: Make) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, want(1), want(2))
    store.reset_stats()
    assert set(asdict(store.stats).values()) == {0}
    fetch(store, reader, want(1), want(3))
    assert (store.stats.requests, store.stats.hits, store.stats.read_bytes) == (2, 1, 3 * SPAN)


def test_counts_never_fall_below_zero(make: Make) -> None:
    """Look-ahead that was counted before a reset and is taken back after it."""
    store, reader = make(segments=30)
    reader.hold(key(0), key(1))
    store.look_ahead([want(e, 4) for e in range(4)])
    reader.wait_for(key(0), key(1))
    store.reset_stats()
    store.look_ahead([])
    assert min(asdict(store.stats).values()) >= 0


def test_what_is_queued_counts_once_it_is_read(make: Make) -> None:
    """Not what is taken back, nor what was read before a reset."""
    store, reader = make(segments=12)
    reader.hold(key(0), key(1))
    store.preload([want(expert) for expert in range(4)])
    reader.wait_for(key(0), key(1))
    assert store.stats.read_bytes == store.stats.background_bytes == 6 * SPAN
    store.reset_stats()
    threading.Timer(0.05, reader.release).start()
    fetch(store, reader, want(2), want(7), want(8))
    assert store.stats.read_bytes == 9 * SPAN and store.stats.background_bytes == 3 * SPAN
    assert min(asdict(store.stats).values()) >= 0


def test_guesses_before_a_reset_are_none_after_it(make: Make) -> None:
    store, reader = make(segments=30)
    look_ahead(store, reader, want(1))
    store.reset_stats()
    fetch(store, reader, want(1))
    assert (store.stats.look_ahead_reads, store.stats.look_ahead_hits) == (0, 0)


def test_waiting_for_room_is_waiting(make: Make) -> None:
    store, reader = make(segments=9)
    reader.hold(key(0), key(1))
    store.look_ahead([want(0), want(1), want(2)])
    reader.wait_for(key(0), key(1))
    wait = store._memory.reads.wait

    def wait_and_release(read: Read) -> None:
        threading.Timer(0.1, reader.release).start()  # not before: this thread may stand still for long
        wait(read)

    store._memory.reads.wait = wait_and_release  # type: ignore[method-assign]
    fetch(store, reader, want(5), want(6), want(7))
    assert store.stats.wait_s > 0.02


@on_compiled_threads
def test_memory_stays_as_long_as_a_thread_may_write_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_queue, "PATIENCE_S", 0.05)
    reader = FakeReader(flat_layout())
    reader.hold(key(1))
    store = ExpertStore(reader.layout, (2, 16), reader, 9 * SPAN)
    store.look_ahead([want(1)])
    reader.wait_for(key(1))
    memory = weakref.ref(store._memory.arena.memory)
    assert not store.close()
    del store
    gc.collect()
    assert memory() is not None
    reader.release()


def test_a_promotion_that_failed_is_raised_where_it_is_wanted_again(make: Make) -> None:
    """Nobody waits for it, so the error would not be seen otherwise."""
    store, reader = make(segments=9)
    fetch(store, reader, want(1, 2), want(2, 2))
    reader.failing[key(1)] = broken(1)
    store.promote([want(1, 4)])
    wait_until(lambda: store.tier_at_hand(want(1)) == 2 and bool(store._memory.failed))
    store.promote([want(2, 4)])
    with pytest.raises(DymoeError) as caught:
        store.promote([want(1, 4)])
    assert caught.value is reader.failing[key(1)]
    assert store.tier_at_hand(want(1, 2)) == 2


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_a_model_of_few_experts_needs_no_more_than_all_of_them(make: Make, experts: int) -> None:
    layout = flat_layout()
    full = full_arena_bytes(layout, experts)
    store, reader = make(layout=layout, shape=(1, experts), arena_bytes=full)
    assert store.roomy and least_arena_bytes(layout, experts) <= full
    for tier in (2, 4, 3):
        fetch(store, reader, *(want(expert, tier) for expert in range(experts)))
    store.resize(0)
    fetch(store, reader, *(want(expert, 4) for expert in range(experts)))


def test_a_promotion_that_failed_and_was_read_since_is_forgotten(make: Make) -> None:
    store, reader = make(segments=9)
    fetch(store, reader, want(1, 2))
    reader.failing[key(1)] = broken(1)
    store.promote([want(1, 4)])
    wait_until(lambda: store.tier_at_hand(want(1)) == 2 and bool(store._memory.failed))
    reader.failing.clear()
    fetch(store, reader, want(1, 3))
    store.promote([want(1, 4)])
    wait_until(lambda: store.tier_at_hand(want(1)) == 4)
