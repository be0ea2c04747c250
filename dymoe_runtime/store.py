"""The expert store: which segments of which experts are in memory, within a byte budget.

Only the caller's thread changes the books; reader threads fill buffers and nothing else.
Demanded reads go before look-ahead reads. What is evicted is always the last segment that
an expert has, the one least used first: refinement planes are used no more often than the
base plane below them, so they go first. Counts of use survive eviction and fade with time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from dymoe_runtime.arena import Arena, Slot, chunk_bytes
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.read_queue import IN_FLIGHT, Read, Reader, ReadQueue
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tiers import RecordLayout

# Experts held for the caller at once: one in use, the others arriving.
WINDOW = IN_FLIGHT + 1
# Uses count for less as later uses come: the weight of a use grows by this factor per token. At 1 the store
# forgets nothing (LFU), at 2 the last use is about all that counts (LRU).
GROWTH = 1.01
RESCALE_AT = 1e30


class Want(NamedTuple):
    key: ExpertKey
    tier: int


class Delivered(NamedTuple):
    """An expert that was wanted; `at(tier)` is what the store's `prepare` made of it, for tiers up to the wanted."""

    want: Want
    at: Callable[[int], Any]


@dataclass
class StoreStats:
    """Counts since the start or the last `reset`."""

    requests: int = 0  # experts asked for
    hits: int = 0  # of these, those that needed no read of their own
    read_bytes: int = 0  # all reads
    look_ahead_reads: int = 0
    look_ahead_bytes: int = 0
    look_ahead_hits: int = 0  # look-ahead reads that were used
    look_ahead_waste: int = 0  # look-ahead reads that were evicted or overtaken unused
    evictions: int = 0
    wait_s: float = 0.0  # for the reads of demanded experts

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(eq=False)
class _Entry:
    """An expert with at least one segment in memory or on its way."""

    key: ExpertKey
    slots: list[Slot] = field(default_factory=list)
    pins: int = 0
    read: Read | None = None
    guessed: int | None = None  # first of the segments that look-ahead read and nobody has used yet
    prepared: dict[int, Any] = field(default_factory=dict)  # by tier, while all segments stay where they are


