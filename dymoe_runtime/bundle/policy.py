"""policy.json: measurements of a model's layers, and the operating points chosen from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dymoe_runtime.bundle.tiers import check_ladder
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import strict

VERSION = 2
# Points whose distances to the wanted bits differ by at most this count as equally near.
SAME_BITS = 0.06

Thresholds = tuple[float, ...]


@dataclass(frozen=True)
class OperatingPoint:
    """A setting of the thresholds that choose tiers, with its measured quality and size.

    `decode[layer]` and `prefill[layer]` hold one threshold per tier of the ladder, highest tier first. An expert gets
    the highest tier whose threshold exceeds the share of importance that comes before it. If there is none, the expert
    is skipped. `model/tier_rule.py` applies these rules.
    """

    name: str
    kind: str  # uniform or mixed
    decode: tuple[Thresholds, ...]
    prefill: tuple[Thresholds, ...]
    bits_mean: float  # mean tier of an active expert when decoding, over tokens and layers
    effective_bits: float  # bits per weight when decoding, scale indices and multipliers included
    bytes_per_token: float  # bytes of expert records that decoding one token uses
    kl: float  # to the original model, nats per token, decoding held-out calibration text
    nll: float  # nats per token
    top1_agreement: float
    prefill_kl: float  # KL when the prefill thresholds choose the tiers


@dataclass(frozen=True)
class LayerPolicy:
    """Measurements of one layer; lists over experts are empty for a dense layer."""

    layer: int
    sensitivity: Mapping[str, float]  # tier -> KL of the model with only this layer at the tier, others highest
    frequency: tuple[float, ...]  # [experts], share of tokens routed to each
    gate_mass: tuple[float, ...]  # [experts], share of the layer's routing weights
    expert_error: Mapping[str, tuple[float, ...]]  # tier -> [experts], squared error relative to squared output
    router_overlap: Mapping[str, float]  # tier -> share of the next router's choices unchanged by this layer at it
    pinned: tuple[int, ...]  # experts that the lowest tier ruins; mixed points run them at the highest
    data_free: tuple[int, ...]  # experts with too few routed tokens, quantized without calibration
    look_ahead_by: str  # what prefetch asks one layer early: router, linear (a fitted predictor) or none
    look_ahead_recall: tuple[float, ...]  # [ranks], share of tokens whose guess of that rank was routed to


@dataclass(frozen=True)
class Policy:
    """The content of policy.json."""

    ladder: tuple[int, ...]
    layers: tuple[LayerPolicy, ...]
    points: tuple[OperatingPoint, ...]  # by rising bytes per token
    default_point: str
    notes: tuple[str, ...] = field(default=())
    version: int = VERSION

    def point(self, name: str) -> OperatingPoint:
        """Return the point called `name`.

        Raises StopIteration if there is none.
        """
        return next(point for point in self.points if point.name == name)

    def nearest(self, bits: float) -> OperatingPoint:
        """Return the point whose mean bits are nearest to `bits`; among about equally near ones, that of lowest KL."""
        nearest = min(abs(point.bits_mean - bits) for point in self.points)
        near = [point for point in self.points if abs(point.bits_mean - bits) <= nearest + SAME_BITS]
        return min(near, key=lambda point: point.kl)

    def smallest_within(self, kl: float) -> OperatingPoint:
        """Return the point with the fewest bytes per token whose KL is at most `kl`.

        Raises DymoeError if there is none.
        """
        fitting = [point for point in self.points if point.kl <= kl]
        if not fitting:
            best = min(self.points, key=lambda point: point.kl)
            enough = math.ceil(best.kl * 1e5) / 1e5  # rounded up, for this to work
            raise DymoeError(f"--quality {kl:g}: the best point, {best.name}, has a KL of {enough:.5f}; allow as much")
        return min(fitting, key=lambda point: point.bytes_per_token)

    def best_within(self, bytes_per_token: float) -> OperatingPoint:
        """Return the point of lowest KL that uses at most `bytes_per_token` when decoding.

        Returns the point with the fewest bytes per token if all use more.
        """
        fitting = [point for point in self.points if point.bytes_per_token <= bytes_per_token]
        if fitting:
            return min(fitting, key=lambda point: point.kl)
        return min(self.points, key=lambda point: point.bytes_per_token)

    def to_json(self) -> dict[str, Any]:
        """Return the content of policy.json."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Policy:
        """Build a policy from the content of policy.json.

        Raises DymoeError if it is malformed or of another version.
        """
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


def _tuples(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """Build dataclass `cls` from JSON values, with lists turned into tuples."""
    return strict(cls, {name: _tuple(value) for name, value in data.items()}, where)


def _tuple(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuple(item) for name, item in value.items()}
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value
