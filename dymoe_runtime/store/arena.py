"""One preallocated block of memory, handed out in slots of a few fixed sizes.

The block is divided into equal chunks. A chunk serves one size class at a time, so its slots never fragment it. When a
size class needs another chunk and none is free, the slots of a half-empty chunk are moved into others of its class.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.memory import Place, address_of, keep_from_forks, map_memory, memory_at

# Experts that are read at the same time; two nearly saturate a disk.
IN_FLIGHT = 2
# Experts pinned for a lease at once: one in use, the others being read.
WINDOW = IN_FLIGHT + 1
# Share of a chunk that may be left over where a slot size does not divide it.
WASTE = 0.07


@dataclass(eq=False, slots=True)
class Slot:
    """A place in the arena, and its `owner`, None if it has none."""

    chunk: int
    index: int
    size_class: int
    place: Place
    owner: Any = None

    @property
    def memory(self) -> np.ndarray:
        """Return a view of the slot's memory, uint8 [size]."""
        return memory_at(self.place)

    def give_to(self, owner: Any) -> None:
        """Set the owner; None if the slot has none any more."""
        self.owner = owner

    def move_to(self, other: Slot) -> None:
        """Take over the place of another slot, which must no longer be used."""
        self.chunk, self.index, self.place = other.chunk, other.index, other.place


@dataclass(eq=False, slots=True)
class _Chunk:
    size_class: int = -1  # -1: free
    slots: dict[int, Slot] = field(default_factory=dict)
    vacant: list[int] = field(default_factory=list)  # indices without a slot

    def open(self, size_class: int, count: int) -> None:
        """Start to serve `count` slots of a size class, all vacant."""
        self.size_class, self.vacant = size_class, list(range(count))[::-1]

    def close(self) -> None:
        """Make the chunk free for any size class."""
        self.slots.clear()
        self.size_class = -1