class ExpertStore:
    """Keeps experts in an arena of `arena_bytes`, reading them with `reader`.

    `shape` is (layers, experts per layer); `experts` is how many there are where some layers have
    none. `prior` [layers, experts], if given, says how often each expert is expected per token, so
    that an early eviction is not blind. `prepare(tier, segments)` makes what is delivered of the
    leading segments of an expert; it is asked again only after segments have left or moved.
    """

    def __init__(
        self,
        layout: RecordLayout,
        shape: tuple[int, int],
        reader: Reader,
        arena_bytes: int,
        prior: np.ndarray | None = None,
        experts: int | None = None,
        prepare: Callable[[int, list[torch.Tensor]], Any] = lambda tier, segments: segments,
        growth: float = GROWTH,
    ) -> None:
        least = least_arena_bytes(layout)
        if arena_bytes < least:
            raise DymoeError(f"expert arena of {arena_bytes} bytes is too small; the least that works is {least} bytes")
        self.layout = layout
        self.stats = StoreStats()
        self.observer: Callable[[Sequence[Want]], None] | None = None  # told of what is demanded
        self._prepare = prepare
        self._growth = growth
        full = full_arena_bytes(layout, shape[0] * shape[1])
        self._arena = Arena(layout.segment_spans, min(arena_bytes, full), self._forget_prepared)
        self.arena_bytes = self._arena.chunks * self._arena.chunk_bytes
        self._roomy = self._arena.chunks >= full_arena_bytes(layout, experts or shape[0] * shape[1]) // chunk_bytes(
            layout.segment_spans
        )
        self._entries: dict[ExpertKey, _Entry] = {}
        self._lent: list[_Entry] = []  # pinned until the next are asked for
        self._staying: dict[Want, Any] = {}  # prepared, where nothing ever has to leave
        self._held = np.zeros((shape[0], len(layout.ladder)), np.int64)  # experts of each layer with each segment
        self._segments_of = {tier: layout.segments_of(tier) for tier in (0, *layout.ladder)}
        self._uses = np.zeros((*shape, len(layout.ladder)))
        if prior is not None:
            self._uses += prior[:, :, None]
        self._weight = 1.0
        self._cost = np.full(shape, np.inf)  # of evicting an expert's last segment; inf where it must stay
        self._reads = ReadQueue(reader)

    def close(self) -> None:
        self._reads.close()

    def reset_stats(self) -> None:
        self._cancel_guesses()
        self.stats = StoreStats()

    @property
    def roomy(self) -> bool:
        """Whether all experts fit, so that nothing ever has to leave."""
        return self._roomy

    def scratch(self) -> torch.Tensor:
        """The arena's memory, uint8 [bytes], for who measures something before the first read."""
        assert not self._entries
        return self._arena.memory

    def resident_bytes(self) -> int:
        return sum(self.layout.segment_spans[s.size_class] for entry in self._entries.values() for s in entry.slots)

    def tick(self) -> None:
        """A token has passed: uses from now on count a little more than earlier ones."""
        self._weight *= self._growth
        if self._weight > RESCALE_AT:
            self._uses /= self._weight
            self._cost /= self._weight
            self._weight = 1.0

    def begin(self, wants: Sequence[Want]) -> Generator[list[Delivered], None, None]:
        """Starts reading what is missing and yields the wanted experts as they come, each once.

        Those in memory come first, together as far as they can be held at once. Segments stay in place until the
        next are asked for, here or by another `begin`. The first reads are under way on return.
        """
        for entry in self._lent:
            self._unpin(entry)
        self._lent = []
        if self.observer is not None:
            self.observer(wants)
        delivery = self._deliver_together(wants) if self._resident(wants) else self._deliver(wants)
        next(delivery)
        return delivery

    def at_hand(self, wants: Sequence[Want]) -> list[Any] | None:
        """What was prepared of all `wants`, if they are in memory and nothing will ever have to leave it."""
        if not self._roomy:
            return None
        found = [self._staying.get(want) for want in wants]
        if None in found:
            if not self._resident(wants):
                return None
            found = [self._prepared(self._entries[key], tier) for key, tier in wants]
            self._staying.update(zip(wants, found, strict=True))
        self.stats.requests += len(wants)
        self.stats.hits += len(wants)
        if self.observer is not None:
            self.observer(wants)
        return found

    def tier_at_hand(self, want: Want) -> int:
        """The highest tier up to the wanted that can run without waiting; 0 if there is none."""
        entry = self._entries.get(want.key)
        if entry is None:
            return 0
        reading = entry.read is not None and not (entry.read.done.is_set() and entry.read.error is None)
        there = entry.read.first if entry.read is not None and reading else len(entry.slots)
        return max((t for t in self.layout.ladder if t <= want.tier and self._segments_of[t] <= there), default=0)

    def holds(self, layer: int, tier: int) -> bool:
        """Whether every expert of `layer` is in memory up to `tier`, or on its way."""
        return bool(self._held[layer, self._segments_of[tier] - 1] == self._cost.shape[1])

    def look_ahead(self, wants: Sequence[Want], needed_now: Sequence[Want] = (), idle_s: float | None = None) -> None:
        """Start reading experts that may be wanted soon, best guess first.

        Displaces only segments that are used less than the guesses, and none of `needed_now`.
        With `idle_s`, the time until they are wanted, no more than fits at the speed that one read has.
        """
        self._cancel_guesses()
        keep = {want.key for want in (*wants, *needed_now)}
        before, rate = self.stats.look_ahead_bytes, self._reads.bytes_per_s
        most = None if idle_s is None or rate is None else idle_s * rate
        for want in wants:
            if most is not None and self.stats.look_ahead_bytes - before >= most:
                break
            if not self._guess(want, keep):
                break

    def _resident(self, wants: Sequence[Want]) -> bool:
        """Whether none of `wants` has anything to wait for, nor anything new to count."""
        for want in wants:
            entry = self._entries.get(want.key)
            if entry is None or entry.read is not None or entry.guessed is not None:
                return False
            if len(entry.slots) < self._segments_of[want.tier]:
                return False
        return True

    def _deliver_together(self, wants: Sequence[Want]) -> Generator[list[Delivered], None, None]:
        """Yields once when `wants`, which are resident, are pinned till the next `begin`, then all of them."""
        self.stats.requests += len(wants)
        self.stats.hits += len(wants)
        if not self._roomy:
            for key, tier in wants:
                entry = self._entries[key]
                self._uses[key][: self._segments_of[tier]] += self._weight
                entry.pins += 1
                self._refresh(entry)
                self._lent.append(entry)
        yield []
        yield [self._delivered(want) for want in wants]

    def _delivered(self, want: Want) -> Delivered:
        return Delivered(want, partial(self._prepared, self._entries[want.key]))

    def _prepared(self, entry: _Entry, tier: int) -> Any:
        found = entry.prepared.get(tier)
        if found is None:
            needed = self._segments_of[tier]
            assert len(entry.slots) >= needed and (entry.read is None or entry.read.first >= needed), entry.key
            segments = [slot.memory for slot in entry.slots[:needed]]
            found = entry.prepared[tier] = self._prepare(tier, segments)
        return found

    def _forget_prepared(self, slot: Slot) -> None:
        """It has moved."""
        self._staying.clear()
        slot.owner.prepared.clear()

    def _deliver(self, wants: Sequence[Want]) -> Generator[list[Delivered], None, None]:
        """Yields once when the first reads are under way, then the wanted experts as they come."""
        # So many can always be held at once, in whatever chunks their segments lie.
        window = max(WINDOW, self._arena.chunks // len(self.layout.ladder))
        coming = self._in_turn(wants, window)
        wanted = {want.key for want in wants}
        held: dict[Want, _Entry] = {}
        started = False
        try:
            while coming or held or not started:
                while coming and len(held) < window:
                    want = coming.popleft()
                    held[want] = self._demand(want, wanted)
                if not started:
                    started = True
                    yield []
                    continue
                ready = [want for want, entry in held.items() if self._usable(entry, want.tier)]
                if not ready:
                    # All that is held is on its way, and reads end about in this order.
                    ready = [next(iter(held))]
                    self._finish(held[ready[0]])
                yield [self._delivered(want) for want in ready]
                for want in ready:
                    self._unpin(held.pop(want))
        finally:
            for entry in held.values():
                self._unpin(entry)

    def _in_turn(self, wants: Sequence[Want], window: int) -> deque[Want]:
        """Those in memory, to be held while the first of the others are read; then the rest."""
        there = [want for want in wants if self._resident([want])]
        known = set(there)
        missing = [want for want in wants if want not in known]
        first = max(1, window - IN_FLIGHT)
        return deque([*there[:first], *missing[:IN_FLIGHT], *there[first:], *missing[IN_FLIGHT:]])

    def _usable(self, entry: _Entry, tier: int) -> bool:
        """Whether all segments of `tier` are there; raises what kept them from coming."""
        read = entry.read
        if read is not None and read.first < self._segments_of[tier] and read.done.is_set():
            self._finish(entry)
            read = None
        return read is None or read.first >= self._segments_of[tier]

    def _demand(self, want: Want, wanted: set[ExpertKey]) -> _Entry:
        """Pin the entry of `want`, reading what it lacks."""
        entry = self._entries.setdefault(want.key, _Entry(want.key))
        segments = self._segments_of[want.tier]
        self._uses[want.key][:segments] += self._weight
        self.stats.requests += 1
        entry.pins += 1
        # From here on it is in use, and room for its own next segments must not cost it these.
        self._refresh(entry)
        try:
            if entry.guessed is not None and entry.guessed < segments:
                self._claim_guess(entry)
            missing = segments - len(entry.slots)
            self.stats.hits += missing <= 0
            if missing > 0:
                self._finish(entry)
                self._read(entry, self._make_rooms(entry, segments, wanted))
        except BaseException:
            self._unpin(entry)
            raise
        return entry

    def _make_rooms(self, entry: _Entry, segments: int, wanted: set[ExpertKey]) -> list[Slot]:
        """Slots for what the entry lacks of its first `segments`; all or, with the error, none."""
        slots: list[Slot] = []
        try:
            for size_class in range(len(entry.slots), segments):
                slots.append(self._make_room(size_class, wanted))
        except BaseException:
            for slot in slots:
                self._arena.free(slot)
            raise
        return slots

    def _read(self, entry: _Entry, slots: list[Slot], guess: bool = False) -> None:
        for slot in slots:
            slot.owner = entry
        read = Read(entry.key, len(entry.slots), [slot.memory for slot in slots], guess)
        entry.slots += slots
        self._held[entry.key.layer, read.first : read.first + len(slots)] += 1
        entry.read = read
        self.stats.read_bytes += sum(len(slot.memory) for slot in slots)
        self._reads.submit(read)

    def _finish(self, entry: _Entry) -> None:
        """Wait for the entry's read; on an error give its memory back and raise it."""
        read = entry.read
        if read is None:
            return
        started = time.perf_counter()
        read.done.wait()
        self.stats.wait_s += time.perf_counter() - started
        entry.read = None
        if read.error is not None:
            self._drop(entry, read.first)
            raise read.error

    def _drop(self, entry: _Entry, first: int) -> None:
        """Give back the segments of an entry from `first` on."""
        for slot in entry.slots[first:]:
            self._arena.free(slot)
        entry.prepared.clear()
        self._held[entry.key.layer, first : len(entry.slots)] -= 1
        del entry.slots[first:]

    def _unpin(self, entry: _Entry) -> None:
        entry.pins -= 1
        self._refresh(entry)

    def _refresh(self, entry: _Entry) -> None:
        """Bring the eviction cost and the movability of an entry up to date."""
        if entry.read is not None and entry.pins == 0 and entry.read.done.is_set():
            if entry.read.error is not None:
                self._undo(entry.read)
                return
            entry.read = None
        free = entry.pins == 0 and entry.read is None
        for slot in entry.slots:
            slot.movable = free
        self._cost[entry.key] = self._uses[entry.key][len(entry.slots) - 1] if free and entry.slots else np.inf
        if not entry.slots and entry.pins == 0:
            self._entries.pop(entry.key, None)

    def _make_room(self, size_class: int, wanted: set[ExpertKey]) -> Slot:
        """A slot for a demanded segment, evicting what is least used; what is wanted now goes last."""
        while True:
            self._settle()
            slot = self._arena.allocate(size_class)
            if slot is not None:
                return slot
            victim = self._cheapest(wanted)
            if victim is None and self._cancel_guesses():
                continue
            victim = victim or self._cheapest(set())
            if victim is not None:
                self._evict(victim)
            elif not self._wait_for_unpinned():
                raise DymoeError("expert arena is full of experts in use; give more memory with --memory")

    def _cheapest(self, spared: set[ExpertKey]) -> _Entry | None:
        cost = self._cost
        if spared:
            cost = cost.copy()
            for key in spared:
                cost[key] = np.inf
        index = int(cost.argmin())
        key = ExpertKey(*divmod(index, cost.shape[1]))
        return self._entries[key] if cost[key] < np.inf else None

    def _evict(self, entry: _Entry) -> None:
        self._drop(entry, len(entry.slots) - 1)
        if entry.guessed is not None and entry.guessed <= len(entry.slots):
            entry.guessed = None
            self.stats.look_ahead_waste += 1
        self.stats.evictions += 1
        self._refresh(entry)

    def _settle(self) -> None:
        """Reads that have arrived for nobody in particular may be evicted like anything else."""
        for read in self._reads.finished():
            entry = self._entries.get(read.key)
            if entry is not None and entry.read is read:
                self._refresh(entry)

    def _cancel_guesses(self) -> bool:
        """Take back look-ahead reads that have not started; whether there were any."""
        cancelled = self._reads.cancel_guesses()
        for read in cancelled:
            self._undo(read)
        return bool(cancelled)

    def _wait_for_unpinned(self) -> bool:
        """Wait for a read that nobody holds, so that it can be evicted; whether there was one."""
        under_way = next((e.read for e in self._entries.values() if e.read is not None and e.pins == 0), None)
        if under_way is not None:
            under_way.done.wait()
        return under_way is not None

    def _guess(self, want: Want, keep: set[ExpertKey]) -> bool:
        """Read `want` ahead; False where that would displace something better."""
        entry = self._entries.setdefault(want.key, _Entry(want.key))
        segments = self._segments_of[want.tier]
        if entry.read is not None or len(entry.slots) >= segments:
            return True
        slots: list[Slot] = []
        for size_class in range(len(entry.slots), segments):
            slot = self._room_for_guess(size_class, want.key, keep)
            if slot is None:
                for taken in slots:
                    self._arena.free(taken)
                self._refresh(entry)
                return False
            slots.append(slot)
        entry.guessed = len(entry.slots)
        self.stats.look_ahead_reads += 1
        self.stats.look_ahead_bytes += sum(len(slot.memory) for slot in slots)
        self._read(entry, slots, guess=True)
        self._refresh(entry)
        return True

    def _room_for_guess(self, size_class: int, key: ExpertKey, keep: set[ExpertKey]) -> Slot | None:
        while True:
            slot = self._arena.allocate(size_class)
            if slot is not None:
                return slot
            victim = self._cheapest(keep)
            if victim is None or self._cost[victim.key] >= self._uses[key][size_class]:
                return None
            self._evict(victim)

    def _claim_guess(self, entry: _Entry) -> None:
        entry.guessed = None
        self.stats.look_ahead_hits += 1
        if entry.read is not None:
            self._reads.hurry(entry.read)

    def _undo(self, read: Read) -> None:
        """Forget a read that was never started, or that failed while nobody waited for it."""
        entry = self._entries[read.key]
        entry.read, entry.guessed = None, None
        self._drop(entry, read.first)
        if read.error is None:
            self.stats.look_ahead_reads -= 1
            nbytes = sum(len(buffer) for buffer in read.buffers)
            self.stats.look_ahead_bytes -= nbytes
            self.stats.read_bytes -= nbytes
        self._refresh(entry)


def least_arena_bytes(layout: RecordLayout) -> int:
    """The smallest arena that can always hold the experts in use."""
    return WINDOW * len(layout.ladder) * chunk_bytes(layout.segment_spans)


def full_arena_bytes(layout: RecordLayout, experts: int) -> int:
    """An arena that holds all of `experts` records."""
    chunk = chunk_bytes(layout.segment_spans)
    return chunk * sum(-(-experts // (chunk // span)) for span in layout.segment_spans)
