"""The segments of one expert that are in memory or being read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dymoe_runtime.memory import Place
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import Slot
from dymoe_runtime.store.request import Read

P = TypeVar("P")  # an expert as prepared for the caller, such as views for the kernels


@dataclass(eq=False, slots=True)
class Entry(Generic[P]):
    """One expert and its leading segments that are in memory or being read. Only its `Residency` changes it."""

    key: ExpertKey
    slots: list[Slot] = field(default_factory=list)  # one for each leading segment
    read: Read | None = None
    pins: int = 0
    prefetched: list[int] = field(default_factory=list)  # first segment of each prefetch that has not been used yet
    prepared: dict[int, P] = field(default_factory=dict)  # by tier, while its segments stay where they are
    announced: set[int] = field(default_factory=set)  # tiers that the listener knows

    @property
    def free(self) -> bool:
        """Return whether the segments may be moved or evicted."""
        return self.pins == 0 and self.read is None

    @property
    def segments(self) -> int:
        """Return the number of segments that are in memory or being read."""
        return len(self.slots)

    def arrived(self) -> int:
        """Return the number of segments that can be used without waiting."""
        read = self.read
        return len(self.slots) if read is None or (read.done and read.error is None) else read.first

    def lacks(self, segments: int) -> bool:
        """Return whether any of the first `segments` segments is missing, or part of a read that was not reaped."""
        return len(self.slots) < segments or (self.read is not None and self.read.first < segments)

    def places(self, segments: int) -> list[Place]:
        """Return the places of the first `segments` segments."""
        return [slot.place for slot in self.slots[:segments]]

    def begin(self, read: Read, slots: Sequence[Slot]) -> None:
        """Add slots that a read will fill."""
        for slot in slots:
            slot.give_to(self)
        self.slots += slots
        self.read = read

    def end(self) -> None:
        """Forget the read, which has ended."""
        self.read = None

    def cut(self, first: int) -> list[Slot]:
        """Remove the segments from `first` on; return their slots."""
        cut = self.slots[first:]
        del self.slots[first:]
        return cut

    def pin(self) -> None:
        """Hold all segments in place until `unpin`."""
        self.pins += 1

    def unpin(self) -> None:
        """Undo one `pin`."""
        self.pins -= 1

    def claim_prefetches(self, segments: int) -> int:
        """Return how many unused prefetches a use of the first `segments` claims, and mark them used."""
        left = [first for first in self.prefetched if first >= segments]
        claimed = len(self.prefetched) - len(left)
        self.prefetched = left
        return claimed

    def drop_prefetches(self, first: int) -> int:
        """Return how many unused prefetches begin at segment `first` or later, and forget them."""
        kept = [start for start in self.prefetched if start < first]
        dropped = len(self.prefetched) - len(kept)
        self.prefetched = kept
        return dropped
