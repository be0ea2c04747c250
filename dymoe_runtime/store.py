"""The expert store: delivers experts out of an arena of a byte budget, reading what is missing.

Demanded reads go before look-ahead reads, and these before what is read in the background.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dymoe_runtime.admission import Admission
from dymoe_runtime.arena import chunk_bytes
from dymoe_runtime.delivery import WINDOW, Delivered, Delivery, Want
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.eviction import Eviction
from dymoe_runtime.kernels.job import Coming
from dymoe_runtime.memory import memory_at
from dymoe_runtime.read_queue import Reader, Urgency
from dymoe_runtime.residency import Entry, Prepare, Residency, Shown, StoreStats
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tiers import RecordLayout

# Look-ahead reads what fits into the idle time this many times over: what is read too late is still read earlier.
IDLE_TIMES = 2
# Tokens whose uses are remembered where nothing has to leave memory.
RECENT_TOKENS = 256


class Held(NamedTuple):
    """What was prepared of experts, of which some are still coming."""

    experts: list[Any]
    coming: Coming | None = None
    entries: Sequence[tuple[Entry, int]] = ()  # of all and their tiers, where some are coming


class ExpertStore:
    """Keeps experts in an arena of `arena_bytes`, reading them with `reader`.

    `shape` is (layers, experts per layer); `experts` is how many there are where some layers have
    none. `eviction` says what leaves, by default what was used least. `prepare(tier, places)` makes
    what is delivered of the leading segments of an expert; it is asked again only after segments have
    left or moved. Without `overlap` nothing is delivered before all that is held at once has arrived. Without
    `backed` the arena is only counted: for a `reader` without files and a `prepare` that does not look.
    """

    def __init__(
        self,
        layout: RecordLayout,
        shape: tuple[int, int],
        reader: Reader,
        arena_bytes: int,
        eviction: Eviction | None = None,
        experts: int | None = None,
        prepare: Prepare = lambda tier, places: list(map(memory_at, places)),
        overlap: bool = True,
        backed: bool = True,
    ) -> None:
        experts = experts or shape[0] * shape[1]
        self._least_bytes = least_arena_bytes(layout, experts)
        if arena_bytes < self._least_bytes:
            raise DymoeError(
                f"expert arena of {arena_bytes} bytes is too small; the least that works is {self._least_bytes} bytes"
            )
        self.layout = layout
        self.observer: Callable[[Sequence[Want]], None] | None = None  # told of what is demanded
        self._shape = shape
        self._eviction = eviction or Eviction(shape, len(layout.ladder))
        arena_bytes = min(arena_bytes, full_arena_bytes(layout, shape[0] * shape[1]))
        self._memory = Residency(layout, shape, arena_bytes, reader, self._eviction, prepare, self._forget, backed)
        self._admission = Admission(self._memory)
        self._delivery = Delivery(self._memory, self._admission, overlap)
        self._full_bytes = full_arena_bytes(layout, experts)
        self._roomy = self.arena_bytes >= self._full_bytes
        self._lent: list[Entry] = []  # pinned until the next are asked for
        self._staying: dict[Want, Any] = {}  # prepared, where nothing ever has to leave
        self._segments_of = self._memory.segments_of
        # Where all fit, uses are only counted should that end.
        self._recent: deque[Sequence[Want]] = deque(maxlen=RECENT_TOKENS * shape[0])

    def close(self) -> bool:
        """End the reading threads; False where one still reads after some patience, and its file must stay open."""
        return self._memory.reads.close()

    @property
    def stats(self) -> StoreStats:
        return self._memory.stats

    def reset_stats(self) -> None:
        self._memory.reset_stats()

    @property
    def roomy(self) -> bool:
        """Whether all experts fit, so that nothing ever has to leave."""
        return self._roomy

    @property
    def arena_bytes(self) -> int:
        return self._memory.arena.chunks * self._memory.arena.chunk_bytes

    def scratch(self) -> np.ndarray:
        """The arena's memory, uint8 [bytes], for who measures something before the first read."""
        assert not self._memory.entries
        return self._memory.arena.memory

    def resident_bytes(self) -> int:
        return self._memory.nbytes()

    def tick(self, tokens: int = 1) -> None:
        """Tokens have passed: uses from now on count a little more than earlier ones."""
        self._eviction.tick(tokens)

    def resize(self, arena_bytes: int) -> None:
        """Give memory back, or take it again, until the arena has `arena_bytes`: what works, at most as at first."""
        self._let_go()
        for key, tier, tokens in itertools.chain.from_iterable(self._recent):
            self._eviction.use(key, self._segments_of[tier], tokens)
        self._recent.clear()
        for entry in list(self._memory.entries.values()):
            self._memory.refresh(entry)
        self._admission.resize(max(arena_bytes, self._least_bytes))
        self._roomy = self.arena_bytes >= self._full_bytes

    def begin(self, wants: Sequence[Want]) -> Generator[list[Delivered], None, None]:
        """Starts reading what is missing and yields the wanted experts as they come, each once.

        Those in memory come first, together as far as they can be held at once. Segments stay in place until the
        next are asked for, here or by another `begin`. The first reads are under way on return.
        """
        self._let_go()
        self._memory.settle()
        if self.observer is not None:
            self.observer(wants)
        together = self._delivery.resident(wants)
        delivery = self._deliver_together(wants) if together else self._delivery.as_they_come(wants)
        next(delivery)
        return delivery

    def at_hand(self, wants: Sequence[Want]) -> list[Any] | None:
        """What was prepared of all `wants` if they are in memory, where they stay until the next are asked for."""
        found = [self._staying.get(want) for want in wants] if self._roomy else [None]
        if None in found:
            self._let_go()
            self._memory.settle()
            if not self._delivery.resident(wants):
                return None
            found = [self._memory.prepared(self._memory.entries[want.key], want.tier) for want in wants]
            if self._roomy:
                self._staying.update(zip(wants, found, strict=True))
            else:
                self._lend(wants)
        self._count_hits(wants)
        if self.observer is not None:
            self.observer(wants)
        return found

    def hold(self, wants: Sequence[Want]) -> Held | None:
        """All of `wants` in place, some still to be filled; None where they can only be had as they come, by `begin`.

        They stay there until the next are asked for. Once those that are coming have been waited for: `arrived`.
        """
        found = self.at_hand(wants)
        if found is not None:
            return Held(found)
        missing = self._delivery.missing(wants)
        if missing is None:
            return None
        if self.observer is not None:
            self.observer(wants)
        there = [want for want in wants if want not in missing]
        self._lend(there)
        self._memory.counts.requests += len(there)
        self._memory.counts.hits += len(there)
        wanted = {want.key for want in wants}
        for want in missing:
            self._lent.append(self._delivery.demand(want, wanted))
        entries = [self._memory.entries[want.key] for want in wants]
        reads = []
        for rank, (want, entry) in enumerate(zip(wants, entries, strict=True)):
            if entry.read is not None and entry.read.first < self._segments_of[want.tier]:
                if entry.read.done:
                    self._memory.finish(entry)
                else:
                    reads.append((rank, entry.read))
        prepared = [self._memory.prepared(e, want.tier, coming=True) for want, e in zip(wants, entries, strict=True)]
        tiers = [want.tier for want in wants]
        return Held(prepared, self._memory.reads.coming(reads), list(zip(entries, tiers, strict=True)))

    def arrived(self, held: Held) -> None:
        """Raises what kept something from coming that was waited for."""
        if held.coming is None:
            return
        self._memory.counts.wait_s += held.coming.wait_s
        for rank, _ in held.coming.tickets:
            self._memory.finish(held.entries[rank][0])
        for entry, tier in held.entries:
            self._memory.show(entry, tier)

    def show(self, shown: Shown) -> None:
        """Tell `shown` of what need not be asked for here; `used` is to be told what was."""
        self._memory.shown = shown

    def used(self, wants: Sequence[Want]) -> None:
        """A token has used `wants`, which were shown."""
        self._let_go()
        self._count_hits(wants)
        if not self._roomy:
            for key, tier, tokens in wants:
                self._eviction.use(key, self._segments_of[tier], tokens)
                self._memory.refresh(self._memory.entries[key])

    def _lend(self, wants: Sequence[Want]) -> None:
        """Use what is resident, and keep it in its place."""
        for key, tier, tokens in wants:
            entry = self._memory.entries[key]
            self._eviction.use(key, self._segments_of[tier], tokens)
            self._memory.pin(entry)
            self._lent.append(entry)

    def _count_hits(self, wants: Sequence[Want]) -> None:
        counts = self._memory.counts
        counts.requests += len(wants)
        counts.hits += len(wants)
        if self._roomy:
            self._recent.append(wants)

    def tier_at_hand(self, want: Want) -> int:
        """The highest tier up to the wanted that can run without waiting; 0 if there is none."""
        self._memory.settle()
        entry = self._memory.entries.get(want.key)
        if entry is None:
            return 0
        reading = entry.read is not None and not (entry.read.done and entry.read.error is None)
        there = entry.read.first if entry.read is not None and reading else len(entry.slots)
        return self._tier_of(there, want.tier)

    def tier_on_its_way(self, want: Want) -> int:
        """The same, once the read of the expert that is under way has ended."""
        entry = self._memory.entries.get(want.key)
        return 0 if entry is None else self._tier_of(len(entry.slots), want.tier)

    def _tier_of(self, segments: int, most: int) -> int:
        """The highest tier up to `most` that so many segments make; 0 if they make none."""
        return max((t for t in self.layout.ladder if t <= most and self._segments_of[t] <= segments), default=0)

    def holds(self, layer: int, tier: int) -> bool:
        """Whether every expert of `layer` is in memory up to `tier`, or on its way."""
        return self._memory.held[layer][self._segments_of[tier] - 1] == self._shape[1]

    def look_ahead(self, wants: Sequence[Want], needed_now: Sequence[Want] = (), idle_s: float | None = None) -> None:
        """Start reading experts that will probably be wanted next, best guess first.

        Displaces what is used least, but none of `wants` and `needed_now`. `idle_s` is the time until they are
        wanted: no more is asked for than could come in about that time, at the speed that one read has.
        """
        self._memory.take_back(Urgency.GUESS)
        keep = {want.key for want in (*wants, *needed_now)}
        before, rate = self._memory.asked_bytes, self._memory.reads.bytes_per_s
        most = None if idle_s is None or rate is None else IDLE_TIMES * idle_s * rate
        for want in wants:
            if most is not None and self._memory.asked_bytes - before >= most:
                break
            if not self._volunteer(want, Urgency.GUESS, keep):
                break

    def preload(self, wants: Sequence[Want]) -> None:
        """Read these in the background, in their order, as far as there is room for them."""
        for want in wants:
            if not self._volunteer(want, Urgency.BACKGROUND, {want.key}):
                break

    def promote(self, wants: Sequence[Want], needed_now: Sequence[Want] = ()) -> None:
        """Read in the background what `wants` lacked just now, in place of what is used less.

        Raises what kept it from coming when it was read before: else nobody would ever be told.
        """
        if not wants:
            return
        for want in wants:
            if (error := self._memory.failed.pop(want.key, None)) is not None:
                raise error
        keep = {want.key for want in (*wants, *needed_now)}
        for want in wants:
            there = len(self._memory.entry(want.key).slots)
            self._eviction.use(want.key, self._segments_of[want.tier], first=there)
            self._volunteer(want, Urgency.BACKGROUND, keep)

    def _volunteer(self, want: Want, urgency: Urgency, keep: set[ExpertKey]) -> bool:
        """Whether `want` is there or on its way now."""
        entry = self._memory.entry(want.key)
        segments = self._segments_of[want.tier]
        if entry.read is not None:
            self._memory.reads.hurry(entry.read, urgency)
            return True
        if len(entry.slots) >= segments:
            return True
        return self._admission.volunteer(entry, segments, urgency, keep)

    def _let_go(self) -> None:
        for entry in self._lent:
            self._memory.unpin(entry)
        self._lent = []

    def _forget(self) -> None:
        """Something has moved."""
        self._staying.clear()

    def _deliver_together(self, wants: Sequence[Want]) -> Generator[list[Delivered], None, None]:
        """Yields once when `wants`, which are resident, are pinned till the next `begin`, then all of them."""
        self._count_hits(wants)
        if not self._roomy:
            self._lend(wants)
        yield []
        yield [self._delivery.delivered(want) for want in wants]


def least_arena_bytes(layout: RecordLayout, experts: int | None = None) -> int:
    """The smallest arena that can always hold the experts in use: all, if there are no more than these few."""
    least = WINDOW * len(layout.ladder) * chunk_bytes(layout.segment_spans)
    return least if experts is None else min(least, full_arena_bytes(layout, experts))


def full_arena_bytes(layout: RecordLayout, experts: int) -> int:
    """An arena that holds all of `experts` records."""
    chunk = chunk_bytes(layout.segment_spans)
    return chunk * sum(-(-experts // (chunk // span)) for span in layout.segment_spans)
