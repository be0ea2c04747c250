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
import torch

from dymoe_runtime.device import map_memory

# A chunk may waste this share of itself on sizes that do not divide it.
WASTE = 0.06


@dataclass(eq=False)
class Slot:
    """`size` bytes of the arena. `movable` says whether the arena may move it just now; `owner` is the holder's."""

    chunk: int
    index: int
    size_class: int
    memory: torch.Tensor  # uint8 [size]
    movable: bool = False
    owner: Any = None


@dataclass(eq=False)
class _Chunk:
    size_class: int = -1  # -1: free
    slots: dict[int, Slot] = field(default_factory=dict)


class Arena:
    """Slots of `sizes[c]` bytes for each class c inside `budget_bytes`.

    `moved(slot)` is called after a slot's memory was moved elsewhere in the arena.
    """

    def __init__(
        self, sizes: Sequence[int], budget_bytes: int, moved: Callable[[Slot], None] = lambda slot: None
    ) -> None:
        self.sizes = tuple(sizes)
        self.chunk_bytes = chunk_bytes(sizes)
        self.chunks = budget_bytes // self.chunk_bytes
        self._per_chunk = tuple(self.chunk_bytes // size for size in self.sizes)
        self._memory = map_memory(self.chunks * self.chunk_bytes)
        self.memory = torch.from_numpy(np.frombuffer(self._memory, np.uint8))
        self._chunks = [_Chunk() for _ in range(self.chunks)]
        self._free = list(range(self.chunks))[::-1]
        self._given_back: list[int] = []
        self._partial: list[set[int]] = [set() for _ in self.sizes]  # chunks of the class with room
        self._moved = moved

    def allocate(self, size_class: int, compact: bool = True) -> Slot | None:
        """A slot, or None where something must be freed first; without `compact`, or moved."""
        if not self._partial[size_class]:
            if not self._free and not (compact and self._compact()):
                return None
            chunk = self._free.pop()
            self._chunks[chunk].size_class = size_class
            self._partial[size_class].add(chunk)
        return self._take(min(self._partial[size_class]), size_class)

    def free(self, slot: Slot) -> None:
        chunk = self._chunks[slot.chunk]
        del chunk.slots[slot.index]
        if chunk.slots:
            self._partial[slot.size_class].add(slot.chunk)
        else:
            self._partial[slot.size_class].discard(slot.chunk)
            chunk.size_class = -1
            self._free.append(slot.chunk)

    def give_back(self) -> bool:
        """Give the memory of a free chunk back to the system; whether there was one."""
        if not self._free and not self._compact():
            return False
        chunk = self._free.pop()
        self._given_back.append(chunk)
        self.chunks -= 1
        # Whole pages only: the system would round the end up, into the next chunk.
        first = -(-chunk * self.chunk_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (chunk + 1) * self.chunk_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
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
        chunk = self._chunks[number]
        index = next(i for i in range(self._per_chunk[size_class]) if i not in chunk.slots)
        slot = Slot(number, index, size_class, self._view(number, index, size_class))
        chunk.slots[index] = slot
        if len(chunk.slots) == self._per_chunk[size_class]:
            self._partial[size_class].discard(number)
        return slot

    def _view(self, chunk: int, index: int, size_class: int) -> torch.Tensor:
        size = self.sizes[size_class]
        start = chunk * self.chunk_bytes + index * size
        return self.memory[start : start + size]

    def _compact(self) -> bool:
        """Empty one half-empty chunk into others of its class; whether a chunk became free."""
        for size_class, partial in enumerate(self._partial):
            for number in sorted(partial, key=lambda n: len(self._chunks[n].slots)):
                slots = list(self._chunks[number].slots.values())
                room = sum(self._per_chunk[size_class] - len(self._chunks[n].slots) for n in partial if n != number)
                if len(slots) <= room and all(slot.movable for slot in slots):
                    self._empty(number, slots)
                    return True
        return False

    def _empty(self, number: int, slots: Sequence[Slot]) -> None:
        size_class = self._chunks[number].size_class
        self._partial[size_class].discard(number)
        for slot in slots:
            target = self._take(min(self._partial[size_class]), size_class)
            target.memory.copy_(slot.memory)
            self._chunks[target.chunk].slots[target.index] = slot
            slot.chunk, slot.index, slot.memory = target.chunk, target.index, target.memory
            self._moved(slot)
        self._chunks[number].slots.clear()
        self._chunks[number].size_class = -1
        self._free.append(number)


def chunk_bytes(sizes: Sequence[int]) -> int:
    """The smallest chunk that every size divides with little waste."""
    candidates = sorted({size * n for size in sizes for n in range(1, 9) if size * n >= max(sizes)})
    waste = {c: max(1 - (c // size) * size / c for size in sizes) for c in candidates}
    return next((c for c in candidates if waste[c] <= WASTE), min(candidates, key=lambda c: waste[c]))
