"""One preallocated block of memory, handed out in slots of a few fixed sizes.

The block is divided into equal chunks. A chunk serves one size class at a time, so slots
never fragment it; when classes compete, slots of half-empty chunks are moved together.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dymoe_runtime.memory import Place, address_of, map_memory, memory_at

# A chunk may waste this share of itself on sizes that do not divide it.
WASTE = 0.06


@dataclass(eq=False, slots=True)
class Slot:
    """`size` bytes of the arena; `owner` is the holder's."""

    chunk: int
    index: int
    size_class: int
    place: Place  # of `size` bytes
    owner: Any = None

    @property
    def memory(self) -> np.ndarray:
        """uint8 [size]"""
        return memory_at(self.place)


@dataclass(eq=False, slots=True)
class _Chunk:
    size_class: int = -1  # -1: free
    slots: dict[int, Slot] = field(default_factory=dict)
    room: list[int] = field(default_factory=list)  # where there is no slot


class Arena:
    """Slots of `sizes[c]` bytes for each class c inside `budget_bytes`.

    `movable(slot)` says whether a slot's memory may be moved elsewhere in the arena just now; `moved(slot)` is called
    after it was. Without `backed` there is no memory at the places.
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
        self.memory = np.frombuffer(self._memory, np.uint8)
        self._start = address_of(self.memory)
        self._chunks = [_Chunk() for _ in range(self.chunks)]
        self._free = list(range(self.chunks))[::-1]
        self._given_back: list[int] = []
        self._partial: list[set[int]] = [set() for _ in self.sizes]  # chunks of the class with room
        self._spare: list[list[Slot]] = [[] for _ in self.sizes]  # freed, and mostly wanted again at once
        self._movable = movable
        self._moved = moved

    def allocate(self, size_class: int, compact: bool = True) -> Slot | None:
        """A slot, or None where something must be freed first; without `compact`, or moved."""
        if spare := self._spare[size_class]:
            return spare.pop()
        if not self._partial[size_class]:
            if not self._free:
                self._let_go()
            if not self._free and not (compact and self._compact()):
                return None
            number = self._free.pop()
            chunk = self._chunks[number]
            chunk.size_class, chunk.room = size_class, list(range(self._per_chunk[size_class]))[::-1]
            self._partial[size_class].add(number)
        return self._take(min(self._partial[size_class]), size_class)

    def free(self, slot: Slot) -> None:
        slot.owner = None
        self._spare[slot.size_class].append(slot)

    def _let_go(self) -> None:
        """Make room for slots of any size of what was freed."""
        for spare in self._spare:
            for slot in spare:
                chunk = self._chunks[slot.chunk]
                del chunk.slots[slot.index]
                chunk.room.append(slot.index)
                if chunk.slots:
                    self._partial[slot.size_class].add(slot.chunk)
                else:
                    self._partial[slot.size_class].discard(slot.chunk)
                    chunk.size_class = -1
                    self._free.append(slot.chunk)
            spare.clear()

    def give_back(self) -> bool:
        """Give the memory of a free chunk back to the system; whether there was one."""
        self._let_go()
        if not self._free and not self._compact():
            return False
        chunk = self._free.pop()
        self._given_back.append(chunk)
        self.chunks -= 1
        # Whole pages only: the system would round the end up, into the next chunk.
        first = -(-chunk * self.chunk_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (chunk + 1) * self.chunk_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if self._backed and first < end:
            with contextlib.suppress(AttributeError, OSError):
                self._memory.madvise(mmap.MADV_DONTNEED, first, end - first)
        return True

    def take_again(self) -> bool:
        """Have a chunk again that was given back; whether there was one."""
        if not self._given_back:
            return False
        self._free.append(self._given_back.pop())
        self.chunks += 1
        return True

    def _take(self, number: int, size_class: int) -> Slot:
        chunk, size = self._chunks[number], self.sizes[size_class]
        index = chunk.room.pop()
        slot = Slot(number, index, size_class, (self._start + number * self.chunk_bytes + index * size, size))
        chunk.slots[index] = slot
        if not chunk.room:
            self._partial[size_class].discard(number)
        return slot

    def _compact(self) -> bool:
        """Empty one half-empty chunk into others of its class; whether a chunk became free."""
        for size_class, partial in enumerate(self._partial):
            for number in sorted(partial, key=lambda n: len(self._chunks[n].slots)):
                slots = list(self._chunks[number].slots.values())
                room = sum(self._per_chunk[size_class] - len(self._chunks[n].slots) for n in partial if n != number)
                if len(slots) <= room and all(map(self._movable, slots)):
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
            slot.chunk, slot.index, slot.place = target.chunk, target.index, target.place
            self._moved(slot)
        self._chunks[number].slots.clear()
        self._chunks[number].size_class = -1
        self._free.append(number)


def chunk_bytes(sizes: Sequence[int]) -> int:
    """The smallest chunk that every size divides with little waste."""
    candidates = sorted({size * n for size in sizes for n in range(1, 9) if size * n >= max(sizes)})
    waste = {c: max(1 - (c // size) * size / c for size in sizes) for c in candidates}
    return next((c for c in candidates if waste[c] <= WASTE), min(candidates, key=lambda c: waste[c]))
