"""Routed experts out of a store: choose tiers, acquire experts, compute, combine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from dymoe_runtime.engine.precision import Precision, TokenTiers
from dymoe_runtime.engine.prefetch import Prefetcher
from dymoe_runtime.kernels.interface import ExpertTable, Kernels
from dymoe_runtime.kernels.prepared import ExpertRows, PreparedExpert
from dymoe_runtime.model.routing import PromptRouting, Routing
from dymoe_runtime.model.tier_counts import TierCounts
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.lease import Lease
from dymoe_runtime.store.request import ExpertRequest, token_request
from dymoe_runtime.store.store import ExpertStore

# Base of the keys that join expert and tier; larger than any tier.
TIER_BASE = 16

# (token, expert) pairs of a prompt between two pauses: some 30 ms of work for experts of 6 million weights.
PART_ROWS = 384

# Called with all requests of a call.
Observer = Callable[[Sequence[ExpertRequest]], None]


class StoredExperts:
    """`Experts` that run from a store."""

    def __init__(
        self,
        store: ExpertStore[PreparedExpert],
        kernels: Kernels,
        activation: str,
        precision: Precision,
        token_tiers: TokenTiers,
        prefetcher: Prefetcher | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Choose tiers by `token_tiers` for single decoded tokens, else by the rule of `precision`."""
        self.counts = TierCounts()
        self._store, self._kernels, self._activation = store, kernels, activation
        self._precision, self._token_tiers = precision, token_tiers
        self._prefetcher, self._observer = prefetcher, observer

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        if len(h) == 1:
            return self._decode_token(layer, h, routing, time.perf_counter())
        tiers, lacking = self._choose_each(layer, routing)
        plan, requests = self._plan(layer, routing.experts, tiers)
        self.counts.last[layer] = tiers[-1].tolist()
        with self._store.acquire(requests, few=True) as lease:
            if lacking:
                self._store.promote(lacking, requests)
            if self._prefetcher is not None:
                self._prefetcher.for_tokens(layer, routing, requests)
            return self._compute(lease, plan, h, routing.weights)

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        tiers = self._precision.rule.choose_for_prompt(layer, routing)
        plan, requests = self._plan(layer, routing.experts, tiers)
        if routing.pause is not None:
            return self._prefill_in_parts(layer, h, routing, plan, requests, routing.pause)
        with self._store.acquire(requests) as lease:
            if self._prefetcher is not None:
                self._prefetcher.for_prompt(layer, routing, requests)
            return self._compute(lease, plan, h, routing.weights)

    def _prefill_in_parts(
        self,
        layer: int,
        h: np.ndarray,
        routing: PromptRouting,
        plan: TokenPlan,
        requests: Sequence[ExpertRequest],
        pause: Callable[[], None],
    ) -> np.ndarray:
        """Run a few experts at a time, and pause between them; those that are missing are read meanwhile."""
        y = np.empty((len(plan.tokens), h.shape[1]), np.float32)
        parts = in_parts(sorted(requests, key=lambda r: self._store.resident_tier(r) < r.tier))
        for number, part in enumerate(parts):
            with self._store.acquire(part) as lease:
                coming = [request for later in parts[number + 1 :] for request in later]
                if coming:
                    self._store.prefetch(coming, part)
                elif self._prefetcher is not None:
                    self._prefetcher.for_prompt(layer, routing, part)
                self._fill(y, lease, plan, h)
            pause()
        return self._kernels.combine(y, plan.rows, routing.weights)

    def note_direct(self, uses: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> None:
        """Count the (layer, experts, tiers) that a token used without a lease; tier 0 means skipped."""
        if self._prefetcher is not None:
            self._prefetcher.note_gap()
        for layer, experts, tiers in uses:
            self.counts.add_token(layer, tiers)
            pairs = zip(experts, tiers, strict=True)
            self._store.used([token_request(layer, expert, tier) for expert, tier in pairs if tier])

    def _decode_token(self, layer: int, h: np.ndarray, routing: Routing, entered: float) -> np.ndarray:
        experts, weights = routing.of_token()
        tiers, lacking = self._token_tiers.choose(layer, experts, weights)
        self.counts.add_token(layer, tiers)
        requests = [token_request(layer, expert, tier) for expert, tier in zip(experts, tiers, strict=True) if tier]
        if self._observer is not None:
            self._observer(requests)
        with self._store.acquire(requests) as lease:
            if lacking:
                self._store.promote(lacking, requests)
            if self._prefetcher is not None:
                self._prefetcher.for_token(layer, routing, requests, entered)
            if lease.experts:
                used = routing.weights if len(requests) == len(experts) else routing.weights[:, np.array(tiers) > 0]
                y = self._kernels.moe_token(lease.experts, h, used, self._activation, lease.pending)
            else:
                y = self._compute(lease, plan_token(experts, tiers), h, routing.weights)
        if self._prefetcher is not None:
            self._prefetcher.note_end(layer)
        return y

    def _choose_each(self, layer: int, routing: Routing) -> tuple[np.ndarray, Sequence[ExpertRequest]]:
        """Return the tiers [T, k] of tokens that are decoded together, and requests as in `Chosen`."""
        if not self._token_tiers.for_each:
            return self._precision.rule.choose(layer, routing), ()
        rows = zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)
        chosen = [self._token_tiers.choose(layer, experts, weights) for experts, weights in rows]
        lacking = {request.key: request for of_token in chosen for request in of_token.lacking}
        return np.array([of_token.tiers for of_token in chosen]), list(lacking.values())

    def _plan(self, layer: int, experts: np.ndarray, tiers: np.ndarray) -> tuple[TokenPlan, list[ExpertRequest]]:
        self.counts.add(tiers)
        plan = plan_tokens(experts, tiers)
        requests = [
            ExpertRequest(ExpertKey(layer, expert), max(s.tier for s in spans), sum(s.rows for s in spans))
            for expert, spans in plan.spans.items()
        ]
        if self._observer is not None:
            self._observer(requests)
        return plan, requests

    def _compute(self, lease: Lease[PreparedExpert], plan: TokenPlan, h: np.ndarray, weights: np.ndarray) -> np.ndarray:
        # One row per pair, so that the sum does not depend on the order in which experts arrive.
        y = np.empty((len(plan.tokens), h.shape[1]), np.float32)
        self._fill(y, lease, plan, h)
        return self._kernels.combine(y, plan.rows, weights)

    def _fill(self, y: np.ndarray, lease: Lease[PreparedExpert], plan: TokenPlan, h: np.ndarray) -> None:
        """Write the outputs of the leased experts to their rows of y [pairs, H]."""
        for batch in lease.batches():
            parts = [
                ExpertRows(at(span.tier), span.first, span.rows)
                for request, at in batch
                for span in plan.spans[request.key.expert]
            ]
            self._kernels.moe(parts, h, plan.tokens, y, self._activation)


