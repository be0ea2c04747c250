"""The current operating point, and the choice of a decoded token's tiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.policy import OperatingPoint, Policy
from dymoe_runtime.engine.options import NO_DEPTH, TIER, RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.store.request import ExpertRequest, token_request

# Difference in mean bits up to which the nearest point runs without a note.
NEAR_BITS = 0.06
# Mean bits outside the range of the points by more than this are an error.
BEYOND_BITS = 0.5


class Precision:
    """The name of the current operating point or tier, and its rule. They can change between passes.

    `is_requested` is false if the memory has decided which one.
    """

    def __init__(self, name: str, rule: TierRule, is_requested: bool = True) -> None:
        self.name, self.rule, self.is_requested = name, rule, is_requested

    def bits_mean(self, policy: Policy) -> float:
        """Return the measured mean bits of an active expert; the highest tier of the rule if none were measured."""
        name = self.name.removesuffix(NO_DEPTH)
        measured = (point.bits_mean for point in policy.points if point.name == name)
        return next(measured, float(max(self.rule.highest)))

    def set(self, name: str, rule: TierRule) -> None:
        """Use another rule from the next pass on, under a new name."""
        self.name, self.rule, self.is_requested = name, rule, True

    def set_point(self, point: OperatingPoint, policy: Policy) -> None:
        """Use another operating point of `policy` from the next pass on."""
        self.set(point.name, TierRule.of(point, policy))


class Chosen(NamedTuple):
    """The tiers of a token's experts, 0 for skipped ones, and requests for experts that run below their wanted tier."""

    tiers: list[int]
    lacking: Sequence[ExpertRequest] = ()


class TokenTiers(Protocol):
    """A choice of the tiers of a decoded token's experts."""

    by_rule: bool  # whether an expert that is resident at the rule's tier runs at that tier
    for_each: bool  # whether each of several tokens that are decoded together chooses like this, not by the rule

    def choose(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> Chosen:
        """Return the tiers of `experts`, which are ordered by falling routing weight."""


class RuleTiers:
    """`TokenTiers` by the current rule."""

    by_rule, for_each = True, False

    def __init__(self, precision: Precision) -> None:
        self._precision = precision

    def choose(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> Chosen:
        return Chosen(self._precision.rule.choose_for_token(layer, experts, weights))


class ResidentTiers(Protocol):
    """Anything that knows the resident tiers of experts, such as `ExpertStore`."""

    def resident_tier(self, request: ExpertRequest) -> int:
        """Return the highest tier, up to the requested one, that can run without waiting; 0 if there is none."""

    def arriving_tier(self, request: ExpertRequest) -> int:
        """Return the highest tier, up to the requested one, that can run once queued reads have ended; 0 if none."""


class LatencyTiers:
    """`TokenTiers` by the rule that do not wait for the upper planes of an expert below the highest tier.

    Such an expert runs at the tier that is resident, else at the tier that a read in flight brings, else at the lowest
    tier. An expert of the highest tier is always waited for.
    """

    by_rule = for_each = True

    def __init__(self, precision: Precision, store: ResidentTiers) -> None:
        self._precision, self._store = precision, store

    def choose(self, layer: int, experts: Sequence[int], weights: Sequence[float]) -> Chosen:
        rule = self._precision.rule
        wanted = rule.choose_for_token(layer, experts, weights)
        requests = [token_request(layer, expert, tier) for expert, tier in zip(experts, wanted, strict=True)]
        always = (0, rule.ladder[-1])
        now = [r.tier if r.tier in always else self._least_waiting(r) for r in requests]
        return Chosen(now, [r for r, tier in zip(requests, now, strict=True) if tier < r.tier])

    def _least_waiting(self, request: ExpertRequest) -> int:
        """Return the resident tier, else the tier that a read in flight brings, else the lowest tier."""
        store = self._store
        return store.resident_tier(request) or store.arriving_tier(request) or self._precision.rule.ladder[0]


class Choice(NamedTuple):
    """The name and rule to run, and a note if they are not exactly what was requested."""

    name: str
    rule: TierRule
    note: str = ""


def choose_precision(bundle: Bundle, options: RunOptions, arena_bytes: int) -> Choice:
    """Return the operating point or tier that the options request; raise DymoeError if the bundle does not have it."""
    ladder, layers = bundle.manifest.ladder, bundle.spec.num_layers
    if options.tier is not None:
        if options.tier not in ladder:
            raise DymoeError(f"--tiers {options.tier}: the bundle has tiers {', '.join(map(str, ladder))}")
        return Choice(f"{TIER}{options.tier}", TierRule.uniform(options.tier, ladder, layers))
    point, note = _choose_point(bundle, options, arena_bytes)
    if not options.dynamic:
        tier = min(ladder, key=lambda t: abs(t - point.bits_mean))
        return Choice(f"{TIER}{tier}", TierRule.uniform(tier, ladder, layers), note)
    rule = TierRule.of(point, bundle.policy)
    if options.depth:
        return Choice(point.name, rule, note)
    return Choice(f"{point.name}{NO_DEPTH}", rule.without_depth(), note)


def _choose_point(bundle: Bundle, options: RunOptions, arena_bytes: int) -> tuple[OperatingPoint, str]:
    policy = bundle.policy
    if options.quality is not None:
        return policy.smallest_within(options.quality), ""
    if options.point is None:
        return policy.point(policy.default_point), ""
    if options.point == "auto":
        return policy.best_within(_affordable_bytes_per_token(bundle, arena_bytes)), ""
    return _nearest_point(policy, options.point)


def _nearest_point(policy: Policy, wanted: str) -> tuple[OperatingPoint, str]:
    """Return the point named `wanted`, or the one nearest to `wanted` mean bits with a note if they differ."""
    for point in policy.points:
        if point.name == wanted:
            return point, ""
    names, sizes = ", ".join(point.name for point in policy.points), [point.bits_mean for point in policy.points]
    try:
        bits = float(wanted)
    except ValueError as error:
        raise DymoeError(f"--point {wanted}: the bundle has no such point; give one of {names}") from error
    if not min(sizes) - BEYOND_BITS <= bits <= max(sizes) + BEYOND_BITS:
        raise DymoeError(f"--point {wanted}: the bundle has points of {min(sizes):g} to {max(sizes):g} bits: {names}")
    point = policy.nearest(bits)
    if abs(point.bits_mean - bits) <= NEAR_BITS:
        return point, ""
    return point, f"there is no point {wanted}; running {point.name}, the best near it of {names}"


def _affordable_bytes_per_token(bundle: Bundle, arena_bytes: int) -> float:
    """Return the bytes per token of a point at whose mean expert size all experts would just fill the arena."""
    share = arena_bytes / max(bundle.expert_bytes(), 1)
    whole = max(point.bytes_per_token for point in bundle.policy.points)
    return whole * min(1.0, share)
