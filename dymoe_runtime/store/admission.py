"""Admission of experts to memory, and the evictions and cancellations that make room for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Generic

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import Slot
from dymoe_runtime.store.entry import Entry, P
from dymoe_runtime.store.request import Urgency
from dymoe_runtime.store.residency import Residency

# A background read may evict a segment only if its own is worth more by this factor. At 1, reads cost more than they
# bring.
WORTH_A_READ = 2


class Admission(Generic[P]):
    """Admission of experts to a `Residency`."""

    def __init__(self, residency: Residency[P]) -> None:
        self._residency = residency

    def demand(self, entry: Entry[P], segments: int, spared: Collection[ExpertKey]) -> None:
        """Start a read of the segments that a pinned entry lacks of its first `segments`.

        The `spared` experts are evicted last. Raises DymoeError if there is no room and everything in memory is in use.
        """
        make_room = partial(self._make_room, entry.key, spared)
        self._residency.submit(entry, self._slots(entry, segments, make_room, self._wait_for_room))

    def volunteer(self, entry: Entry[P], segments: int, urgency: Urgency, kept: Collection[ExpertKey]) -> bool:
        """Start a read that nobody waits for, of the segments that an entry lacks of its first `segments`.

        The `kept` experts are not evicted. A prefetch may evict any other, and cancel background reads that have not
        begun. A background read evicts only segments that are worth less than its own by the factor WORTH_A_READ.

        Returns False, without a read, if this makes too little room.
        """
        try:
            make_room = partial(self._make_spare_room, entry.key, segments, urgency, kept)
            slots = self._slots(entry, segments, make_room, self._give_up)
        except _NoRoom:
            self._residency.refresh(entry)
            return False
        self._residency.submit(entry, slots, urgency)
        self._residency.refresh(entry)
        return True

    def resize(self, arena_bytes: int) -> None:
        """Shrink or grow the arena to at most `arena_bytes`.

        Shrinking cancels reads and evicts experts. It stops early when only pinned experts are left. Growing takes
        back only memory that was given back before.
        """
        residency = self._residency
        chunks = arena_bytes // residency.chunk_bytes
        while residency.chunks < chunks and residency.take_chunk():
            pass
        while residency.chunks > chunks:
            residency.reap()
            if residency.give_back_chunk():
                continue
            if residency.cancel(Urgency.BACKGROUND, 1) or residency.cancel(Urgency.PREFETCH):
                continue
            victim = residency.cheapest((), None)
            if victim is not None:
                residency.evict(victim)
            elif not residency.wait_for_unpinned():
                return

    def _slots(
        self, entry: Entry[P], segments: int, make_room: Callable[[int], int], wait: Callable[[], None]
    ) -> list[Slot]:
        """Return slots for the segments that the entry lacks of its first `segments`; on an error, free them all.

        `make_room(missing)` evicts something and returns the bytes that it freed, 0 if it cannot. Then `wait` waits
        for room, or raises. Evicted segments mostly have the right sizes. So other slots are moved only once enough
        bytes are free but do not fit.
        """
        wanted = range(entry.segments, segments)
        lacking = sum(self._residency.span(segment) for segment in wanted)
        slots: dict[int, Slot] = {}
        try:
            while missing := self._allocate(slots, wanted, compact=lacking <= 0):
                self._residency.reap()
                freed = make_room(missing)
                lacking -= freed
                if not freed and self._allocate(slots, wanted, compact=True):
                    wait()
        except BaseException:
            self._residency.free(slots.values())
            raise
        return [slots[segment] for segment in wanted]

    def _allocate(self, slots: dict[int, Slot], segments: Iterable[int], compact: bool) -> int:
        """Add a slot for each segment that has none; return the bytes of the segments for which there is no room."""
        missing = 0
        for segment in segments:
            if segment not in slots:
                slot = self._residency.allocate(segment, compact)
                if slot is None:
                    missing += self._residency.span(segment)
                else:
                    slots[segment] = slot
        return missing

    def _make_room(self, key: ExpertKey, spared: Collection[ExpertKey], missing: int) -> int:
        """Make room for a demanded expert; return the bytes freed, 0 if nothing can leave now."""
        residency = self._residency
        if freed := residency.cancel(Urgency.BACKGROUND, 1, spared):
            return freed
        victim = residency.cheapest(spared, key.layer)
        if victim is None:
            if freed := residency.cancel(Urgency.PREFETCH):
                return freed
            victim = residency.cheapest((), key.layer)
        return 0 if victim is None else residency.evict(victim, missing)

    def _wait_for_room(self) -> None:
        if not self._residency.wait_for_unpinned():
            raise DymoeError("expert arena is full of experts in use; give more memory with --memory")

    def _make_spare_room(
        self, key: ExpertKey, segments: int, urgency: Urgency, kept: Collection[ExpertKey], missing: int
    ) -> int:
        """Make room as `volunteer` may; return the bytes freed, 0 if nothing may leave."""
        residency = self._residency
        if urgency is Urgency.PREFETCH and (freed := residency.cancel(Urgency.BACKGROUND, 1, kept)):
            return freed
        victim = residency.cheapest(kept, key.layer)
        if victim is None:
            return 0
        worth = residency.worth(key, segments - 1)
        if urgency is not Urgency.PREFETCH and residency.cost(victim) * WORTH_A_READ >= worth:
            return 0
        return residency.evict(victim, missing)

    @staticmethod
    def _give_up() -> None:
        raise _NoRoom


class _NoRoom(Exception):
    """Raised by `_give_up` when there is no room without waiting or evicting a kept expert."""