def in_parts(requests: Sequence[ExpertRequest], rows: int = PART_ROWS) -> list[Sequence[ExpertRequest]]:
    """Return the requests of a prompt in their order, in parts of about `rows` tokens, at least one request each."""
    parts: list[list[ExpertRequest]] = []
    left = 0
    for request in requests:
        if left <= 0:
            parts.append([])
            left = rows
        parts[-1].append(request)
        left -= request.tokens
    return list(parts)


class ExpertSpan(NamedTuple):
    """Rows [first, first + rows) of a call, which run at the same tier."""

    tier: int
    first: int
    rows: int


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """The (token, expert) pairs of a call as rows, ordered by expert and tier; skipped pairs have a row too."""

    spans: dict[int, list[ExpertSpan]]  # by expert, without skipped pairs
    tokens: np.ndarray  # int64 [pairs], the token of each row
    rows: np.ndarray  # int64 [T, k], the row of each pair; -1 if skipped


def plan_token(experts: Sequence[int], tiers: Sequence[int]) -> TokenPlan:
    """Return the plan of one token, with rows in the order of `experts`; tier 0 means skipped."""
    pairs = enumerate(zip(experts, tiers, strict=True))
    spans = {expert: [ExpertSpan(tier, row, 1)] for row, (expert, tier) in pairs if tier}
    tokens, rows = _rows_of_one_token(len(experts))
    return TokenPlan(spans, tokens, rows if all(tiers) else np.where(np.array([tiers]) == 0, -1, rows))


@cache
def _rows_of_one_token(ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `tokens` and `rows` of a plan of one token that skips nothing."""
    return np.zeros(ranks, np.int64), np.arange(ranks)[None]


def plan_tokens(experts: np.ndarray, tiers: np.ndarray) -> TokenPlan:
    """Return the plan of experts [T, k] at tiers [T, k]; tier 0 means skipped."""
    keys = (experts * TIER_BASE + tiers).reshape(-1)
    order = np.argsort(keys, kind="stable")
    values, counts = np.unique(keys, return_counts=True)
    spans: dict[int, list[ExpertSpan]] = {}
    first = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        expert, tier = divmod(value, TIER_BASE)
        if tier:
            spans.setdefault(expert, []).append(ExpertSpan(tier, first, count))
        first += count
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    return TokenPlan(spans, order // experts.shape[1], np.where(tiers == 0, -1, rows.reshape(experts.shape)))


# (layer, experts, tiers) of each layer in which a token used experts directly; tier 0 means skipped.
DirectUses = Sequence[tuple[int, Sequence[int], Sequence[int]]]


class ResidentTable:
    """A `ResidencyListener` that keeps the resident experts of a store in a table for compiled code."""

    def __init__(self, native: ExpertTable) -> None:
        self.native = native

    def put(self, key: ExpertKey, tier: int, prepared: PreparedExpert) -> None:
        self.native.put(key.layer, key.expert, tier, prepared.views)

    def remove(self, key: ExpertKey, tier: int) -> None:
        self.native.remove(key.layer, key.expert, tier)


class DirectUse:
    """`DirectExperts` that run at the tiers of the current rule.

    A token whose experts are all resident runs without Python between its layers. The store counts the uses
    afterwards; the result is the same, because nothing reads the counts in between.
    """

    def __init__(
        self,
        table: ResidentTable,
        precision: Precision,
        token_tiers: TokenTiers,
        prefetches: Callable[[], bool],
        used: Callable[[DirectUses], None],
    ) -> None:
        """Offer no table while `prefetches()` is true, because prefetching needs a call per layer.

        `used` is called with the experts that a token used directly.
        """
        self._table, self._precision = table, precision
        self._token_tiers, self._prefetches = token_tiers, prefetches
        self._rule: TierRule | None = None  # the rule that the table holds
        self.used = used

    def table(self) -> ExpertTable | None:
        if not self._token_tiers.by_rule or self._prefetches():
            return None
        rule = self._precision.rule
        if rule is not self._rule:
            for layer, thresholds in enumerate(rule.decode):
                pinned: Sequence[int] = rule.pinned[layer] if rule.pinned else ()
                self._table.native.set_rule(layer, thresholds, pinned)
            self._rule = rule
        return self._table.native
