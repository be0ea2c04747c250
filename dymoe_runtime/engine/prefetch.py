"""Prefetching: the likely experts of the next layer are read while the current layer computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.cost import CostModel
from dymoe_runtime.engine.precision import Precision
from dymoe_runtime.kernels.prepared import PreparedExpert
from dymoe_runtime.model.routing import PromptRouting, Routing
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.request import ExpertRequest, token_request
from dymoe_runtime.store.store import ExpertStore

# (layer, residual stream [T, H]) -> the experts and routing weights [T, k] that the layer's router would choose.
Guess = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]
# Smallest measured recall at which a rank is prefetched.
MIN_RECALL = 0.5
# Weight of the newest gap in the moving average of gaps between layers.
SMOOTHING = 0.1


class Prefetcher:
    """Starts reads of experts that the next layer will probably use."""

    def __init__(
        self,
        store: ExpertStore[PreparedExpert],
        precision: Precision,
        guess: Guess,
        ranks: Mapping[int, int],
        width: int,
        enabled: Callable[[], bool],
        cost: CostModel | None = None,
    ) -> None:
        """Prefetch the first `ranks[layer]` guesses of each token while `enabled()`.

        For several tokens at once, at most `width` experts of a layer are prefetched. With `cost`, reads for a decoded
        token are limited by the time until the next layer.
        """
        self._store, self._precision, self._guess = store, precision, guess
        self._ranks, self._width, self._enabled, self._cost = ranks, width, enabled, cost
        self._left: tuple[int, float] | None = None  # layer and end time of the last call, if it was of one token
        self._gap_s = 0.0  # moving average from the end of a call to the next layer's call

    def has_work(self) -> bool:
        """Return whether there is anything left to prefetch for a decoded token."""
        highest = self._precision.rule.highest
        return self._enabled() and any(
            ranks and not self._store.holds_layer(layer, highest[layer]) for layer, ranks in self._ranks.items()
        )

    def for_token(self, layer: int, routing: Routing, requests: Sequence[ExpertRequest], entered: float) -> None:
        """Start reads for the layer after `layer` for one token.

        `requests` are those of `layer`; `entered` is when its call began, on the clock `time.perf_counter`.
        """
        if self._wanted(layer + 1):
            experts, weights = self._guess(layer + 1, routing.residual)
            guesses = self._token_requests(layer + 1, experts[0].tolist(), weights[0].tolist())
            self._store.prefetch(guesses, requests, self._idle_s(layer, requests, entered))

    def for_tokens(self, layer: int, routing: Routing, requests: Sequence[ExpertRequest]) -> None:
        """Start reads for the layer after `layer` for tokens decoded together; `requests` are those of `layer`."""
        if self._wanted(layer + 1):
            guessed = Routing(*self._guess(layer + 1, routing.residual), routing.residual)
            tiers = self._precision.rule.choose(layer + 1, guessed)
            self._store.prefetch(self._merged(layer + 1, guessed.experts, guessed.weights, tiers), requests)

    def for_prompt(self, layer: int, routing: PromptRouting, requests: Sequence[ExpertRequest]) -> None:
        """Start reads for the layer after `layer` for a prompt pass; `requests` are those of `layer`."""
        self._left = None
        if self._wanted(layer + 1):
            experts, weights = self._guess(layer + 1, routing.residual)
            guessed = replace(routing, experts=experts, weights=weights)
            tiers = self._precision.rule.choose_for_prompt(layer + 1, guessed)
            self._store.prefetch(self._merged(layer + 1, experts, weights, tiers), requests)

    def note_end(self, layer: int) -> None:
        """Record that the experts of `layer` have just been computed for one token."""
        self._left = (layer, time.perf_counter())

    def note_gap(self) -> None:
        """Record that layers ran without a call, so that the next gap is not measured."""
        self._left = None

    def _wanted(self, layer: int) -> bool:
        if not self._ranks.get(layer) or not self._enabled():
            return False
        return not self._store.holds_layer(layer, self._precision.rule.highest[layer])

    def _token_requests(self, layer: int, experts: list[int], weights: list[float]) -> list[ExpertRequest]:
        tiers = self._precision.rule.choose_for_token(layer, experts, weights)
        likely = list(zip(experts, tiers, weights, strict=True))[: self._ranks[layer]]
        return [token_request(layer, e, tier) for e, tier, weight in likely if tier and weight > 0]

    def _merged(self, layer: int, experts: np.ndarray, weights: np.ndarray, tiers: np.ndarray) -> list[ExpertRequest]:
        """Return one request per guessed expert of [T, k], by falling sum of routing weights over all tokens."""
        ranks = self._ranks[layer]
        experts, weights = experts[:, :ranks].reshape(-1), weights[:, :ranks].reshape(-1)
        sums = np.bincount(experts, weights)
        highest = np.zeros(len(sums), np.int64)
        np.maximum.at(highest, experts, tiers[:, :ranks].reshape(-1))
        likeliest = np.argsort(-sums, kind="stable")[: self._width].tolist()
        return [
            ExpertRequest(ExpertKey(layer, e), int(highest[e])) for e in likeliest if sums[e] > 0 and highest[e] > 0
        ]

    def _idle_s(self, layer: int, requests: Sequence[ExpertRequest], entered: float) -> float | None:
        """Return the expected seconds until the next layer needs its experts, or None without a cost model."""
        if self._cost is None:
            return None
        if self._left is not None and self._left[0] == layer - 1:
            self._gap_s += SMOOTHING * (entered - self._left[1] - self._gap_s)
        return self._gap_s + self._cost.layer((request.tier, 1) for request in requests)


def ranks_worth_reading(bundle: Bundle) -> dict[int, int]:
    """Return layer -> number of ranks whose measured recall is at least MIN_RECALL."""
    return {
        layer.layer: sum(recall >= MIN_RECALL for recall in layer.look_ahead_recall[: bundle.spec.top_k])
        for layer in bundle.policy.layers
    }
