"""Slots of one block of memory: apart, within the budget, and whole after being moved."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from dymoe_runtime.bundle.tiers import PAGE
from dymoe_runtime.memory import address_of
from dymoe_runtime.store.arena import WASTE, Arena, Slot, chunk_bytes

SIZES = [
    (768, 512, 512),
    (1024, 512, 256, 256),
    (256,),
    (100, 100, 100),
    (700, 300, 90),
    (4096, 64),
    (97, 89, 83),
    (14 * PAGE, 7 * PAGE, 7 * PAGE),
]


class Watched:
    """An arena whose live slots are filled with what they must go on holding."""

    def __init__(self, sizes: Sequence[int], budget_bytes: int, seed: int = 0) -> None:
        self.moves: list[Slot] = []
        self.arena = Arena(sizes, budget_bytes, lambda slot: bool(slot.owner), self._moved)
        self.budget_bytes = budget_bytes
        self.live: dict[int, tuple[Slot, np.ndarray]] = {}
        self.random = np.random.default_rng(seed)

    def _moved(self, slot: Slot) -> None:
        assert slot.owner
        self.moves.append(slot)

    def allocate(self, size_class: int, movable: bool = True) -> Slot | None:
        slot = self.arena.allocate(size_class)
        if slot is not None:
            content = self.random.integers(0, 256, len(slot.memory), np.uint8)
            slot.memory[:] = content
            slot.give_to(movable)
            self.live[id(slot)] = (slot, content)
        return slot

    def free(self, slot: Slot) -> None:
        del self.live[id(slot)]
        self.arena.free(slot)

    def slots(self, size_class: int | None = None) -> list[Slot]:
        return [slot for slot, _ in self.live.values() if size_class in (None, slot.size_class)]

    def check(self) -> None:
        """Every live slot is of its size, apart from all others, in one block, and holds its content."""
        spans = []
        for slot, content in self.live.values():
            assert len(slot.memory) == self.arena.sizes[slot.size_class]
            assert np.array_equal(slot.memory, content)
            spans.append((address_of(slot.memory), address_of(slot.memory) + len(slot.memory)))
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        if spans:
            base = address_of(self.arena.memory)
            assert base <= spans[0][0]
            assert spans[-1][1] <= base + self.budget_bytes

    def chunks_needed(self, more_of: int) -> int:
        """Chunks that the live slots and one more of a class take when packed tightly."""
        needed = 0
        for size_class, size in enumerate(self.arena.sizes):
            count = len(self.slots(size_class)) + (size_class == more_of)
            needed += -(-count // (self.arena.chunk_bytes // size))
        return needed


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_chunk_holds_every_size_with_little_waste(sizes: tuple[int, ...]) -> None:
    chunk = chunk_bytes(sizes)
    assert chunk >= max(sizes)
    waste = max(chunk % size / chunk for size in sizes)
    multiples = {size * n for size in sizes for n in range(1, 9) if size * n >= max(sizes)}
    best = min(max(c % size / c for size in sizes) for c in multiples)
    assert waste <= max(WASTE, best + 1e-9)


@pytest.mark.parametrize(("sizes", "chunk"), [((512, 512), 512), ((1024, 512), 1024), ((768, 512, 512), 1536)], ids=str)
def test_the_chunk_is_the_smallest_that_wastes_little(sizes: tuple[int, ...], chunk: int) -> None:
    assert chunk_bytes(sizes) == chunk


@pytest.mark.parametrize("chunks", [1, 2, 5, 16])
@pytest.mark.parametrize("sizes", SIZES[:7], ids=str)
def test_slots_stay_apart_and_whole_under_random_use(sizes: tuple[int, ...], chunks: int) -> None:
    rng = random.Random(chunks)
    watched = Watched(sizes, chunks * chunk_bytes(sizes) + rng.randrange(chunk_bytes(sizes)))
    for _ in range(300):
        live = watched.slots()
        if live and rng.random() < 0.45:
            watched.free(rng.choice(live))
        else:
            size_class = rng.randrange(len(sizes))
            fits = watched.chunks_needed(size_class) <= chunks
            # Where all slots may move, an allocation fails only where no packing would hold it.
            assert (watched.allocate(size_class) is not None) == fits
        if rng.random() < 0.2:
            watched.check()
    watched.check()


@pytest.mark.parametrize("sizes", SIZES[:7], ids=str)
def test_slots_that_may_not_move_stay_where_they_are(sizes: tuple[int, ...]) -> None:
    rng = random.Random(1)
    watched = Watched(sizes, 8 * chunk_bytes(sizes))
    fixed: dict[int, int] = {}
    for _ in range(600):
        live = watched.slots()
        if live and rng.random() < 0.45:
            slot = rng.choice(live)
            fixed.pop(id(slot), None)
            watched.free(slot)
        else:
            new = watched.allocate(rng.randrange(len(sizes)), movable=rng.random() < 0.7)
            if new is not None and not new.owner:
                fixed[id(new)] = address_of(new.memory)
        assert all(address_of(watched.live[key][0].memory) == where for key, where in fixed.items())
    watched.check()


def fragmented(movable: bool) -> Watched:
    """Four chunks of two slots of class 0 each, every second slot freed."""
    watched = Watched((512, 1024), 4 * 1024)
    slots = [watched.allocate(0, movable) for _ in range(8)]
    for slot in slots[::2]:
        assert slot is not None
        watched.free(slot)
    return watched


def test_half_empty_chunks_are_emptied_for_another_class() -> None:
    watched = fragmented(movable=True)
    for _ in range(2):
        assert watched.allocate(1) is not None
        watched.check()
    assert watched.allocate(1) is None
    assert len(watched.moves) == 2


def test_half_empty_chunks_stay_where_their_slots_may_not_move() -> None:
    watched = fragmented(movable=False)
    assert watched.allocate(1) is None
    watched.check()
    for _ in range(4):
        assert watched.allocate(0) is not None
    assert watched.allocate(0) is None


def test_moved_is_told_of_just_the_slots_that_moved() -> None:
    watched = fragmented(movable=True)
    before = {id(slot): address_of(slot.memory) for slot in watched.slots()}
    watched.allocate(1)
    moved = [slot for slot in watched.slots(0) if address_of(slot.memory) != before[id(slot)]]
    assert [id(slot) for slot in watched.moves] == [id(slot) for slot in moved]
    assert len(moved) == 1


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_was_freed_serves_any_class(sizes: tuple[int, ...]) -> None:
    watched = Watched(sizes, 3 * chunk_bytes(sizes))
    for size_class in (*range(len(sizes)), *range(len(sizes))):
        for _ in range(3 * (chunk_bytes(sizes) // sizes[size_class])):
            assert watched.allocate(size_class) is not None
        assert all(watched.allocate(other) is None for other in range(len(sizes)))
        watched.check()
        for slot in watched.slots():
            watched.free(slot)


@pytest.mark.parametrize("budget", [PAGE * 14, PAGE * 140 + 5, PAGE * 1000 - 1])
def test_the_arena_is_no_larger_than_its_budget(budget: int) -> None:
    arena = Arena((14 * PAGE, 7 * PAGE, 7 * PAGE), budget)
    assert arena.memory.size == arena.chunks * arena.chunk_bytes <= budget
    assert budget - arena.chunks * arena.chunk_bytes < arena.chunk_bytes


def test_slots_of_whole_pages_begin_on_pages() -> None:
    """As reading past the page cache demands."""
    watched = Watched((14 * PAGE, 7 * PAGE, 2 * PAGE), 6 * chunk_bytes((14 * PAGE, 7 * PAGE, 2 * PAGE)))
    for size_class in itertools.cycle(range(3)):
        slot = watched.allocate(size_class)
        if slot is None:
            break
        assert address_of(slot.memory) % PAGE == 0


def test_an_arena_smaller_than_a_chunk_has_no_slots() -> None:
    arena = Arena((512, 256), 511)
    assert arena.chunks == 0
    assert arena.allocate(0) is None
    assert arena.allocate(1) is None


@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_given_back_takes_nothing_of_its_neighbours(sizes: Sequence[int]) -> None:
    """The system gives back whole pages, and chunks need not end with one."""
    watched = Watched(sizes, 24 * chunk_bytes(sizes))
    while watched.allocate(0):
        pass
    before = watched.arena.chunks
    rng = random.Random(0)
    for _ in range(8):
        chunk = rng.choice(sorted({slot.chunk for slot in watched.slots()}))
        for slot in [slot for slot in watched.slots() if slot.chunk == chunk]:
            watched.free(slot)
        assert watched.arena.give_back()
        watched.check()
    assert watched.arena.chunks == before - 8
    assert watched.allocate(0) is None
    while watched.arena.take_again():
        assert watched.allocate(0) is not None
        watched.check()
    assert watched.arena.chunks == before
