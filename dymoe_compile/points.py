"""Operating points: sensitivities measured, thresholds solved for, candidates run, the best kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dymoe_compile.allocate import layer_choices, solve
from dymoe_compile.calibration import LayerStatistics
from dymoe_compile.progress import Progress
from dymoe_compile.sensitivity import Measurement, Measurer, Original
from dymoe_runtime.bundle import DENSE, Bundle
from dymoe_runtime.device import Profile
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model import PROCESS_BYTES
from dymoe_runtime.policy import LayerPolicy, OperatingPoint, Policy, TierRule

# Held-out tokens for the many runs that sensitivity takes; operating points use all of them.
SENSITIVITY_TOKENS = 2048
# Mean bits that mixed operating points aim at, between the tiers of the ladder.
POINT_STEP = 0.25


def fit_policy(
    bundle: Bundle,
    held_out: torch.Tensor,
    original: Original,
    statistics: dict[int, LayerStatistics],
    profile: Profile,
    progress: Progress,
) -> Policy:
    """Measure sensitivities, solve for thresholds, measure the candidates, keep those that are best at their size."""
    few = max(1, SENSITIVITY_TOKENS // held_out.shape[1])
    excerpt = Original(original.hidden[:few], original.head)
    sensitivity = measure_sensitivity(bundle, held_out[:few], excerpt, progress)
    rules = candidates(bundle, statistics, sensitivity)
    measurer = Measurer(bundle, held_out, original)
    with progress("operating points", bundle.spec.num_layers) as advance:
        measured = measurer.measure(list(rules.values()), advance)
    points = [
        make_point(name, rule, result, bundle) for (name, rule), result in zip(rules.items(), measured, strict=True)
    ]
    kept = best_points(points)
    notes = (
        () if any(point.kind == "mixed" for point in kept) else ("importance is flat: uniform tiers win everywhere",)
    )
    return Policy(
        ladder=bundle.manifest.ladder,
        layers=tuple(layer_policy(layer, statistics, sensitivity) for layer in range(bundle.spec.num_layers)),
        points=tuple(kept),
        default_point=default_point(kept, bundle, profile).name,
        notes=notes,
    )


def measure_sensitivity(
    bundle: Bundle, held_out: torch.Tensor, original: Original, progress: Progress
) -> dict[int, dict[int, float]]:
    """layer -> tier -> KL of the model with only that layer at that tier and all others at the highest."""
    ladder, layers = bundle.manifest.ladder, bundle.spec.num_layers
    top = TierRule.uniform(ladder[-1], ladder, layers)
    cases = [(layer, tier) for layer in bundle.spec.moe_layers for tier in ladder]
    rules = [_with_layer(top, layer, TierRule.uniform(tier, ladder, layers)) for layer, tier in cases]
    with progress("sensitivity", layers) as advance:
        results = Measurer(bundle, held_out, original).measure(rules, advance)
    table: dict[int, dict[int, float]] = {layer: {} for layer in bundle.spec.moe_layers}
    for (layer, tier), result in zip(cases, results, strict=True):
        table[layer][tier] = result.score.kl_sum / result.score.compared
        if not math.isfinite(table[layer][tier]):
            raise DymoeError(
                f"layer {layer}: its output at {tier} bits is not finite; its weights are out of range for this "
                "precision: copy the checkpoint again, or give higher --tiers"
            )
    return table


def candidates(
    bundle: Bundle, statistics: dict[int, LayerStatistics], sensitivity: dict[int, dict[int, float]]
) -> dict[str, TierRule]:
    """Uniform rules, and a mixed rule for each mean number of bits between the lowest and the highest tier."""
    ladder, layers = bundle.manifest.ladder, bundle.spec.num_layers
    rules = {f"uniform-{tier}": TierRule.uniform(tier, ladder, layers) for tier in ladder}
    added = {layer: {t: max(kl - row[ladder[-1]], 0.0) for t, kl in row.items()} for layer, row in sensitivity.items()}
    decode, prefill = [], []
    for layer in bundle.spec.moe_layers:
        seen = statistics[layer]
        decode.append(layer_choices(seen.gates, seen.gates.square(), added[layer], ladder))
        prefill.append(layer_choices(seen.chunk_importance, seen.chunk_energy, added[layer], ladder))
    count = round((ladder[-1] - ladder[0]) / POINT_STEP)
    for bits in (ladder[0] + POINT_STEP * i for i in range(1, count)):
        rule = rules[f"uniform-{ladder[-1]}"]
        chosen = zip(bundle.spec.moe_layers, solve(decode, bits), solve(prefill, bits), strict=True)
        for layer, for_token, for_chunk in chosen:
            row = TierRule(ladder, (for_token.thresholds,) * layers, (for_chunk.thresholds,) * layers)
            rule = _with_layer(rule, layer, row)
        rules[f"{bits:g}"] = rule
    return rules


def make_point(name: str, rule: TierRule, result: Measurement, bundle: Bundle) -> OperatingPoint:
    """An operating point with its measured quality and size; figures rounded to what is meaningful."""
    layout, score = bundle.layout, result.score.to_json()
    pairs = sum(result.used.values())
    active = len(bundle.spec.moe_layers) * bundle.spec.top_k

    def mean(value: Callable[[int], float]) -> float:
        return sum(value(tier) * count for tier, count in result.used.items()) / pairs

    return OperatingPoint(
        name=name,
        kind="uniform" if name.startswith("uniform") else "mixed",
        decode=rule.decode,
        prefill=rule.prefill,
        bits_mean=round(mean(float), 4),
        effective_bits=round(mean(layout.bits_per_weight), 4),
        bytes_per_token=round(mean(layout.prefix_bytes) * active),
        kl=_significant(score["kl"]),
        nll=_significant(score["nll"], 6),
        top1_agreement=_significant(score["top1_agreement"]),
    )


def best_points(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """Uniform points, and mixed ones that nothing of their size or smaller equals; by rising bits."""

    def beaten(point: OperatingPoint) -> bool:
        return any(
            other is not point and other.bytes_per_token <= point.bytes_per_token and other.kl <= point.kl
            for other in points
        )

    kept = [point for point in points if point.kind == "uniform" or not beaten(point)]
    return sorted(kept, key=lambda point: (point.bytes_per_token, point.kl))


def default_point(points: Sequence[OperatingPoint], bundle: Bundle, profile: Profile) -> OperatingPoint:
    """The best mixed point whose experts fit the profile's memory, else the one nearest 3 bits.

    Uniform points stand in where no mixed one was kept.
    """
    mixed = [point for point in points if point.kind == "mixed"] or list(points)
    whole = max(point.effective_bits for point in points)
    room = profile.memory_bytes - PROCESS_BYTES - bundle.manifest.files[DENSE].nbytes
    fitting = [point for point in mixed if bundle.expert_bytes() * point.effective_bits / whole <= room]
    if fitting:
        return min(fitting, key=lambda point: point.kl)
    return min(mixed, key=lambda point: abs(point.bits_mean - 3))


def layer_policy(
    layer: int, statistics: dict[int, LayerStatistics], sensitivity: dict[int, dict[int, float]]
) -> LayerPolicy:
    if layer not in statistics:
        return LayerPolicy(layer, {}, (), (), ())
    seen = statistics[layer]
    return LayerPolicy(
        layer=layer,
        sensitivity={str(tier): _significant(kl) for tier, kl in sensitivity[layer].items()},
        frequency=tuple(seen.frequency),
        gate_mass=tuple(seen.gate_mass),
        look_ahead_recall=tuple(seen.recall),
    )


def _with_layer(rule: TierRule, layer: int, other: TierRule) -> TierRule:
    """`rule` with the thresholds of `other` in one layer."""

    def swap(rows: tuple[Any, ...], row: Any) -> tuple[Any, ...]:
        return (*rows[:layer], row, *rows[layer + 1 :])

    return TierRule(rule.ladder, swap(rule.decode, other.decode[layer]), swap(rule.prefill, other.prefill[layer]))


def _significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
