"""Gives out the experts that are wanted as they come: those in memory first, the others as their reads end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

from dymoe_runtime.admission import Admission
from dymoe_runtime.read_queue import IN_FLIGHT
from dymoe_runtime.residency import Entry, Residency
from dymoe_runtime.spec import ExpertKey

# Experts held for the caller at once: one in use, the others arriving.
WINDOW = IN_FLIGHT + 1


class Want(NamedTuple):
    key: ExpertKey
    tier: int
    tokens: int = 1  # that use it


class Delivered(NamedTuple):
    """An expert that was wanted; `at(tier)` is what the store's `prepare` made of it, for tiers up to the wanted."""

    want: Want
    at: Callable[[int], Any]


class Delivery:
    """Experts out of `memory`. Without `overlap` nothing is given out before all that is held at once has arrived."""

    def __init__(self, memory: Residency, admission: Admission, overlap: bool) -> None:
        self._memory = memory
        self._admission = admission
        self._segments_of = memory.segments_of
        self._overlap = overlap

    def resident(self, wants: Sequence[Want]) -> bool:
        """Whether none of `wants` has anything to wait for, nor anything new to count."""
        return all(map(self._is_resident, wants))

    def _is_resident(self, want: Want) -> bool:
        entry, segments = self._memory.entries.get(want.key), self._segments_of[want.tier]
        if entry is None or not segments or len(entry.slots) < segments:
            return False
        if entry.read is not None and entry.read.first < segments:
            return False
        return not (entry.guessed and entry.guessed[0] < segments)

    def delivered(self, want: Want) -> Delivered:
        return Delivered(want, partial(self._memory.prepared, self._memory.entries[want.key]))

    def missing(self, wants: Sequence[Want]) -> list[Want] | None:
        """Of `wants` what is not there; None where not all can be held at once with a single read for each."""
        if not self._overlap or len(wants) > self._window() or any(map(self._is_read_at_less, wants)):
            return None
        return [want for want in wants if not self._is_resident(want)]

    def _window(self) -> int:
        """So many can always be held at once, in whatever chunks their segments lie."""
        return max(WINDOW, self._memory.arena.chunks // len(self._memory.spans))

    def as_they_come(self, wants: Sequence[Want]) -> Generator[list[Delivered], None, None]:
        """Yields once when the first reads are under way, then the wanted experts as they come."""
        window = self._window()
        coming = self._in_turn(wants, window)
        wanted = {want.key for want in wants}
        held: dict[Want, Entry] = {}
        started = False
        try:
            while coming or held or not started:
                while coming and len(held) < window:
                    want = coming.popleft()
                    held[want] = self.demand(want, wanted)
                if not started:
                    started = True
                    yield []
                    continue
                self._memory.settle()
                if not self._overlap:
                    for want, entry in held.items():
                        self._finish(want, entry, wanted)
                ready = [want for want, entry in held.items() if self._usable(want, entry, wanted)]
                if not ready:
                    # All that is held is on its way, and reads end about in this order.
                    ready = [next(iter(held))]
                    self._finish(ready[0], held[ready[0]], wanted)
                yield [self.delivered(want) for want in ready]
                for want in ready:
                    self._memory.unpin(held.pop(want))
        finally:
            for entry in held.values():
                self._memory.unpin(entry)

    def _in_turn(self, wants: Sequence[Want], window: int) -> deque[Want]:
        """Those in memory, to be held while the first of the others are read; then the rest, of two reads last."""
        there = [want for want in wants if self._is_resident(want)]
        known = set(there)
        missing = sorted((want for want in wants if want not in known), key=self._is_read_at_less)
        first = max(1, window - IN_FLIGHT)
        return deque([*there[:first], *missing[:IN_FLIGHT], *there[first:], *missing[IN_FLIGHT:]])

    def _is_read_at_less(self, want: Want) -> bool:
        entry = self._memory.entries.get(want.key)
        return entry is not None and entry.read is not None and len(entry.slots) < self._segments_of[want.tier]

    def _usable(self, want: Want, entry: Entry, wanted: set[ExpertKey]) -> bool:
        """Whether all segments of its tier are there; raises what kept them from coming."""
        segments = self._segments_of[want.tier]
        if entry.read is not None and entry.read.first < segments:
            if not entry.read.done:
                return False
            self._memory.finish(entry)
        self._read_rest(want, entry, wanted)
        return len(entry.slots) >= segments and (entry.read is None or entry.read.first >= segments)

    def _finish(self, want: Want, entry: Entry, wanted: set[ExpertKey]) -> None:
        """Wait until all segments of its tier are there."""
        while not self._usable(want, entry, wanted):
            self._memory.finish(entry)

    def _read_rest(self, want: Want, entry: Entry, wanted: set[ExpertKey]) -> None:
        """Start to read what an entry lacks, unless it is being read: then after that."""
        segments = self._segments_of[want.tier]
        if entry.read is None and len(entry.slots) < segments:
            self._admission.demand(entry, segments, wanted)

    def demand(self, want: Want, wanted: set[ExpertKey]) -> Entry:
        """Pin the entry of `want`, reading what it lacks."""
        entry = self._memory.entry(want.key)
        segments = self._segments_of[want.tier]
        self._memory.eviction.use(want.key, segments, want.tokens)
        counts = self._memory.counts
        counts.requests += 1
        # From here on it is in use, and room for its own next segments must not cost it these.
        self._memory.pin(entry)
        try:
            if entry.read is not None and entry.read.first < segments:
                self._memory.reads.hurry(entry.read)
            if entry.guessed:
                left = [first for first in entry.guessed if first >= segments]
                counts.look_ahead_hits += len(entry.guessed) - len(left)
                entry.guessed = left
            counts.hits += len(entry.slots) >= segments
            self._read_rest(want, entry, wanted)
        except BaseException:
            self._memory.unpin(entry)
            raise
        return entry
