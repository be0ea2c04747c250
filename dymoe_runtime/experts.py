"""The seam between decoder and store: choose tiers, fetch, compute, combine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from dymoe_runtime import kernels
from dymoe_runtime.cost import CostModel
from dymoe_runtime.decoder import Routing
from dymoe_runtime.delivery import Delivered, Want
from dymoe_runtime.kernels.job import Job
from dymoe_runtime.look_ahead import LookAhead
from dymoe_runtime.policy import TierRule
from dymoe_runtime.read_queue import LATELY
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import ExpertStore

# More than the highest tier.
TIERS = 16


@dataclass
class TierStats:
    """How many (token, expert) pairs ran at each tier."""

    used: dict[int, int] = field(default_factory=dict)

    def add(self, tiers: np.ndarray) -> None:
        for tier, count in enumerate(np.bincount(tiers.reshape(-1)).tolist()):
            if count:
                self.used[tier] = self.used.get(tier, 0) + count

    def add_each(self, tiers: Sequence[int]) -> None:
        for tier in set(tiers):
            self.used[tier] = self.used.get(tier, 0) + tiers.count(tier)

    @property
    def bits_mean(self) -> float:
        total = sum(self.used.values())
        return sum(tier * count for tier, count in self.used.items()) / total if total else 0.0

    def shares(self) -> dict[str, float]:
        total = sum(self.used.values())
        return {str(tier): self.used[tier] / total for tier in sorted(self.used)}


class StoredExperts:
    """Routed experts out of an ExpertStore, each at the tier that `rule` chooses."""

    def __init__(
        self, store: ExpertStore, rule: TierRule, activation: str, look_ahead: LookAhead | None = None
    ) -> None:
        self.store = store
        self.rule = rule
        self.stats = TierStats()
        self._activation = activation
        self.decided: Callable[[int, Sequence[int]], list[int]] | None = None  # in place of the rule for single tokens
        self.latency = False  # decoding, do not wait for more of an expert below the highest tier than it must have
        self.look_ahead = look_ahead
        self.looks_ahead = True  # whether it is used just now
        self.cost: CostModel | None = None  # to read no further ahead than there is time for
        self._left: tuple[int, float] | None = None  # the layer of the last call and when it ended, if one token's
        self._between_s = 0.0  # from there to the next layer's call, lately
        self._wants = cache(lambda layer, expert, tier: Want(ExpertKey(layer, expert), tier))

    def __call__(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        if len(routing.gates) == 1 and routing.token_weights is None:
            return self._run_token(layer, h, routing, time.perf_counter())
        chosen = self.rule.choose(layer, routing)
        self.stats.add(chosen)
        work = plan_tokens(routing.experts, chosen)
        wants = [
            Want(ExpertKey(layer, expert), max(run.tier for run in runs), sum(run.rows for run in runs))
            for expert, runs in work.runs.items()
        ]
        delivery = self.store.begin(wants)
        self._read_ahead(layer, routing, wants, None)
        self._left = None
        return self._run(delivery, work, h, routing.gates)

    def _run_token(self, layer: int, h: np.ndarray, routing: Routing, entered: float) -> np.ndarray:
        experts, gates = routing.of_token()
        tiers, lacking = self._tiers_of_token(layer, experts, gates)
        self.stats.add_each(tiers)
        wants = [self._wants(layer, expert, tier) for expert, tier in zip(experts, tiers, strict=True) if tier]
        held = self.store.hold(wants) if wants else None
        delivery = self.store.begin(wants) if held is None else ()
        if lacking:
            self.store.promote(lacking, wants)
        self._read_ahead(layer, routing, wants, entered)
        if held is not None:
            wanted = routing.gates if len(wants) == len(experts) else routing.gates[:, np.array(tiers) > 0]
            y = kernels.moe_token(held.experts, h, wanted, self._activation, held.coming)
            self.store.arrived(held)
        else:
            y = self._run(delivery, plan_token(experts, tiers), h, routing.gates)
        self._left = (layer, time.perf_counter())
        return y

    def ran(self, used: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> None:
        """A token has chosen, in a layer, experts at tiers that the store had shown; 0 is skipped."""
        self._left = None
        for layer, experts, tiers in used:
            self.stats.add_each(tiers)
            pairs = zip(experts, tiers, strict=True)
            self.store.used([self._wants(layer, expert, tier) for expert, tier in pairs if tier])

    def looks_beyond(self) -> bool:
        """Whether there is more to be done for a decoded token than to run its experts."""
        if self.decided is not None:
            return True
        ahead = self.look_ahead if self.looks_ahead else None
        return ahead is not None and any(
            ranks and not self.store.holds(layer, self.rule.highest[layer]) for layer, ranks in ahead.ranks.items()
        )

    def _run(self, delivery: Iterable[list[Delivered]], work: Work, h: np.ndarray, gates: np.ndarray) -> np.ndarray:
        # Kept by pair, so that the sum does not depend on which expert arrived first.
        y = np.empty((len(work.tokens), h.shape[1]), np.float32)
        for batch in delivery:
            jobs = [Job(at(run.tier), run.first, run.rows) for want, at in batch for run in work.runs[want.key.expert]]
            kernels.moe(jobs, h, work.tokens, y, self._activation)
        return kernels.combine(y, work.rows, gates)

    def _tiers_of_token(
        self, layer: int, experts: Sequence[int], gates: Sequence[float]
    ) -> tuple[list[int], list[Want]]:
        """The tiers to run now, and what they would be if it were in memory.

        With `latency` what is there of an expert of less than the highest tier, of one that is not there at all the
        lowest, and all of one of the highest.
        """
        if self.decided is not None:
            return self.decided(layer, experts), []
        tiers = self.rule.choose_for_token(layer, experts, gates)
        if not self.latency:
            return tiers, []
        highest, wants = self.rule.ladder[-1], self._wants
        chosen = [wants(layer, expert, tier) for expert, tier in zip(experts, tiers, strict=True)]
        now = [want.tier if want.tier in (0, highest) else self._least_waiting(want) for want in chosen]
        return now, [want for want, tier in zip(chosen, now, strict=True) if tier < want.tier]

    def _least_waiting(self, want: Want) -> int:
        """The tier to run without waiting; else with the read that is under way, else with the smallest."""
        return self.store.tier_at_hand(want) or self.store.tier_on_its_way(want) or self.rule.ladder[0]

    def _idle_s(self, layer: int, wants: Sequence[Want], entered: float) -> float | None:
        """How long it takes until the next layer's experts are wanted; None where that is not known."""
        if self.cost is None:
            return None
        if self._left is not None and self._left[0] == layer - 1:
            self._between_s += LATELY * (entered - self._left[1] - self._between_s)
        return self._between_s + self.cost.layer((want.tier, 1) for want in wants)

    def _read_ahead(self, layer: int, routing: Routing, wants: Sequence[Want], entered: float | None) -> None:
        """Start to read for the next layer, unless there is nothing of it to read; `entered`: of a single token."""
        ahead, coming = self.look_ahead, layer + 1
        if ahead is None or not self.looks_ahead or not ahead.ranks.get(coming):
            return
        if not self.store.holds(coming, self.rule.highest[coming]):
            idle_s = None if entered is None else self._idle_s(layer, wants, entered)
            self.store.look_ahead(ahead.wants(coming, routing, self.rule), wants, idle_s)


