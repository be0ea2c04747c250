"""Thresholds per layer from measured sensitivities, by a budgeted solve over convex hulls.

The error that an expert at tier t adds to its layer grows with the square of its routing weight. So the cost of a rule
is modelled as sum_t S[layer, t] * (share of squared routing weights that runs at t), in KL. S[layer, t] was measured
with the whole layer at t. Each layer offers the rules on the lower convex hull of (bits, cost). Bits are spent where
they lower the cost most (Shoham & Gersho 1988).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dymoe_runtime.bundle.policy import Thresholds
from dymoe_runtime.model.tier_rule import ALWAYS, tiers_by_mass

# Shares of importance at which the next lower tier may begin.
SHARES = (0.0, 0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, ALWAYS)
# A finer grid for ladders of up to three tiers, which have few combinations.
FINE_SHARES = (*(i / 20 for i in range(20)), ALWAYS)


@dataclass(frozen=True)
class Choice:
    """One setting of a layer's thresholds, or of one expert's tier, with its mean bits and modelled cost."""

    thresholds: Thresholds
    bits: float
    cost: float


def layer_options(
    importance: np.ndarray, energy: np.ndarray, sensitivity: Mapping[int, float], ladder: Sequence[int]
) -> list[Choice]:
    """Return all choices of thresholds for one layer.

    importance and energy are [samples, n]: a row has the experts that were active together, 0 for the others.
    sensitivity maps each tier to the KL added with the whole layer at that tier.
    """
    active = importance > 0
    energy = energy / energy.sum()
    choices = []
    grid = FINE_SHARES if len(ladder) <= 3 else SHARES
    for shares in itertools.combinations_with_replacement(grid, len(ladder) - 1):
        thresholds = (*shares, ALWAYS)
        tiers = tiers_by_mass(importance, thresholds, ladder)
        bits = float(tiers[active].mean())
        cost = sum(sensitivity[tier] * float(energy[tiers == tier].sum(dtype=np.float64)) for tier in ladder)
        choices.append(Choice(thresholds, bits, cost))
    return choices


def expert_choices(
    weight: float, energy: float, sensitivity: Mapping[int, float], ladder: Sequence[int]
) -> list[Choice]:
    """Return the lower hull of choices for one expert with a fixed tier, which takes the place of thresholds.

    Bits count `weight` times. `energy` is the expert's share of its layer's squared routing weights.
    """
    return lower_hull([Choice((tier,), weight * tier, energy * sensitivity[tier]) for tier in ladder])


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the lower convex hull of (bits, cost), by rising bits and falling cost."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) >= 2 and _slope(hull[-1], choice) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def solve(layers: Sequence[Sequence[Choice]], bits: float) -> list[Choice]:
    """Return one choice per layer with mean bits of at most `bits`, spent where they lower the cost most.

    The choices of each layer must be a lower hull. The solve is greedy.
    """
    picked = [0] * len(layers)
    steps = sorted(
        (_slope(a, b), layer, i)
        for layer, hull in enumerate(layers)
        for i, (a, b) in enumerate(itertools.pairwise(hull), 1)
    )
    total = sum(hull[0].bits for hull in layers)
    for _, layer, i in steps:
        more = layers[layer][i].bits - layers[layer][picked[layer]].bits
        if picked[layer] == i - 1 and total + more <= bits * len(layers) + 1e-9:
            picked[layer], total = i, total + more
    return [hull[i] for hull, i in zip(layers, picked, strict=True)]


def _slope(a: Choice, b: Choice) -> float:
    """Return the change of cost per bit from a to b: negative, and the steeper the better."""
    return (b.cost - a.cost) / max(b.bits - a.bits, 1e-12)
