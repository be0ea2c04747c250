"""The choice of each expert's tier: pure functions of the routing and a measured policy.

When decoding, the experts of a token are sorted by falling importance, which is the routing weight. In a prompt, the
experts of a chunk are sorted by falling importance, which is the sum over its tokens of the expert's share in the token
times token weight. An expert gets the highest tier whose threshold exceeds the share of importance that comes before
it. If there is none, it is skipped. Each layer has its own thresholds, so the tier depends on depth too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dymoe_runtime.bundle.policy import OperatingPoint, Policy, Thresholds
from dymoe_runtime.model.routing import PromptRouting, Routing, in_chunks

# Thresholds that every share is below, and that none is below; shares are at least 0 and below 1.
ALWAYS = 2.0
NEVER = 0.0


@dataclass(frozen=True)
class TierRule:
    """The thresholds of an operating point; the experts in `pinned[layer]` always get the highest tier."""

    ladder: tuple[int, ...]
    decode: tuple[Thresholds, ...]
    prefill: tuple[Thresholds, ...]
    pinned: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def of(point: OperatingPoint, policy: Policy) -> TierRule:
        """Return the rule of an operating point."""
        pinned = tuple(layer.pinned for layer in policy.layers) if point.kind == "mixed" else ()
        return TierRule(policy.ladder, point.decode, point.prefill, pinned)

    @staticmethod
    def uniform(tier: int, ladder: tuple[int, ...], layers: int) -> TierRule:
        """Return the rule that runs every expert at `tier`."""
        rows = (uniform_thresholds(tier, ladder),) * layers
        return TierRule(ladder, rows, rows)

    def without_depth(self) -> TierRule:
        """Return a rule that uses the mean thresholds of all layers in every layer."""
        return replace(self, decode=_flat(self.decode), prefill=_flat(self.prefill))

    @cached_property
    def highest(self) -> tuple[int, ...]:
        """Return the highest tier that an expert of each layer can get."""
        return tuple(self._highest(layer) for layer in range(len(self.decode)))

    @cached_property
    def _only(self) -> tuple[int | None, ...]:
        """Return, for each layer, the one tier of a decoded token's experts, or None if it depends on their weights."""
        return tuple(only_tier(thresholds, self.ladder) for thresholds in self.decode)

    def _highest(self, layer: int) -> int:
        if self.pinned and self.pinned[layer]:
            return self.ladder[-1]
        rows = (self.decode[layer], self.prefill[layer])
        chosen = [tier for row in rows for tier, share in zip(reversed(self.ladder), row, strict=True) if share > NEVER]
        return max(chosen, default=self.ladder[0])

    @cached_property
    def weighs_tokens(self) -> bool:
        """Return whether the tiers of a prompt may depend on token weights."""
        return self.prefill != self.decode or any(NEVER < share < 1 for row in self.prefill for share in row)

    def choose(self, layer: int, routing: Routing) -> np.ndarray:
        """Return the tiers of decoded tokens' experts, int64 [T, k]."""
        tiers = tiers_by_mass(routing.weights, self.decode[layer], self.ladder)
        return self._with_pinned(layer, routing.experts, tiers)

    def choose_for_token(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> list[int]:
        """Return the tiers of one decoded token's experts; the result equals that of `choose`."""
        only = self._only[layer]
        tiers = [only] * len(weights) if only is not None else tiers_of_token(weights, self.decode[layer], self.ladder)
        if not self.pinned or not self.pinned[layer]:
            return tiers
        high = self.ladder[-1]
        return [high if e in self.pinned[layer] else tier for e, tier in zip(experts, tiers, strict=True)]

    def choose_for_prompt(self, layer: int, routing: PromptRouting) -> np.ndarray:
        """Return the tiers of a prompt's experts, int64 [T, k], chosen for each chunk of the prompt."""
        parts = (routing.experts, routing.shares, routing.token_weights)
        chunks = zip(*(in_chunks(part, routing.chunks) for part in parts), strict=True)
        tiers = np.concatenate([self._choose_for_chunk(layer, *chunk) for chunk in chunks])
        return self._with_pinned(layer, routing.experts, tiers)

    def _with_pinned(self, layer: int, experts: np.ndarray, tiers: np.ndarray) -> np.ndarray:
        for expert in self.pinned[layer] if self.pinned else ():
            tiers[experts == expert] = self.ladder[-1]
        return tiers

    def _choose_for_chunk(
        self, layer: int, experts: np.ndarray, shares: np.ndarray, token_weights: np.ndarray
    ) -> np.ndarray:
        importance = chunk_importance(experts, shares, token_weights)
        active = importance > 0
        tiers = np.zeros(importance.shape, np.int64)
        tiers[active] = tiers_by_mass(importance[active][None], self.prefill[layer], self.ladder)[0]
        chosen: np.ndarray = tiers[experts]
        return chosen


def chunk_importance(experts: np.ndarray, shares: np.ndarray, token_weights: np.ndarray) -> np.ndarray:
    """Return the importance of each expert in a prompt chunk, float32 [n]; it is 0 for experts without tokens.

    That is the sum over its tokens of share times token weight. n is the highest expert in the chunk plus 1. `experts`
    is int64 [T, k], `shares` as in `PromptRouting` [T, k], `token_weights` [T].
    """
    weighted = shares * token_weights[:, None]
    # An expert whose tokens all have weight 0 must still count as active.
    return np.bincount(experts.reshape(-1), np.maximum(weighted.reshape(-1), 1e-12)).astype(np.float32)


def tiers_by_mass(importance: np.ndarray, thresholds: Sequence[float], ladder: Sequence[int]) -> np.ndarray:
    """Return the tiers of experts, int64 [..., n], by their `importance` [..., n]; 0 is skipped.

    `thresholds` are as in `OperatingPoint`, highest tier first. In this example, experts get 4 bits while less than
    half of the importance comes before them, then 3 bits up to nine tenths, then 2:

    >>> tiers_by_mass(np.array([0.1, 0.6, 0.05, 0.25]), (0.5, 0.9, ALWAYS), (2, 3, 4)).tolist()
    [3, 4, 2, 3]
    """
    if all(threshold >= 1 for threshold in thresholds):
        return np.full(importance.shape, ladder[-1], np.int64)
    order = np.argsort(-importance, axis=-1, kind="stable")
    ordered = np.take_along_axis(importance.astype(np.float64), order, -1)
    upto = ordered.cumsum(-1)
    share = (upto - ordered) / np.maximum(upto[..., -1:], 1e-30)
    tiers = np.zeros(importance.shape, np.int64)
    for tier, threshold in zip(ladder, reversed(thresholds), strict=True):
        tiers[share < threshold] = tier
    chosen = np.empty_like(tiers)
    np.put_along_axis(chosen, order, tiers, -1)
    return chosen


def tiers_of_token(weights: Sequence[float], thresholds: Sequence[float], ladder: Sequence[int]) -> list[int]:
    """Return the tiers of one token's experts as `tiers_by_mass` does; `weights` must be sorted, highest first.

    This is faster than NumPy for so few numbers.
    """
    if min(thresholds) >= 1:
        return [ladder[-1]] * len(weights)
    upto = list(itertools.accumulate(weights))
    total = max(upto[-1], 1e-30)
    rungs, tiers = len(ladder), []
    rung = 0  # index into `thresholds`, 0 for the highest tier
    for sum_to, weight in zip(upto, weights, strict=True):
        share = (sum_to - weight) / total
        while rung < rungs and not share < thresholds[rung]:
            rung += 1  # shares never fall
        tiers.append(ladder[-1 - rung] if rung < rungs else 0)
    return tiers


def only_tier(thresholds: Sequence[float], ladder: Sequence[int]) -> int | None:
    """Return the tier that `thresholds` give every expert, or None if it depends on the importance."""
    if any(NEVER < threshold <= 1 for threshold in thresholds):
        return None
    return next((tier for tier, threshold in zip(reversed(ladder), thresholds, strict=True) if threshold > 1), 0)


def uniform_thresholds(tier: int, ladder: Sequence[int]) -> Thresholds:
    """Return thresholds that put every expert at `tier`.

    >>> uniform_thresholds(3, (2, 3, 4)) == (NEVER, ALWAYS, ALWAYS)
    True
    """
    return tuple(ALWAYS if t <= tier else NEVER for t in reversed(ladder))


def _flat(rows: tuple[Thresholds, ...]) -> tuple[Thresholds, ...]:
    mean = tuple(sum(min(value, 1.0) for value in column) / len(rows) for column in zip(*rows, strict=True))
    return (tuple(ALWAYS if value >= 1 else value for value in mean),) * len(rows)
