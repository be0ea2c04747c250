"""Operating points: measure sensitivities, solve for thresholds, measure the candidates, keep the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from dymoe_compile.calibrate.statistics import LayerStatistics, significant
from dymoe_compile.checkpoint.window_decoder import bundle_decoder
from dymoe_compile.job.profile import Profile, fits
from dymoe_compile.job.progress import Progress
from dymoe_compile.plan.work import (
    CANDIDATE_TOKENS,
    MAX_WORK,
    SENSITIVITY_TOKENS,
    active_weights,
    measured_tokens,
    wanted_bits,
)
from dymoe_compile.policy.candidates import Candidates
from dymoe_compile.policy.examples import Examples, choose, spread
from dymoe_compile.policy.sensitivity import Decoding, Measurement, Measurer, Original, Prefilling, Rule
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.policy import LayerPolicy, OperatingPoint, Policy, Thresholds
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.score import Score, score_window
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.tools.intervals import Interval, intervals

# The lowest tier ruins an expert if its squared error exceeds both RUINED_SHARE of its squared output and
# RUINED_RATIO times the median of its layer, and if the error at the highest tier is less than half of it.
RUINED_SHARE = 0.5
RUINED_RATIO = 4.0
# A schedule, flat or cosine, replaces the thresholds fitted per layer if its KL is lower by this share.
# Another excerpt of the text can change KL by less than that.
SAME_QUALITY = 0.02


@dataclass(frozen=True)
class Fitted:
    """A policy, and all points that were measured to find it, each with its rule.

    `kl_intervals` has the 95% interval of the KL of each point, by its thresholds for decoding; None if the text was
    too short for one.
    """

    policy: Policy
    compared: tuple[tuple[OperatingPoint, Rule], ...]
    reference_nll: float
    tokens: int  # on which the points were measured
    kl_intervals: Mapping[tuple[Thresholds, ...], Interval | None]
    examples: Examples  # from the text on which the points were measured


def fit_policy(
    bundle: Bundle,
    held_out: np.ndarray,
    original: Original,
    statistics: Mapping[int, LayerStatistics],
    profile: Profile,
    kernels: Kernels,
    progress: Progress,
) -> Fitted:
    """Measure sensitivities, solve for thresholds, measure the candidates, and keep the best points of each size."""
    spec, ladder = bundle.spec, bundle.manifest.ladder
    few = excerpt_for(spec, held_out, original, SENSITIVITY_TOKENS)
    sensitivity = measure_sensitivity(bundle, *few, kernels, progress)
    layers = tuple(layer_policy(layer, statistics, sensitivity) for layer in range(spec.num_layers))
    pinned = tuple(layer.pinned for layer in layers)
    excerpt = excerpt_for(spec, held_out, original, CANDIDATE_TOKENS)
    compare_every = 1 if CANDIDATE_TOKENS * active_weights(spec) <= MAX_WORK else 2
    rules = candidate_rules(spec, ladder, statistics, sensitivity, pinned, compare_every)
    places = spread(excerpt[0])
    measurer = Measurer(bundle, *excerpt, bundle_decoder(bundle, kernels), kernels, places)
    with progress("operating points", spec.num_layers) as advance:
        measured = measurer.measure(list(rules.values()), advance)
    tried = [
        (make_point(name, kind, rule, result, bundle), rule)
        for ((name, kind), rule), result in zip(rules.items(), measured, strict=True)
    ]
    pairs = one_fitted(tried)
    compared = [point for point, _ in pairs]
    kept = best_points([point for point in compared if point.kind != "static"])
    # Whichever schedule decodes, prompts use the fitted thresholds, which are best for them.
    fitted = {point.name: point.prefill for point in compared if point.kind == "mixed"}
    kept = [replace(point, prefill=fitted.get(point.name, point.prefill)) for point in kept]
    with progress("prompt reading", spec.num_layers) as advance:
        reading = measurer.measure([Prefilling(_rule_of(point, ladder, pinned)) for point in kept], advance)
    kept = [replace(point, prefill_kl=significant(result.kl)) for point, result in zip(kept, reading, strict=True)]
    flat = not any(point.kind == "mixed" for point in kept)
    policy = Policy(
        ladder=ladder,
        layers=layers,
        points=tuple(kept),
        default_point=default_point(kept, bundle, profile).name,
        notes=("importance is flat: uniform tiers win everywhere",) if flat else (),
    )
    results = {
        point.decode: result for (point, _), result in zip(tried, measured, strict=True) if point.kind != "static"
    }
    kl_intervals = {thresholds: _kl_interval(result) for thresholds, result in results.items()}
    examples = choose(places, excerpt[1], kept, [results[point.decode].guesses for point in kept])
    return Fitted(policy, tuple(pairs), _reference_nll(*excerpt), excerpt[0].size, kl_intervals, examples)


@dataclass(frozen=True)
class Sensitivity:
    """The effect of one layer at one tier, with all other layers at the highest."""

    kl: float
    router_overlap: float | None  # of the next MoE layer; None for the last one


Table = dict[int, dict[int, Sensitivity]]  # layer -> tier -> Sensitivity


def measure_sensitivity(
    bundle: Bundle, held_out: np.ndarray, original: Original, kernels: Kernels, progress: Progress
) -> Table:
    """Measure KL and the next router's overlap with only one layer below the highest tier.

    Raises DymoeError where KL is not finite.
    """
    ladder, layers, moe = bundle.manifest.ladder, bundle.spec.num_layers, bundle.spec.moe_layers
    top = TierRule.uniform(ladder[-1], ladder, layers)
    cases = [(layer, tier) for layer in moe for tier in ladder[:-1]]
    rules = [Decoding(_with_layer(top, layer, TierRule.uniform(tier, ladder, layers))) for layer, tier in cases]
    with progress("sensitivity", layers) as advance:
        measurer = Measurer(bundle, held_out, original, bundle_decoder(bundle, kernels), kernels)
        base, *results = measurer.measure([Decoding(top), *rules], advance)
    following = dict(zip(moe, (*moe[1:], None), strict=True))
    table: Table = {layer: {} for layer in moe}
    cases += [(layer, ladder[-1]) for layer in moe]
    for (layer, tier), result in zip(cases, [*results, *[base] * len(moe)], strict=True):
        after = following[layer]
        table[layer][tier] = Sensitivity(result.kl, None if after is None else result.router_overlap[after])
        if not math.isfinite(result.kl):
            raise DymoeError(
                f"layer {layer}: its output at {tier} bits is not finite; its weights are out of range for this "
                "precision: copy the checkpoint again, or give higher --tiers"
            )
    return table


def candidate_rules(
    spec: ModelSpec,
    ladder: tuple[int, ...],
    statistics: Mapping[int, LayerStatistics],
    sensitivity: Table,
    pinned: tuple[tuple[int, ...], ...],
    compare_every: int = 1,
) -> dict[tuple[str, str], Rule]:
    """Return (name, kind) -> rule: the uniform rules, and two fits of thresholds for each of `wanted_bits`.

    Every `compare_every`-th of `wanted_bits` also gets the rules that the fits must beat: flat, cosine and static.
    """
    added = {
        layer: {tier: max(seen.kl - row[ladder[-1]].kl, 0.0) for tier, seen in row.items()}
        for layer, row in sensitivity.items()
    }
    rules: dict[tuple[str, str], Rule] = {
        (f"uniform-{tier}", "uniform"): Decoding(TierRule.uniform(tier, ladder, spec.num_layers)) for tier in ladder
    }
    make = Candidates(spec, ladder, statistics, added, pinned)
    for index, bits in enumerate(wanted_bits(ladder)):
        rules[f"{bits:g}", "mixed"] = Decoding(make.fitted(bits))
        rules[f"{bits:g}", "tempered"] = Decoding(make.tempered(bits))
        if index % compare_every:
            continue
        rules[f"{bits:g}", "flat"] = Decoding(make.flat(bits))
        rules[f"{bits:g}", "cosine"] = Decoding(make.cosine(bits))
        rules[f"{bits:g}", "static"] = make.static(bits)
    return rules


def make_point(name: str, kind: str, rule: Rule, result: Measurement, bundle: Bundle) -> OperatingPoint:
    """Return an operating point with its measured quality and size, rounded; `prefill_kl` is still NaN."""
    layout, score = bundle.layout, result.score.to_json()
    active = len(bundle.spec.moe_layers) * bundle.spec.top_k

    return OperatingPoint(
        name=name,
        kind=kind,
        decode=rule.rule.decode if isinstance(rule, Decoding) else (),
        prefill=rule.rule.prefill if isinstance(rule, Decoding) else (),
        bits_mean=round(result.counts.bits_mean, 4),
        effective_bits=round(result.counts.mean(layout.bits_per_weight), 4),
        bytes_per_token=round(result.counts.mean(layout.prefix_bytes) * active),
        kl=significant(score["kl"]),
        nll=significant(score["nll"], 6),
        top1_agreement=significant(score["top1_agreement"]),
        prefill_kl=math.nan,
    )


def one_fitted(tried: Sequence[tuple[OperatingPoint, Rule]]) -> list[tuple[OperatingPoint, Rule]]:
    """Return the points, with the better of the mixed and the tempered point of each name, as kind mixed."""
    rate = _rate([point for point, _ in tried if point.kind == "uniform"])
    mild = {point.name: (point, rule) for point, rule in tried if point.kind == "tempered"}

    def better(point: OperatingPoint, rule: Rule) -> tuple[OperatingPoint, Rule]:
        other = mild.get(point.name) if point.kind == "mixed" else None
        if other is None or _worth(other[0], rate) >= _worth(point, rate):
            return point, rule
        return replace(other[0], kind="mixed"), other[1]

    return [better(point, rule) for point, rule in tried if point.kind != "tempered"]


def best_points(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """Return the uniform points and the best point of every other name, by rising size.

    Drops a point that is not uniform if another point of at most its size has at most its KL. Points that are kept
    count as mixed, whichever schedule their thresholds came from.
    """
    uniform = [point for point in points if point.kind == "uniform"]
    rate = _rate(uniform)
    named: dict[str, OperatingPoint] = {}
    for point in points:
        best = named.get(point.name)
        if best is None or _worth(point, rate) < _worth(best, rate) - SAME_QUALITY:
            named[point.name] = point
    chosen = list(named.values())

    def beaten(point: OperatingPoint) -> bool:
        return any(
            other.bytes_per_token <= point.bytes_per_token
            and (other.kl, other.bytes_per_token, i) < (point.kl, point.bytes_per_token, chosen.index(point))
            for i, other in enumerate(chosen)
        )

    kept = [point if point.kind == "uniform" else replace(point, kind="mixed") for point in chosen if not beaten(point)]
    kept += [point for point in uniform if point not in kept]
    return sorted(kept, key=lambda point: (point.bytes_per_token, point.kl))


def _rate(uniform: Sequence[OperatingPoint]) -> float:
    """Return how fast the logarithm of KL falls per bit, from the lowest to the highest uniform point."""
    low, high = uniform[0], uniform[-1]
    if high.effective_bits <= low.effective_bits or min(low.kl, high.kl) <= 0:
        return 0.0
    return max(0.0, math.log(low.kl / high.kl) / (high.effective_bits - low.effective_bits))


def _worth(point: OperatingPoint, rate: float) -> float:
    """Return the logarithm of KL, corrected to a common size because points of one name differ a little in bits."""
    return math.log(max(point.kl, 1e-12)) + rate * point.effective_bits


def default_point(points: Sequence[OperatingPoint], bundle: Bundle, profile: Profile) -> OperatingPoint:
    """Return the mixed point of least KL whose experts fit the profile's memory, else the one nearest 3 bits.

    Uniform points stand in if no mixed point was kept.
    """
    mixed = [point for point in points if point.kind == "mixed"] or list(points)
    fitting = [point for point in mixed if fits(point, bundle, profile)]
    if fitting:
        return min(fitting, key=lambda point: point.kl)
    return min(mixed, key=lambda point: abs(point.bits_mean - 3))


def layer_policy(layer: int, statistics: Mapping[int, LayerStatistics], sensitivity: Table) -> LayerPolicy:
    """Return a layer's entry of the policy: its statistics and sensitivity, empty for a dense layer."""
    if layer not in statistics:
        return LayerPolicy(layer, {}, (), (), {}, {}, (), (), "none", ())
    seen, row = statistics[layer], sensitivity[layer]
    early = "linear" if seen.predictor.size else "router"
    return LayerPolicy(
        layer=layer,
        sensitivity={str(tier): significant(row[tier].kl) for tier in sorted(row)},
        frequency=tuple(seen.frequency),
        gate_mass=tuple(seen.weight_mass),
        expert_error={tier: tuple(errors) for tier, errors in seen.expert_error.items()},
        router_overlap={
            str(tier): significant(overlap) for tier in sorted(row) if (overlap := row[tier].router_overlap) is not None
        },
        pinned=ruined_experts(seen.expert_error),
        data_free=tuple(seen.data_free),
        look_ahead_by=early if seen.look_ahead["router"] else "none",
        look_ahead_recall=tuple(seen.look_ahead[early]),
    )


