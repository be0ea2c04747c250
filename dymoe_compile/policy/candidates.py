"""Rules to measure: thresholds fitted per layer, and the simpler rules that they must beat at equal bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dymoe_compile.calibrate.statistics import LayerStatistics
from dymoe_compile.policy.allocate import Choice, expert_choices, layer_options, lower_hull, solve
from dymoe_compile.policy.sensitivity import Static
from dymoe_runtime.bundle.policy import Thresholds
from dymoe_runtime.model.tier_rule import ALWAYS, TierRule
from dymoe_runtime.spec import ModelSpec

# Amplitude of the cosine schedule: with depth, factors on thresholds fall from 1 + this to 1 - this.
COSINE_DEPTH = 0.5
# Exponent of a layer's own sensitivity in `tempered`; the exponent of the mean over layers is 1 - TEMPER.
TEMPER = 0.5

# layer -> tier -> KL that the layer adds at that tier
Added = Mapping[int, Mapping[int, float]]


@dataclass(frozen=True)
class Settings:
    """Choices of thresholds for one layer, when decoding and when reading a prompt."""

    decode: Sequence[Choice]
    prefill: Sequence[Choice]


class Candidates:
    """A maker of rules for one model, each with at most a wanted mean number of bits."""

    def __init__(
        self,
        spec: ModelSpec,
        ladder: tuple[int, ...],
        statistics: Mapping[int, LayerStatistics],
        added: Added,
        pinned: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self._spec = spec
        self._ladder = ladder
        self._statistics = statistics
        self._added = added
        self._pinned = pinned
        self._options = {layer: self._settings(layer, added) for layer in spec.moe_layers}
        mild = tempered(added)
        self._mild_options = {layer: self._settings(layer, mild) for layer in spec.moe_layers}

    def fitted(self, bits: float) -> TierRule:
        """Return the rule whose thresholds come from the budgeted solve."""
        return self._solved(self._options, bits)

    def tempered(self, bits: float) -> TierRule:
        """Return the rule of the budgeted solve with `tempered` sensitivities, which differ less between layers.

        Costs measured one layer at a time overstate the cost of all layers together.
        """
        return self._solved(self._mild_options, bits)

    def _solved(self, options: Mapping[int, Settings], bits: float) -> TierRule:
        decode = solve([lower_hull(options[layer].decode) for layer in self._spec.moe_layers], bits)
        prefill = solve([lower_hull(options[layer].prefill) for layer in self._spec.moe_layers], bits)
        return self._rule([c.thresholds for c in decode], [c.thresholds for c in prefill])

    def flat(self, bits: float) -> TierRule:
        """Return the rule with the best thresholds that are equal in all layers."""
        return self._scheduled(bits, [1.0] * len(self._spec.moe_layers))

    def cosine(self, bits: float) -> TierRule:
        """Return the rule with the best thresholds that fall with depth by a fixed cosine, as in arXiv 2603.19172."""
        last = max(len(self._spec.moe_layers) - 1, 1)
        factors = [1 + COSINE_DEPTH * math.cos(math.pi * i / last) for i in range(len(self._spec.moe_layers))]
        return self._scheduled(bits, factors)

    def static(self, bits: float) -> Static:
        """Return a fixed tier for each expert, whatever the token, from the budgeted solve over experts."""
        keys, hulls = [], []
        for layer in self._spec.moe_layers:
            seen = self._statistics[layer]
            mean = sum(seen.frequency) / len(seen.frequency)
            for expert, frequency in enumerate(seen.frequency):
                keys.append((layer, expert))
                hulls.append(
                    expert_choices(frequency / mean, seen.weight_energy[expert], self._added[layer], self._ladder)
                )
        table = [[self._ladder[-1]] * self._spec.num_experts for _ in range(self._spec.num_layers)]
        for (layer, expert), choice in zip(keys, solve(hulls, bits), strict=True):
            table[layer][expert] = int(choice.thresholds[0])
        return Static(tuple(map(tuple, table)))

    def _settings(self, layer: int, added: Added) -> Settings:
        seen = self._statistics[layer]
        return Settings(
            layer_options(seen.weights, np.square(seen.weights), added[layer], self._ladder),
            layer_options(seen.chunk_importance, seen.chunk_energy, added[layer], self._ladder),
        )

    def _scheduled(self, bits: float, factors: Sequence[float]) -> TierRule:
        """Return the rule of the best single choice of thresholds, scaled by each layer's factor."""
        options = [self._options[layer] for layer in self._spec.moe_layers]
        decode = _best_common([o.decode for o in options], factors, bits)
        prefill = _best_common([o.prefill for o in options], factors, bits)
        return self._rule(decode, prefill)

    def _rule(self, decode: Sequence[Thresholds], prefill: Sequence[Thresholds]) -> TierRule:
        """Return the rule with these thresholds in the MoE layers; those of dense layers have no effect."""
        whole: Thresholds = (ALWAYS,) * len(self._ladder)

        def rows(values: Sequence[Thresholds]) -> tuple[Thresholds, ...]:
            by_layer = dict(zip(self._spec.moe_layers, values, strict=True))
            return tuple(by_layer.get(layer, whole) for layer in range(self._spec.num_layers))

        return TierRule(self._ladder, rows(decode), rows(prefill), self._pinned)


def tempered(added: Added) -> dict[int, dict[int, float]]:
    """Return the KL that each layer adds, moved towards the mean over layers at that tier.

    The result is the geometric mean of both, with TEMPER as the weight of the layer's own.
    """
    tiers = {tier for row in added.values() for tier in row}
    mean = {tier: sum(row[tier] for row in added.values()) / len(added) for tier in tiers}
    return {
        layer: {tier: kl**TEMPER * mean[tier] ** (1 - TEMPER) for tier, kl in row.items()}
        for layer, row in added.items()
    }


def _best_common(options: Sequence[Sequence[Choice]], factors: Sequence[float], bits: float) -> list[Thresholds]:
    """Return thresholds per layer, scaled from one base: the base of least cost with mean bits of at most `bits`.

    A layer's thresholds are those of the base times the layer's factor, rounded to the grid.
    """
    by_thresholds = [{choice.thresholds: choice for choice in layer} for layer in options]
    grid = sorted({value for choice in options[0] for value in choice.thresholds})
    scaled_by = [{value: _on_grid(value, factor, grid) for value in grid} for factor in factors]
    best: tuple[float, list[Choice]] | None = None
    for base in options[0]:
        scaled = [
            layer[tuple(to[value] for value in base.thresholds)]
            for layer, to in zip(by_thresholds, scaled_by, strict=True)
        ]
        if sum(choice.bits for choice in scaled) <= bits * len(scaled) + 1e-9:
            cost = sum(choice.cost for choice in scaled)
            if best is None or cost < best[0]:
                best = cost, scaled
    assert best is not None, "the lowest uniform tier is always among them"
    return [choice.thresholds for choice in best[1]]


def _on_grid(value: float, factor: float, grid: Sequence[float]) -> float:
    """Return `value` times `factor`, rounded to the grid; NEVER and ALWAYS stay as they are."""
    return value if value >= ALWAYS else min(grid, key=lambda g: abs(g - value * factor))
