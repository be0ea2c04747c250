"""Which tier each expert deserves: pure functions of routing and the measured policy.

Decoding, the experts of a token are taken by falling gate; prefilling, the experts of a
prompt chunk by falling importance, which is the sum over its tokens of gate times token
weight. An expert gets the highest tier whose threshold exceeds the share of importance
that comes before it. Thresholds are per layer, so depth decides too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from dymoe_runtime.decoder import Routing, in_groups
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import check_ladder, strict

VERSION = 2
# Above any share, which is below 1.
ALWAYS = 2.0
NEVER = 0.0
# Points whose mean bits differ by less are of one size.
SAME_BITS = 0.06

Thresholds = tuple[float, ...]


@dataclass(frozen=True)
class OperatingPoint:
    """A measured setting of the thresholds.

    `decode[layer]` and `prefill[layer]` hold one threshold per tier of the ladder, highest
    tier first; the last is that of the lowest tier, and what lies beyond it is skipped.
    """

    name: str
    kind: str  # uniform or mixed
    decode: tuple[Thresholds, ...]
    prefill: tuple[Thresholds, ...]
    bits_mean: float  # tier of an active expert when decoding, mean over tokens and layers
    effective_bits: float  # the same with steps and multipliers counted
    bytes_per_token: float  # record bytes that decoding a token uses
    kl: float  # to the original model, nats per token, on held-out calibration text, decoding
    nll: float
    top1_agreement: float
    prefill_kl: float  # the same by the prefill thresholds


@dataclass(frozen=True)
class LayerPolicy:
    """What was measured of one layer; lists over experts are empty for a dense layer."""

    layer: int
    sensitivity: Mapping[str, float]  # tier -> KL of the model with only this layer at it, others highest
    frequency: tuple[float, ...]  # share of tokens routed to each expert
    gate_mass: tuple[float, ...]  # share of all gates
    expert_error: Mapping[str, tuple[float, ...]]  # tier -> of each expert, gate-weighted, relative to its output
    router_overlap: Mapping[str, float]  # tier -> share of the next layer's choices that this layer at it leaves
    pinned: tuple[int, ...]  # experts that lower tiers ruin: operating points run them at the highest
    data_free: tuple[int, ...]  # experts quantized without calibration, for want of routed tokens
    look_ahead_by: str  # router, linear (a fitted predictor) or none: what is asked one layer early
    look_ahead_recall: tuple[float, ...]  # of rank 1, 2, ... to twice the experts of a token: was the guess right


@dataclass(frozen=True)
class Policy:
    """policy.json."""

    ladder: tuple[int, ...]
    layers: tuple[LayerPolicy, ...]
    points: tuple[OperatingPoint, ...]  # by rising bits
    default_point: str
    notes: tuple[str, ...] = field(default=())
    version: int = VERSION

    def point(self, name: str) -> OperatingPoint:
        return next(point for point in self.points if point.name == name)

    def nearest(self, bits: float) -> OperatingPoint:
        """The point with the nearest mean bits; of those about as near, the best."""
        nearest = min(abs(point.bits_mean - bits) for point in self.points)
        near = [point for point in self.points if abs(point.bits_mean - bits) <= nearest + SAME_BITS]
        return min(near, key=lambda point: point.kl)

    def smallest_within(self, kl: float) -> OperatingPoint:
        """The point of fewest bytes with at most this KL; DymoeError if there is none."""
        fitting = [point for point in self.points if point.kl <= kl]
        if not fitting:
            best = min(self.points, key=lambda point: point.kl)
            raise DymoeError(f"--quality {kl:g}: the best point, {best.name}, has a KL of {best.kl:.5f}; allow as much")
        return min(fitting, key=lambda point: point.bytes_per_token)

    def best_within(self, bytes_per_token: float) -> OperatingPoint:
        """The best point that uses at most so many bytes, else the smallest."""
        fitting = [point for point in self.points if point.bytes_per_token <= bytes_per_token]
        if fitting:
            return min(fitting, key=lambda point: point.kl)
        return min(self.points, key=lambda point: point.bytes_per_token)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Policy:
        where = "policy.json"
        if data.get("version") != VERSION:
            raise DymoeError(
                f"{where}: version {data.get('version')}, this runtime reads {VERSION}; recompile or upgrade"
            )
        try:
            values = {name: _tuple(value) for name, value in data.items()}
            for name, cls in (("layers", LayerPolicy), ("points", OperatingPoint)):
                if name in values:
                    values[name] = tuple(_tuples(cls, item, f"{where}: {name}") for item in values[name])
            values["notes"] = tuple(values.get("notes", ()))
            if "ladder" in values:
                values["ladder"] = check_ladder(values["ladder"])
            policy: Policy = strict(Policy, values, where)
            policy.point(policy.default_point)
        except (TypeError, ValueError, AttributeError, StopIteration) as error:
            raise DymoeError(f"{where}: malformed ({error!r}); recompile the bundle") from error
        return policy


@dataclass(frozen=True)
class TierRule:
    """Chooses tiers by an operating point; `pinned[layer]` are experts that always get the highest."""

    ladder: tuple[int, ...]
    decode: tuple[Thresholds, ...]
    prefill: tuple[Thresholds, ...]
    pinned: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def of(point: OperatingPoint, policy: Policy) -> TierRule:
        pinned = tuple(layer.pinned for layer in policy.layers) if point.kind == "mixed" else ()
        return TierRule(policy.ladder, point.decode, point.prefill, pinned)

    @staticmethod
    def uniform(tier: int, ladder: tuple[int, ...], layers: int) -> TierRule:
        rows = (uniform_thresholds(tier, ladder),) * layers
        return TierRule(ladder, rows, rows)

    def without_depth(self) -> TierRule:
        """The same mean thresholds in every layer."""
        return replace(self, decode=_flat(self.decode), prefill=_flat(self.prefill))

    @cached_property
    def highest(self) -> tuple[int, ...]:
        """The highest tier that an expert of each layer can get."""
        return tuple(self._highest(layer) for layer in range(len(self.decode)))

    @cached_property
    def _only(self) -> tuple[int | None, ...]:
        """The tier that all experts of a decoded token get in each layer; None where that depends on their gates."""
        return tuple(only_tier(thresholds, self.ladder) for thresholds in self.decode)

    def _highest(self, layer: int) -> int:
        if self.pinned and self.pinned[layer]:
            return self.ladder[-1]
        rows = (self.decode[layer], self.prefill[layer])
        chosen = [tier for row in rows for tier, share in zip(reversed(self.ladder), row, strict=True) if share > NEVER]
        return max(chosen, default=self.ladder[0])

    @property
    def weighs_tokens(self) -> bool:
        """Whether the tiers of a prompt depend on what its tokens weigh."""
        return self.prefill != self.decode or any(NEVER < share < 1 for row in self.prefill for share in row)

    def choose(self, layer: int, routing: Routing) -> np.ndarray:
        """Tier of each routed expert, int64 [T, k]."""
        if routing.token_weights is None:
            tiers = tiers_by_mass(routing.gates, self.decode[layer], self.ladder)
        else:
            tiers = self._choose_for_chunk(layer, routing)
        for expert in self.pinned[layer] if self.pinned else ():
            tiers[routing.experts == expert] = self.ladder[-1]
        return tiers

    def choose_for_token(self, layer: int, experts: Sequence[int], gates: Sequence[float]) -> list[int]:
        """`choose` for the experts of one token that is decoded."""
        only = self._only[layer]
        tiers = [only] * len(gates) if only is not None else tiers_of_token(gates, self.decode[layer], self.ladder)
        if not self.pinned or not self.pinned[layer]:
            return tiers
        high = self.ladder[-1]
        return [high if e in self.pinned[layer] else tier for e, tier in zip(experts, tiers, strict=True)]

    def _choose_for_chunk(self, layer: int, routing: Routing) -> np.ndarray:
        assert routing.token_weights is not None
        parts = (routing.experts, routing.gates, routing.token_weights)
        groups = zip(*(in_groups(part, routing.group or len(part)) for part in parts), strict=True)
        return np.concatenate([self._choose_for_group(layer, *group) for group in groups])

    def _choose_for_group(
        self, layer: int, experts: np.ndarray, gates: np.ndarray, token_weights: np.ndarray
    ) -> np.ndarray:
        importance = chunk_importance(experts, gates, token_weights)
        active = importance > 0
        tiers = np.zeros(importance.shape, np.int64)
        tiers[active] = tiers_by_mass(importance[active][None], self.prefill[layer], self.ladder)[0]
        chosen: np.ndarray = tiers[experts]
        return chosen


def chunk_importance(experts: np.ndarray, gates: np.ndarray, token_weights: np.ndarray) -> np.ndarray:
    """Sum over the tokens of a chunk of gate times token weight, float32 [experts]; more than 0 if active.

    experts int64 [T, k], gates [T, k], token_weights [T].
    """
    weighted = gates * token_weights[:, None]
    # An expert whose tokens weigh nothing is still active.
    return np.bincount(experts.reshape(-1), np.maximum(weighted.reshape(-1), 1e-12)).astype(np.float32)


def tiers_by_mass(importance: np.ndarray, thresholds: Sequence[float], ladder: Sequence[int]) -> np.ndarray:
    """Tier of each of n experts by cumulative share of `importance` [..., n], int64 [..., n]; 0 is skipped."""
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


def tiers_of_token(gates: Sequence[float], thresholds: Sequence[float], ladder: Sequence[int]) -> list[int]:
    """What `tiers_by_mass` says of one token whose gates fall; for so few numbers the quicker way."""
    if min(thresholds) >= 1:
        return [ladder[-1]] * len(gates)
    upto = list(itertools.accumulate(gates))
    total = max(upto[-1], 1e-30)
    rungs, tiers = len(ladder), []
    rung = 0  # from the highest
    for sum_to, gate in zip(upto, gates, strict=True):
        share = (sum_to - gate) / total
        while rung < rungs and not share < thresholds[rung]:
            rung += 1  # shares never fall
        tiers.append(ladder[-1 - rung] if rung < rungs else 0)
    return tiers


def only_tier(thresholds: Sequence[float], ladder: Sequence[int]) -> int | None:
    """The tier that these thresholds give whatever the gates; None where that depends on them."""
    if any(NEVER < threshold <= 1 for threshold in thresholds):
        return None
    return next((tier for tier, threshold in zip(reversed(ladder), thresholds, strict=True) if threshold > 1), 0)


def uniform_thresholds(tier: int, ladder: Sequence[int]) -> Thresholds:
    """Thresholds that put every expert at `tier`."""
    return tuple(ALWAYS if t <= tier else NEVER for t in reversed(ladder))


def _flat(rows: tuple[Thresholds, ...]) -> tuple[Thresholds, ...]:
    mean = tuple(sum(min(value, 1.0) for value in column) / len(rows) for column in zip(*rows, strict=True))
    return (tuple(ALWAYS if value >= 1 else value for value in mean),) * len(rows)


def _tuples(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """Strictly build `cls`, turning JSON lists into tuples."""
    return strict(cls, {name: _tuple(value) for name, value in data.items()}, where)


def _tuple(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuple(item) for name, item in value.items()}
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value
