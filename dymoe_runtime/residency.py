"""What of which expert is in memory: slots of the arena, and reads on their way.

Only the caller's thread changes the books; reader threads fill buffers and check what they read. What leaves is
always the last segment that an expert has: refinement planes are used no more often than the base plane below them,
so they go first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dymoe_runtime.arena import Arena, Slot
from dymoe_runtime.eviction import Eviction
from dymoe_runtime.memory import Place
from dymoe_runtime.read_queue import Read, Reader, ReadQueue, Urgency
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tiers import RecordLayout

# (tier, places of the leading segments of an expert) -> what is delivered of it.
Prepare = Callable[[int, list[Place]], Any]


@dataclass
class StoreStats:
    """Counts since the start or the last `reset_stats`."""

    requests: int = 0  # experts asked for
    hits: int = 0  # of these, those that needed no read of their own
    read_bytes: int = 0  # all reads
    look_ahead_reads: int = 0
    look_ahead_bytes: int = 0
    look_ahead_hits: int = 0  # look-ahead reads that were used
    look_ahead_evicted: int = 0  # look-ahead reads that were evicted unused
    background_bytes: int = 0  # read before anybody wanted it, but not for the next layer
    evictions: int = 0
    wait_s: float = 0.0  # for the reads of demanded experts


class Shown(Protocol):
    """Told of every expert and tier that can be used as it was prepared, and when that ends."""

    def put(self, key: ExpertKey, tier: int, prepared: Any) -> None: ...

    def remove(self, key: ExpertKey, tier: int) -> None: ...


@dataclass(eq=False, slots=True)
class Entry:
    """An expert with at least one segment in memory or on its way."""

    key: ExpertKey
    slots: list[Slot] = field(default_factory=list)
    pins: int = 0
    read: Read | None = None
    guessed: list[int] = field(default_factory=list)  # first segment of each look-ahead read that nobody has used yet
    prepared: dict[int, Any] = field(default_factory=dict)  # by tier, while its segments stay where they are
    shown: int = 0  # a bit for each tier that was shown

    @property
    def free(self) -> bool:
        """Whether its segments may move or leave."""
        return self.pins == 0 and self.read is None


class Residency:
    """The books of an arena. `moved` is called where something prepared has become invalid."""

    def __init__(
        self,
        layout: RecordLayout,
        shape: tuple[int, int],
        arena_bytes: int,
        reader: Reader,
        eviction: Eviction,
        prepare: Prepare,
        moved: Callable[[], None],
        backed: bool = True,
    ) -> None:
        self.asked_bytes = 0  # of reads that were submitted
        self.counts = StoreStats()  # but for reads under way: `stats` has all
        self.arena = Arena(layout.segment_spans, arena_bytes, _movable, self._forget_prepared, backed)
        self.eviction = eviction
        self.reads = ReadQueue(reader, self.arena.memory)
        self.entries: dict[ExpertKey, Entry] = {}
        self.failed: dict[ExpertKey, BaseException] = {}  # reads in the background that nobody has waited for
        self.held = [[0] * len(layout.ladder) for _ in range(shape[0])]  # experts of each layer with each segment
        self.segments_of = {tier: layout.segments_of(tier) for tier in (0, *layout.ladder)}
        self.spans = layout.segment_spans
        self._prepare = prepare
        self.moved = moved
        self.shown: Shown | None = None

    @property
    def stats(self) -> StoreStats:
        """Reads count from when a thread has started them."""
        self._count_reads()
        return self.counts

    def _count_reads(self) -> None:
        for read in self.reads.started():
            self.counts.read_bytes += read.nbytes
            if read.purpose is Urgency.GUESS:
                self.counts.look_ahead_reads += 1
                self.counts.look_ahead_bytes += read.nbytes
            elif read.purpose is Urgency.BACKGROUND:
                self.counts.background_bytes += read.nbytes

    def reset_stats(self) -> None:
        self.take_back(Urgency.GUESS)
        for entry in self.entries.values():
            entry.guessed.clear()
        self.reads.started()  # they count for what was before
        self.counts = StoreStats()

    def entry(self, key: ExpertKey) -> Entry:
        """Of this expert, with a read only if that is under way or somebody holds what it reads."""
        entry = self.entries.get(key)
        if entry is not None and entry.read is not None:
            self.settle()  # what failed while nobody wanted it was never read
            entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = Entry(key)
        return entry

    def nbytes(self) -> int:
        """Of all segments that are in memory or on their way."""
        return sum(slot.place[1] for entry in self.entries.values() for slot in entry.slots)

    def prepared(self, entry: Entry, tier: int, coming: bool = False) -> Any:
        """What `prepare` made of the expert at `tier`, all segments of which are there, or `coming`."""
        found = entry.prepared.get(tier)
        if found is None:
            needed = self.segments_of[tier]
            assert len(entry.slots) >= needed, entry.key
            assert coming or entry.read is None or entry.read.first >= needed, entry.key
            found = entry.prepared[tier] = self._prepare(tier, [slot.place for slot in entry.slots[:needed]])
        if not coming:
            self.show(entry, tier)
        return found

    def show(self, entry: Entry, tier: int) -> None:
        """All segments of the tier are there, and prepared, and there is nothing left to count of their reads."""
        if self.shown is not None and not entry.shown >> tier & 1:
            entry.shown |= 1 << tier
            self.shown.put(entry.key, tier, entry.prepared[tier])

    def _forget(self, entry: Entry, segments: int) -> None:
        """Of what was prepared only what needs no more than so many segments still holds."""
        for tier in [tier for tier in entry.prepared if self.segments_of[tier] > segments]:
            if self.shown is not None and entry.shown >> tier & 1:
                self.shown.remove(entry.key, tier)  # before it is gone
                entry.shown &= ~(1 << tier)
            del entry.prepared[tier]

    def pin(self, entry: Entry) -> None:
        entry.pins += 1
        self.eviction.hold(entry.key)

    def unpin(self, entry: Entry) -> None:
        entry.pins -= 1
        if not entry.pins:
            self.refresh(entry)

    def refresh(self, entry: Entry) -> None:
        """Bring the eviction cost of an entry up to date."""
        read = entry.read
        if read is not None and read.done and not entry.pins:
            if read.error is not None:
                if read.purpose is Urgency.BACKGROUND:
                    self.failed[read.key] = read.error
                self.undo(read)
                return
            entry.read = None
            self.failed.pop(read.key, None)
        if entry.free and entry.slots:
            self.eviction.offer(entry.key, len(entry.slots) - 1)
            return
        self.eviction.hold(entry.key)
        if not entry.slots and not entry.pins:
            self.entries.pop(entry.key, None)

    def finish(self, entry: Entry) -> None:
        """Wait for the entry's read; on an error give its memory back and raise it."""
        read = entry.read
        if read is None:
            return
        self._wait(read)
        entry.read = None
        if read.error is not None:
            self._drop(entry, read.first)
            raise read.error
        self.failed.pop(read.key, None)

    def _wait(self, read: Read) -> None:
        self.reads.hurry(read)
        started = time.perf_counter()
        self.reads.wait(read)
        self.counts.wait_s += time.perf_counter() - started

    def take_back(self, urgency: Urgency, most: int | None = None, spared: Collection[ExpertKey] = ()) -> int:
        """Take back reads of that urgency that have not started, but none of what is spared; their bytes."""
        cancelled = self.reads.take_back(urgency, most, spared)
        if not cancelled:
            return 0
        for read in cancelled:
            self.undo(read)
        return sum(read.nbytes for read in cancelled)

    def undo(self, read: Read) -> None:
        """Forget a read that was never started, or that failed while nobody waited for it."""
        entry = self.entries[read.key]
        entry.read = None
        self._drop(entry, read.first)
        entry.guessed = [first for first in entry.guessed if first < read.first]
        self.refresh(entry)

    def _forget_prepared(self, slot: Slot) -> None:
        """It has moved."""
        self.moved()
        self._forget(slot.owner, 0)

    def read(self, entry: Entry, slots: list[Slot], urgency: Urgency = Urgency.DEMAND) -> None:
        """Fill `slots` with the next segments of an entry."""
        for slot in slots:
            slot.owner = entry
        read = Read(entry.key, len(entry.slots), [slot.place for slot in slots], urgency)
        entry.slots += slots
        self._hold(entry.key.layer, range(read.first, len(entry.slots)), 1)
        entry.read = read
        if urgency is Urgency.GUESS:
            entry.guessed.append(read.first)
        self.asked_bytes += read.nbytes
        self.reads.submit(read)

    def _drop(self, entry: Entry, first: int) -> None:
        """Give back the segments of an entry from `first` on."""
        self._forget(entry, first)
        self._hold(entry.key.layer, range(first, len(entry.slots)), -1)
        gone = entry.slots[first:]
        del entry.slots[first:]
        for slot in gone:
            self.arena.free(slot)

    def _hold(self, layer: int, segments: Iterable[int], more: int) -> None:
        for segment in segments:
            self.held[layer][segment] += more

    def evict(self, entry: Entry, missing: int = 0) -> int:
        """Its last segment, and those before that are worth no more until so many bytes are free; how many are."""
        cost, left, freed = self.eviction.cost(entry.key), len(entry.slots), 0
        while left and (not freed or (freed < missing and self.eviction.worth(entry.key, left - 1) <= cost)):
            left -= 1
            freed += self.spans[left]
        self.counts.evictions += len(entry.slots) - left
        self._drop(entry, left)
        if entry.guessed:
            used = [first for first in entry.guessed if first < left]
            self.counts.look_ahead_evicted += len(entry.guessed) - len(used)
            entry.guessed = used
        self.refresh(entry)
        return freed

    def settle(self) -> None:
        """Reads that have arrived for nobody in particular may be evicted like anything else."""
        ended = self.reads.finished()
        for read in ended:
            entry = self.entries.get(read.key)
            if entry is not None and entry.read is read:
                self.refresh(entry)
        if ended:
            self._count_reads()

    def wait_for_unpinned(self) -> bool:
        """Wait for a read that nobody holds, so that it can be evicted; whether there was one."""
        under_way = next((e.read for e in self.entries.values() if e.read is not None and e.pins == 0), None)
        if under_way is not None:
            self._wait(under_way)
        return under_way is not None


def _movable(slot: Slot) -> bool:
    """Not before it is known what it is for."""
    return slot.owner is not None and slot.owner.free
