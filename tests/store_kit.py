"""What the tests of the store share: a made-up reader, threads that a test steps by hand, and short ways to ask."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout, make_layout
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.reads import ReadThreads
from dymoe_runtime.memory import Place
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import chunk_bytes, full_arena_bytes, min_arena_bytes
from dymoe_runtime.store.eviction import Eviction
from dymoe_runtime.store.lease import Delivered
from dymoe_runtime.store.read_threads import URGENCIES, Outcome
from dymoe_runtime.store.request import ExpertRequest, Source
from dymoe_runtime.store.residency import Prepare, ResidencyListener
from dymoe_runtime.store.store import ExpertStore, memory_of

# What should happen at once has not happened.
TIMEOUT_S = 2.0
SPAN = 256

Segments = list[np.ndarray]
Store = ExpertStore[Segments]
MakeThreads = Callable[[int], ReadThreads]


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
            self._contents[key, segment] = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        return self._contents[key, segment]

    def hold(self, *keys: ExpertKey) -> None:
        """Keep reads of these experts from ending before `release`."""
        self._held.update((key, threading.Event()) for key in keys)

    def release(self, *keys: ExpertKey) -> None:
        for key in keys or tuple(self._held):
            self._held[key].set()

    def wait_for(self, *keys: ExpertKey) -> None:
        """Wait until a read of each of these experts has begun."""
        with self._started:
            begun = self._started.wait_for(lambda: set(keys) <= {call.expert for call in self.calls}, TIMEOUT_S)
        assert begun, f"no read of all of {keys} began; calls were {self.calls}"


class SteppedThreads:
    """`ReadThreads` without a thread: a read runs when the test steps, or when somebody waits for it."""

    def __init__(self, count: int = 1) -> None:
        self._waiting: list[dict[int, Callable[[], None]]] = [{} for _ in range(URGENCIES)]
        self._started: list[int] = []
        self._finished: list[Outcome] = []
        self._tickets = 0

    def submit(
        self,
        fd: int,
        offset: int,
        places: Sequence[Place],
        urgency: int,
        then: Callable[[], None] | None,
        checksums: Sequence[int] = (),
    ) -> int:
        assert fd < 0 and then is not None
        ticket, self._tickets = self._tickets, self._tickets + 1
        self._waiting[urgency][ticket] = then
        return ticket

    def reprioritize(self, ticket: int, now: int, urgency: int) -> bool:
        if ticket not in self._waiting[now]:
            return False
        self._waiting[urgency][ticket] = self._waiting[now].pop(ticket)
        return True

    def cancel(self, ticket: int, urgency: int) -> bool:
        return self._waiting[urgency].pop(ticket, None) is not None

    def started(self) -> list[int]:
        started, self._started = self._started, []
        return started

    def finished(self) -> Sequence[Outcome]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, ticket: int) -> None:
        while any(ticket in waiting for waiting in self._waiting):
            self.step()

    def close(self, patience_s: float) -> bool:
        return True

    def step(self) -> bool:
        """Run the most urgent read, of these the oldest; return False where there is none."""
        waiting = next((waiting for waiting in self._waiting if waiting), None)
        if waiting is None:
            return False
        ticket = next(iter(waiting))
        then = waiting.pop(ticket)
        self._started.append(ticket)
        then()
        self._finished.append(Outcome(ticket, 0, 0, 1e-3))
        return True


def flat_layout(tiers: Sequence[int] = (2, 3, 4)) -> RecordLayout:
    """Return segments of one size, so that a chunk of the arena is a segment, and room is easily counted."""
    spans = (SPAN,) * len(tiers)
    return RecordLayout(tuple(tiers), {}, spans, spans)


LAYOUTS = {
    "flat": flat_layout(),
    "real": make_layout({"gate": (4, 64), "up": (4, 64), "down": (64, 4)}, (2, 3, 4), page=64),
    "four tiers": make_layout({"gate": (5, 70), "up": (5, 70), "down": (70, 5)}, (2, 3, 4, 8), page=128),
    "one tier": make_layout({"gate": (3, 65), "down": (65, 3)}, (4,), page=64),
}
ARENAS: dict[str, Callable[[RecordLayout], int]] = {
    "smallest": min_arena_bytes,
    "a little more": lambda layout: min_arena_bytes(layout) + 3 * chunk_bytes(layout.segment_spans) + 1,
    "half": lambda layout: max(min_arena_bytes(layout), full_arena_bytes(layout, 48) // 2),
    "all": lambda layout: 1 << 30,
}


class StoreFactory:
    """Makes stores, and closes them after the test, whatever it held up."""

    def __init__(self, threads: MakeThreads | None) -> None:
        self._threads = threads
        self._made: list[tuple[Store, FakeReader]] = []

    def __call__(
        self,
        segments: int = 0,
        layout: RecordLayout | None = None,
        shape: tuple[int, int] = (2, 16),
        arena_bytes: int = 0,
        prior: np.ndarray | None = None,
        eviction: Eviction | None = None,
        prepare: Prepare[Segments] = memory_of,
        listener: ResidencyListener[Segments] | None = None,
        threads: MakeThreads | None = None,
        overlap: bool = True,
    ) -> tuple[Store, FakeReader]:
        layout = layout or flat_layout()
        reader = FakeReader(layout)
        store = ExpertStore(
            layout,
            shape,
            reader,
            arena_bytes or SPAN * segments,
            prepare,
            eviction or Eviction(shape, len(layout.ladder), prior=prior, prior_tokens=1.0),
            listener=listener,
            threads=threads or self._threads,
            overlap=overlap,
        )
        self._made.append((store, reader))
        return store, reader

    def close(self) -> None:
        for store, reader in self._made:
            reader.release()
            store.close()


def key(expert: int, layer: int = 0) -> ExpertKey:
    return ExpertKey(layer, expert)


def req(expert: int, tier: int = 4, layer: int = 0) -> ExpertRequest:
    return ExpertRequest(key(expert, layer), tier)


def check(reader: FakeReader, request: ExpertRequest, segments: Sequence[np.ndarray]) -> None:
    """Check that these are all segments of the requested tier, with their own bytes."""
    assert len(segments) == reader.layout.segments_of(request.tier)
    for number, segment in enumerate(segments):
        assert np.array_equal(segment, reader.content(request.key, number)), f"{request.key}, segment {number}"


def one_by_one(batches: Iterator[list[Delivered[Segments]]]) -> Iterator[Delivered[Segments]]:
    for batch in batches:
        yield from batch


def receive(reader: FakeReader, batches: Iterator[list[Delivered[Segments]]]) -> list[ExpertRequest]:
    """Check all that is delivered; return the requests in their order."""
    received = []
    for request, at in one_by_one(batches):
        check(reader, request, at(request.tier))
        received.append(request)
    return received


def fetch(store: Store, reader: FakeReader, *requests: ExpertRequest) -> list[Call]:
    """Acquire and check `requests`; return the reads that this took."""
    before = len(reader.calls)
    with store.acquire(requests) as lease:
        assert sorted(receive(reader, lease.batches())) == sorted(requests)
    return reader.calls[before:]


def use_whole(store: Store, reader: FakeReader, requests: Sequence[ExpertRequest]) -> None:
    """Acquire and check `requests` all at once where that is possible, as a decoded token does."""
    with store.acquire(requests) as lease:
        if lease.experts is None:
            assert sorted(receive(reader, lease.batches())) == sorted(requests)
            return
        if lease.pending is not None:
            lease.pending.wait()
        experts = lease.experts
        if not reader.failing:
            for request, segments in zip(requests, experts, strict=True):
                check(reader, request, segments)


def prefetch(store: Store, *requests: ExpertRequest) -> None:
    """Prefetch, and wait until all of it has arrived."""
    store.prefetch(requests)
    store.drain()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def broken(expert: int) -> DymoeError:
    return DymoeError(f"experts-00000.safetensors: checksum of expert {key(expert)} is wrong")


def random_requests(rng: random.Random, layout: RecordLayout, most: int) -> list[ExpertRequest]:
    """Return distinct experts of one layer at random tiers, some far more often than others."""
    layer = rng.randrange(3)
    experts = {min(int(rng.expovariate(0.2)), 15) for _ in range(rng.randint(0, most))}
    return [ExpertRequest(ExpertKey(layer, expert), rng.choice((0, *layout.ladder))) for expert in experts]


def use_at_random(
    store: Store, reader: FakeReader, seed: int, rounds: int, most: int = 8, ending_early: bool = False
) -> None:
    """Use random experts and prefetch others; content is checked when it comes and again before it may go."""
    rng = random.Random(seed)
    reader.jitter = random.Random(seed)
    for _ in range(rounds):
        requests = random_requests(rng, reader.layout, most)
        guesses = random_requests(rng, reader.layout, 6)
        with store.acquire(requests) as lease:
            if rng.random() < 0.7:
                store.prefetch(guesses, requests)
            left = set(requests)
            for request, at in one_by_one(lease.batches()):
                left.remove(request)
                check(reader, request, at(request.tier))
                if rng.random() < 0.2:
                    store.prefetch(random_requests(rng, reader.layout, 6), requests)
                if rng.random() < 0.1:
                    store.check()
                check(reader, request, at(request.tier))
                if ending_early and rng.random() < 0.1:
                    break
        store.tick()
    store.check()