class Run(NamedTuple):
    """Rows [first, first + rows) of a call run at `tier`."""

    tier: int
    first: int
    rows: int


@dataclass(frozen=True)
class Work:
    """The (token, expert) pairs of a call, ordered by expert and tier; each has a row, skipped ones too."""

    runs: dict[int, list[Run]]  # by expert, without what is skipped
    tokens: np.ndarray  # int64 [pairs], of each row
    rows: np.ndarray  # int64 [T, k], of each pair; -1 where skipped


def plan_token(experts: Sequence[int], tiers: Sequence[int]) -> Work:
    """The work of one token, in the order of its experts."""
    runs = {expert: [Run(tier, row, 1)] for row, (expert, tier) in enumerate(zip(experts, tiers, strict=True)) if tier}
    tokens, rows = _rows_of_one_token(len(experts))
    return Work(runs, tokens, rows if all(tiers) else np.where(np.array([tiers]) == 0, -1, rows))


@cache
def _rows_of_one_token(ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` and `rows` of Work where nothing is skipped."""
    return np.zeros(ranks, np.int64), np.arange(ranks)[None]


def plan_tokens(experts: np.ndarray, tiers: np.ndarray) -> Work:
    """The work of experts [T, k] at tiers [T, k]."""
    keys = (experts * TIERS + tiers).reshape(-1)
    order = np.argsort(keys, kind="stable")
    values, counts = np.unique(keys, return_counts=True)
    runs: dict[int, list[Run]] = {}
    first = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        expert, tier = divmod(value, TIERS)
        if tier:
            runs.setdefault(expert, []).append(Run(tier, first, count))
        first += count
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    return Work(runs, order // experts.shape[1], np.where(tiers == 0, -1, rows.reshape(experts.shape)))