def ruined_experts(errors: Mapping[str, Sequence[float]]) -> tuple[int, ...]:
    """Return the experts whose output the lowest tier ruins and the highest does not.

    `errors` maps tiers, in rising order, to relative squared errors [experts].
    """
    rows = list(errors.values())
    lowest, highest = rows[0], rows[-1]
    bound = max(RUINED_SHARE, RUINED_RATIO * median(lowest))
    return tuple(e for e, (low, high) in enumerate(zip(lowest, highest, strict=True)) if low > bound and high < low / 2)


def point_json(point: OperatingPoint) -> dict[str, Any]:
    """Return a point as JSON types, without its thresholds; figures that are not finite become None."""
    values = {name: value for name, value in asdict(point).items() if name not in ("decode", "prefill")}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def excerpt_for(spec: ModelSpec, held_out: np.ndarray, original: Original, tokens: int) -> tuple[np.ndarray, Original]:
    """Return the first windows of `held_out`, with the original model on them.

    They have at most `tokens` tokens, fewer for a large model, but there is at least one window.
    """
    count = max(1, int(measured_tokens(spec, held_out.size, tokens)) // held_out.shape[1])
    return held_out[:count], Original(original.hidden[:count], original.head)


def _kl_interval(result: Measurement) -> Interval | None:
    """Return the 95% interval of a measured KL, rounded as the KL is; None if there is too little text for one."""
    interval = intervals(result.windows)["kl_interval"]
    return interval and (significant(interval[0]), significant(interval[1]))


def _reference_nll(held_out: np.ndarray, original: Original) -> float:
    total = Score()
    for ids, hidden in zip(held_out, original.hidden, strict=True):
        total.add(score_window(ids, hidden, original.head))
    return significant(total.nll_sum / total.tokens, 6)


def _rule_of(point: OperatingPoint, ladder: tuple[int, ...], pinned: tuple[tuple[int, ...], ...]) -> TierRule:
    return TierRule(ladder, point.decode, point.prefill, pinned if point.kind == "mixed" else ())


def _with_layer(rule: TierRule, layer: int, other: TierRule) -> TierRule:
    """Return `rule` with the thresholds of `other` in one layer."""

    def swap(rows: tuple[Any, ...], row: Any) -> tuple[Any, ...]:
        return (*rows[:layer], row, *rows[layer + 1 :])

    return TierRule(rule.ladder, swap(rule.decode, other.decode[layer]), swap(rule.prefill, other.prefill[layer]))
