"""Who gets into memory, and what makes room for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial

from dymoe_runtime.arena import Slot
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.read_queue import Urgency
from dymoe_runtime.residency import Entry, Residency
from dymoe_runtime.spec import ExpertKey

# What is read in the background takes the place of what is worth less by this factor; at 1 reads cost more than they
# bring.
WORTH_A_READ = 2


class Admission:
    """Lets experts into `memory`."""

    def __init__(self, memory: Residency) -> None:
        self._memory = memory

    def demand(self, entry: Entry, segments: int, spared: Collection[ExpertKey]) -> None:
        """Read what a pinned entry lacks of its first `segments`; what is `spared` leaves last."""
        make_room = partial(self._make_room, entry.key, spared)
        self._memory.read(entry, self._rooms(entry, segments, make_room, self._wait_for_room))

    def volunteer(self, entry: Entry, segments: int, urgency: Urgency, keep: Collection[ExpertKey]) -> bool:
        """Read what an entry lacks though nobody waits for it, where there is room; `keep` stays in any case.

        A guess, which is for now, may displace anything else; what is read in the background only what is worth much
        less.
        """
        try:
            make_room = partial(self._make_easy_room, entry.key, segments, urgency, keep)
            slots = self._rooms(entry, segments, make_room, self._give_up)
        except _NoRoom:
            self._memory.refresh(entry)
            return False
        self._memory.read(entry, slots, urgency)
        self._memory.refresh(entry)
        return True

    def resize(self, arena_bytes: int) -> None:
        """Give memory back, or take it again, until the arena has at most `arena_bytes`, as far as pins allow."""
        self._memory.moved()
        chunks = arena_bytes // self._memory.arena.chunk_bytes
        while self._memory.arena.chunks < chunks and self._memory.arena.take_again():
            pass
        while self._memory.arena.chunks > chunks:
            self._memory.settle()
            if self._memory.arena.give_back():
                continue
            if self._memory.take_back(Urgency.BACKGROUND, 1) or self._memory.take_back(Urgency.GUESS):
                continue
            victim = self._cheapest((), None)
            if victim is not None:
                self._memory.evict(victim)
            elif not self._memory.wait_for_unpinned():
                return

    def _rooms(
        self, entry: Entry, segments: int, make_room: Callable[[int], int], wait: Callable[[], None]
    ) -> list[Slot]:
        """Slots for what the entry lacks of its first segments; all or, with the error, none.

        `make_room(missing)` evicts something of what is missing, and says of how many bytes, 0 where it cannot; then
        `wait` may help, or raises. What leaves is mostly of the right sizes; only where enough has left and does not
        fit, others are moved.
        """
        wanted = range(len(entry.slots), segments)
        lacking = sum(self._memory.spans[size_class] for size_class in wanted)
        slots: dict[int, Slot] = {}
        try:
            while missing := self._allocate(slots, wanted, compact=lacking <= 0):
                self._memory.settle()
                freed = make_room(missing)
                lacking -= freed
                if not freed and self._allocate(slots, wanted, compact=True):
                    wait()
        except BaseException:
            for slot in slots.values():
                self._memory.arena.free(slot)
            raise
        return [slots[size_class] for size_class in wanted]

    def _allocate(self, slots: dict[int, Slot], size_classes: Iterable[int], compact: bool) -> int:
        """Add a slot of each class that has none; the bytes of those for which there is no room."""
        missing = 0
        for size_class in size_classes:
            if size_class not in slots:
                slot = self._memory.arena.allocate(size_class, compact)
                if slot is None:
                    missing += self._memory.spans[size_class]
                else:
                    slots[size_class] = slot
        return missing

    def _make_room(self, key: ExpertKey, spared: Collection[ExpertKey], missing: int) -> int:
        """Bytes freed for what is demanded; what is spared goes last."""
        if freed := self._memory.take_back(Urgency.BACKGROUND, 1, spared):
            return freed
        victim = self._cheapest(spared, key.layer)
        if victim is None:
            if freed := self._memory.take_back(Urgency.GUESS):
                return freed
            victim = self._cheapest((), key.layer)
        return 0 if victim is None else self._memory.evict(victim, missing)

    def _wait_for_room(self) -> None:
        if not self._memory.wait_for_unpinned():
            raise DymoeError("expert arena is full of experts in use; give more memory with --memory")

    def _make_easy_room(
        self, key: ExpertKey, segments: int, urgency: Urgency, keep: Collection[ExpertKey], missing: int
    ) -> int:
        """Bytes freed of what `volunteer` may displace."""
        if urgency is Urgency.GUESS and (freed := self._memory.take_back(Urgency.BACKGROUND, 1, keep)):
            return freed
        victim = self._cheapest(keep, key.layer)
        if victim is None:
            return 0
        worth = self._memory.eviction.worth(key, segments - 1)
        if urgency is not Urgency.GUESS and self._memory.eviction.cost(victim.key) * WORTH_A_READ >= worth:
            return 0
        return self._memory.evict(victim, missing)

    @staticmethod
    def _give_up() -> None:
        raise _NoRoom

    def _cheapest(self, spared: Collection[ExpertKey], layer: int | None) -> Entry | None:
        key = self._memory.eviction.cheapest(spared, layer)
        return None if key is None else self._memory.entries[key]


class _NoRoom(Exception):
    """There is none without waiting or evicting what must stay."""
