"""Thresholds per layer from measured sensitivities: a budgeted solve over convex hulls.

Model: the error that an expert at tier t adds to its layer grows with its gate squared, so
a rule costs, in KL, sum_t S[layer, t] * (share of squared gates that runs at t), where
S[layer, t] was measured with the whole layer at t. Each layer offers the rules on the lower
convex hull of (bits, cost); bits are spent where they lower the cost most (Shoham & Gersho 1988).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dymoe_runtime.policy import ALWAYS, Thresholds, tiers_by_mass

# Shares of importance at which the next lower tier may begin.
SHARES = (0.0, 0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, ALWAYS)
# The same for ladders of up to three tiers, whose combinations are few.
FINE_SHARES = (*(i / 20 for i in range(20)), ALWAYS)


@dataclass(frozen=True)
class Choice:
    """One setting of a layer's thresholds, with its mean bits and modelled cost."""

    thresholds: Thresholds
    bits: float
    cost: float


def layer_options(
    importance: np.ndarray, energy: np.ndarray, sensitivity: Mapping[int, float], ladder: Sequence[int]
) -> list[Choice]:
    """All choices of one layer.

    importance, energy [samples, n]: of the experts that were active together (0 where not);
    sensitivity: tier -> added KL with the whole layer at that tier.
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
    """The choices of one expert that keeps its tier: its bits count by `weight`, its cost by its share of `energy`."""
    return lower_hull([Choice((tier,), weight * tier, energy * sensitivity[tier]) for tier in ladder])


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of (bits, cost), by rising bits and falling cost."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) >= 2 and _slope(hull[-1], choice) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def solve(layers: Sequence[Sequence[Choice]], bits: float) -> list[Choice]:
    """One choice per layer with mean bits of at most `bits`, where they buy most; greedy on the hulls."""
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
    """Change of cost per bit from a to b; negative, and the steeper the better."""
    return (b.cost - a.cost) / max(b.bits - a.bits, 1e-12)
