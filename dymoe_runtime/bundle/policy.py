"""policy.json: measurements of a model's layers, and the operating points chosen from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NoReturn

from msgspec import Meta

from dymoe_runtime.bundle.tiers import check_ladder
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import strict
from dymoe_runtime.spec import Factor, Number, Real

VERSION = 2
# Points whose distances to the wanted bits differ by at most this count as equally near.
SAME_BITS = 0.06

REMEDY = "recompile the bundle"

Threshold = Annotated[float, Meta(ge=0, le=2)]
Thresholds = tuple[Threshold, ...]
KINDS, LOOK_AHEADS = ("uniform", "mixed"), ("router", "linear", "none")


@dataclass(frozen=True)
class OperatingPoint:
    """A setting of the thresholds that choose tiers, with its measured quality and size.

    `decode[layer]` and `prefill[layer]` hold one threshold per tier of the ladder, highest tier first. An expert gets
    the highest tier whose threshold exceeds the share of importance that comes before it. If there is none, the expert
    is skipped. `model/tier_rule.py` applies these rules.
    """

    name: Annotated[str, Meta(pattern="^[!-~][ -~]*$", max_length=100)]
    kind: str  # uniform or mixed
    decode: tuple[Thresholds, ...]
    prefill: tuple[Thresholds, ...]
    bits_mean: Factor  # mean tier of an active expert when decoding, over tokens and layers
    effective_bits: Factor  # bits per weight when decoding, scale indices and multipliers included
    bytes_per_token: Factor  # bytes of expert records that decoding one token uses
    kl: Real  # to the original model, nats per token, decoding held-out calibration text
    nll: Real  # nats per token
    top1_agreement: Factor
    prefill_kl: Real  # KL when the prefill thresholds choose the tiers

    def fits(self, layers: int, tiers: int) -> bool:
        """Return whether there is a rising row of thresholds for each layer, with one for each tier."""
        return self.kind in KINDS and all(
            len(rows) == layers and all(len(row) == tiers and list(row) == sorted(row) for row in rows)
            for rows in (self.decode, self.prefill)
        )


@dataclass(frozen=True)
class LayerPolicy:
    """Measurements of one layer; lists over experts are empty for a dense layer."""

    layer: Number
    sensitivity: Mapping[str, Real]  # tier -> KL of the model with only this layer at the tier, others highest
    frequency: tuple[Factor, ...]  # [experts], share of tokens routed to each
    gate_mass: tuple[Factor, ...]  # [experts], share of the layer's routing weights
    expert_error: Mapping[str, tuple[Factor, ...]]  # tier -> [experts], squared error relative to squared output
    router_overlap: Mapping[str, Factor]  # tier -> share of the next router's choices unchanged by this layer at it
    pinned: tuple[Number, ...]  # experts that the lowest tier ruins; mixed points run them at the highest
    data_free: tuple[Number, ...]  # experts with too few routed tokens, quantized without calibration
    look_ahead_by: str  # what prefetch asks one layer early: router, linear (a fitted predictor) or none
    look_ahead_recall: tuple[Factor, ...]  # [ranks], share of tokens whose guess of that rank was routed to

    def fits(self, experts: int, ladder: tuple[int, ...]) -> bool:
        """Return whether lists and numbers fit a layer of so many experts, 0 for none, at the tiers of `ladder`."""
        tiers = set(map(str, ladder)) if experts else set()
        lists = (self.frequency, self.gate_mass, *self.expert_error.values())
        return (
            self.look_ahead_by in LOOK_AHEADS
            and all(len(values) == experts for values in lists)
            and set(self.sensitivity) == set(self.expert_error) == tiers
            and set(self.router_overlap) <= tiers
            and all(expert < experts for expert in (*self.pinned, *self.data_free))
            and len(self.look_ahead_recall) <= experts
        )


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
    def from_json(data: Mapping[str, Any], where: str = "policy.json") -> Policy:
        """Build a policy from the content of policy.json; `where` names the file in errors.

        Raises DymoeError if it is malformed or of another version.
        """
        version = data.get("version")
        if type(version) is not int or version != VERSION:
            raise DymoeError(
                f"{where}: version {str(version)[:60]}, this runtime reads {VERSION}; recompile or upgrade"
            )
        policy = strict(Policy, data, where, REMEDY)
        try:
            check_ladder(policy.ladder)
        except ValueError as error:
            raise DymoeError(f"{where}: {error}; {REMEDY}") from error
        names = [point.name for point in policy.points]
        if len(set(names)) < len(names) or policy.default_point not in names:
            raise DymoeError(f"{where}: 'default_point' is no point, or two points have one name; {REMEDY}")
        return policy

    def check(self, where: str, ladder: tuple[int, ...], experts: Sequence[int]) -> None:
        """Raise DymoeError unless the policy fits a model: its ladder, and the number of experts of each layer.

        The number is 0 for a layer without experts. `where` names the file.
        """
        if self.ladder != ladder:
            self._refuse(where, "'ladder' is another one than in the manifest")
        if [layer.layer for layer in self.layers] != list(range(len(experts))):
            self._refuse(where, "'layers' are not those of the model")
        for layer, count in zip(self.layers, experts, strict=True):
            if not layer.fits(count, ladder):
                self._refuse(where, f"'layers[{layer.layer}]' does not fit the model")
        for number, point in enumerate(self.points):
            if not point.fits(len(experts), len(ladder)):
                self._refuse(where, f"'points[{number}]' does not fit the model")

    @staticmethod
    def _refuse(where: str, what: str) -> NoReturn:
        raise DymoeError(f"{where}: {what}; {REMEDY}")