class Arena:
    """Slots of `sizes[c]` bytes for each size class c, in at most `budget_bytes`.

    `movable(slot)` returns whether the slot may be moved elsewhere in the arena now. `moved(slot)` is called after a
    move. Without `backed` the places have addresses but no memory.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        budget_bytes: int,
        movable: Callable[[Slot], bool] = lambda slot: True,
        moved: Callable[[Slot], None] = lambda slot: None,
        backed: bool = True,
    ) -> None:
        self.sizes = tuple(sizes)
        self.chunk_bytes = chunk_bytes(sizes)
        self.chunks = budget_bytes // self.chunk_bytes
        self._per_chunk = tuple(self.chunk_bytes // size for size in self.sizes)
        self._backed = backed
        self._memory = map_memory(self.chunks * self.chunk_bytes if backed else 0)
        keep_from_forks(self._memory)
        self.memory = np.frombuffer(self._memory, np.uint8)
        self._start = address_of(self.memory)
        self._chunks = [_Chunk() for _ in range(self.chunks)]
        self._free = list(range(self.chunks))[::-1]
        self._given_back: list[int] = []
        self._partial: list[set[int]] = [set() for _ in self.sizes]  # chunks of the class with vacant slots
        self._freed: list[list[Slot]] = [[] for _ in self.sizes]  # by class; most are allocated again at once
        self._movable = movable
        self._moved = moved

    @property
    def nbytes(self) -> int:
        """Return the bytes of all chunks."""
        return self.chunks * self.chunk_bytes

    def allocate(self, size_class: int, compact: bool = True) -> Slot | None:
        """Return a slot of a size class, or None if there is no room for one.

        With `compact`, slots of other classes may be moved to make room.
        """
        if freed := self._freed[size_class]:
            return freed.pop()
        if not self._partial[size_class]:
            if not self._free:
                self._reclaim()
            if not self._free and not (compact and self._compact()):
                return None
            number = self._free.pop()
            self._chunks[number].open(size_class, self._per_chunk[size_class])
            self._partial[size_class].add(number)
        return self._take(min(self._partial[size_class]), size_class)

    def free(self, slot: Slot) -> None:
        """Give a slot back."""
        slot.give_to(None)
        self._freed[slot.size_class].append(slot)

    def give_back(self) -> bool:
        """Give a free chunk's memory back to the system; return False if no chunk is free or can be emptied."""
        self._reclaim()
        if not self._free and not self._compact():
            return False
        chunk = self._free.pop()
        self._given_back.append(chunk)
        self.chunks -= 1
        # Only whole pages: the system would round the end up into the next chunk.
        first = -(-chunk * self.chunk_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (chunk + 1) * self.chunk_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if self._backed and first < end:
            with contextlib.suppress(AttributeError, OSError):
                self._memory.madvise(mmap.MADV_DONTNEED, first, end - first)
        return True

    def take_again(self) -> bool:
        """Take a chunk back that `give_back` gave to the system; return False if there is none."""
        if not self._given_back:
            return False
        self._free.append(self._given_back.pop())
        self.chunks += 1
        return True

    def _reclaim(self) -> None:
        """Return freed slots to their chunks, and empty chunks to all size classes."""
        for freed in self._freed:
            for slot in freed:
                chunk = self._chunks[slot.chunk]
                del chunk.slots[slot.index]
                chunk.vacant.append(slot.index)
                if chunk.slots:
                    self._partial[slot.size_class].add(slot.chunk)
                else:
                    self._partial[slot.size_class].discard(slot.chunk)
                    chunk.close()
                    self._free.append(slot.chunk)
            freed.clear()

    def _take(self, number: int, size_class: int) -> Slot:
        chunk, size = self._chunks[number], self.sizes[size_class]
        index = chunk.vacant.pop()
        slot = Slot(number, index, size_class, (self._start + number * self.chunk_bytes + index * size, size))
        chunk.slots[index] = slot
        if not chunk.vacant:
            self._partial[size_class].discard(number)
        return slot

    def _compact(self) -> bool:
        """Move the slots of one partly filled chunk into others of its class; return whether a chunk became free."""
        for size_class, partial in enumerate(self._partial):
            for number in sorted(partial, key=lambda n: len(self._chunks[n].slots)):
                slots = list(self._chunks[number].slots.values())
                vacant = sum(self._per_chunk[size_class] - len(self._chunks[n].slots) for n in partial if n != number)
                if len(slots) <= vacant and all(map(self._movable, slots)):
                    self._empty(number, slots)
                    return True
        return False

    def _empty(self, number: int, slots: Sequence[Slot]) -> None:
        size_class = self._chunks[number].size_class
        self._partial[size_class].discard(number)
        for slot in slots:
            target = self._take(min(self._partial[size_class]), size_class)
            if self._backed:
                target.memory[:] = slot.memory
            self._chunks[target.chunk].slots[target.index] = slot
            slot.move_to(target)
            self._moved(slot)
        self._chunks[number].close()
        self._free.append(number)


def chunk_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of the smallest chunk that leaves at most a share of WASTE for each of `sizes`.

    If no candidate does, returns the candidate with the least waste.
    """
    candidates = sorted({size * n for size in sizes for n in range(1, 9) if size * n >= max(sizes)})
    waste = {c: max(1 - (c // size) * size / c for size in sizes) for c in candidates}
    return next((c for c in candidates if waste[c] <= WASTE), min(candidates, key=lambda c: waste[c]))


def min_arena_bytes(layout: RecordLayout, experts: int | None = None) -> int:
    """Return the bytes of the smallest arena that always holds WINDOW experts, in whatever chunks their segments lie.

    `experts` is the number of all experts, if known; the arena is never larger than one that holds them all.
    """
    least = WINDOW * len(layout.ladder) * chunk_bytes(layout.segment_spans)
    return least if experts is None else min(least, full_arena_bytes(layout, experts))


def full_arena_bytes(layout: RecordLayout, experts: int) -> int:
    """Return the bytes of an arena that holds `experts` whole records."""
    chunk = chunk_bytes(layout.segment_spans)
    return chunk * sum(-(-experts // (chunk // span)) for span in layout.segment_spans)
