"""How a bundle is to be run, and the rule for tiers that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dymoe_runtime.budget import Budget
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.eviction import EVICTIONS, GROWTH
from dymoe_runtime.policy import TierRule

# What a uniform setting is called, before its bits.
TIER = "tier "
# What is added to the name of a point whose thresholds are the same in all layers.
NO_DEPTH = " without depth"


def label_of(name: str) -> str:
    """What was asked for as a person reads it: 'tier 4', 'point 3'."""
    return name if name.startswith(TIER) else f"point {name}"


@dataclass(frozen=True)
class RunOptions:
    """How to run a bundle; None means the measured or detected default."""

    memory_bytes: int | None = None
    beside_bytes: int = 0  # of what the process holds already, what is no part of that
    arena_bytes: int | None = None  # for tests: the expert arena alone, whatever the process uses
    context: int | None = None
    kv_bits: int = 16
    point: str | None = None  # None: the policy's default; auto; or mean bits
    quality: float | None = None  # the smallest point with at most this KL
    tier: int | None = None  # every expert at this tier
    threads: int | None = None
    pin_threads: bool = False
    trace: Path | None = None  # where to write what every layer does
    decisions: Path | None = None  # a trace whose tiers to choose again
    fade: float = GROWTH  # of uses in the store, by a token
    eviction: str = EVICTIONS[0]
    overlap: bool = True  # compute experts while others are read
    preload: bool = False  # start to read likely experts before anything else is loaded
    warm_set: Path | None = None  # uses of the last session, read at the start and replaced at the end
    latency: bool = False  # let what is in memory lower the tier of experts that matter less
    look_ahead: bool = True
    dynamic: bool = True
    depth: bool = True


def choose_rule(bundle: Bundle, options: RunOptions, budget: Budget) -> tuple[str, TierRule]:
    """The name of what was asked for, and its rule; DymoeError if the bundle does not have it."""
    policy, ladder, layers = bundle.policy, bundle.manifest.ladder, bundle.spec.num_layers
    if options.tier is not None:
        if options.tier not in ladder:
            raise DymoeError(f"--tiers {options.tier}: the bundle has tiers {', '.join(map(str, ladder))}")
        return f"{TIER}{options.tier}", TierRule.uniform(options.tier, ladder, layers)
    if options.quality is not None:
        point = policy.smallest_within(options.quality)
    elif options.point is None:
        point = policy.point(policy.default_point)
    elif options.point == "auto":
        point = policy.best_within(_affordable_bytes_per_token(bundle, options.arena_bytes or budget.arena))
    else:
        point = policy.nearest(float(options.point))
    if not options.dynamic:
        tier = min(ladder, key=lambda t: abs(t - point.bits_mean))
        return f"{TIER}{tier}", TierRule.uniform(tier, ladder, layers)
    rule = TierRule.of(point, policy)
    return (point.name, rule) if options.depth else (f"{point.name}{NO_DEPTH}", rule.without_depth())


def _affordable_bytes_per_token(bundle: Bundle, arena: int) -> float:
    """Bytes per token of the point at which all experts, at that point's mean size, would just fill the arena."""
    share = arena / max(bundle.expert_bytes(), 1)
    whole = max(point.bytes_per_token for point in bundle.policy.points)
    return whole * min(1.0, share)
