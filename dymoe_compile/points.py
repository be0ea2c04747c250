"""Operating points: sensitivities measured, thresholds solved for, candidates run, the best kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from dymoe_compile.calibration import LayerStatistics, significant
from dymoe_compile.candidates import Candidates
from dymoe_compile.progress import Progress
from dymoe_compile.sensitivity import Decoding, Measurement, Measurer, Original, Prefilling, Rule
from dymoe_runtime.budget import PROCESS_BYTES
from dymoe_runtime.bundle import DENSE, Bundle
from dymoe_runtime.device import Profile
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.policy import LayerPolicy, OperatingPoint, Policy, TierRule
from dymoe_runtime.spec import ModelSpec

# Held-out tokens for the many runs that sensitivity takes, and for those of the candidates. Of a large
# model fewer: so many that tokens times active expert weights come to MOST_WORK, but LEAST_TOKENS at least;
# and what the fitted thresholds have to beat is then measured at every other size.
SENSITIVITY_TOKENS = 2048
CANDIDATE_TOKENS = 4096
LEAST_TOKENS = 1024
MOST_WORK = 8e11
# Mean bits that mixed operating points aim at, between the tiers of the ladder.
POINT_STEP = 0.25
# An expert is ruined by the lowest tier if its squared error is this share of its squared output,
# so many times the median of its layer, and at most half as large at the highest.
RUINED_SHARE = 0.5
RUINED_RATIO = 4.0
# A schedule takes the place of the thresholds fitted per layer where its KL is lower by this share;
# less is within what another excerpt of the text changes.
SAME_QUALITY = 0.02


@dataclass(frozen=True)
class Fitted:
    """A policy, and everything that was measured on the way to it: points of any kind, each with its rule."""

    policy: Policy
    compared: tuple[tuple[OperatingPoint, Rule], ...]
    reference_nll: float
    tokens: int  # that the points were measured on


def fit_policy(
    bundle: Bundle,
    held_out: np.ndarray,
    original: Original,
    statistics: dict[int, LayerStatistics],
    profile: Profile,
    progress: Progress,
) -> Fitted:
    """Measure sensitivities, solve for thresholds, measure the candidates, keep those that are best at their size."""
    spec, ladder = bundle.spec, bundle.manifest.ladder
    few = excerpt_for(spec, held_out, original, SENSITIVITY_TOKENS)
    sensitivity = measure_sensitivity(bundle, *few, progress)
    layers = tuple(layer_policy(layer, statistics, sensitivity) for layer in range(spec.num_layers))
    pinned = tuple(layer.pinned for layer in layers)
    excerpt = excerpt_for(spec, held_out, original, CANDIDATE_TOKENS)
    compare_every = 1 if CANDIDATE_TOKENS * active_weights(spec) <= MOST_WORK else 2
    rules = candidate_rules(spec, ladder, statistics, sensitivity, pinned, compare_every)
    measurer = Measurer(bundle, *excerpt)
    with progress("operating points", spec.num_layers) as advance:
        measured = measurer.measure(list(rules.values()), advance)
    tried = [
        (make_point(name, kind, rule, result, bundle), rule)
        for ((name, kind), rule), result in zip(rules.items(), measured, strict=True)
    ]
    pairs = one_fitted(tried)
    compared = [point for point, _ in pairs]
    kept = best_points([point for point in compared if point.kind != "static"])
    # For prompts the fitted thresholds are the best, whichever schedule decodes.
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
    return Fitted(policy, tuple(pairs), _reference_nll(*excerpt), excerpt[0].size)


@dataclass(frozen=True)
class Sensitivity:
    """What one layer at one tier does, all others at the highest."""

    kl: float
    router_overlap: float | None  # of the next router; None after the last


Table = dict[int, dict[int, Sensitivity]]  # layer -> tier -> Sensitivity


def measure_sensitivity(bundle: Bundle, held_out: np.ndarray, original: Original, progress: Progress) -> Table:
    """KL of the model, and drift of the next router, with only one layer below the highest tier."""
    ladder, layers, moe = bundle.manifest.ladder, bundle.spec.num_layers, bundle.spec.moe_layers
    top = TierRule.uniform(ladder[-1], ladder, layers)
    cases = [(layer, tier) for layer in moe for tier in ladder[:-1]]
    rules = [Decoding(_with_layer(top, layer, TierRule.uniform(tier, ladder, layers))) for layer, tier in cases]
    with progress("sensitivity", layers) as advance:
        base, *results = Measurer(bundle, held_out, original).measure([Decoding(top), *rules], advance)
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
    """(name, kind) -> rule: uniform ones, and two fits of thresholds for each wanted mean number of bits.

    At every `compare_every`-th of those sizes also what the fits have to beat: flat, cosine and static.
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


def wanted_bits(ladder: Sequence[int]) -> list[float]:
    """Mean bits to aim at, between the lowest and the highest tier; one more close to the lowest, where KL is steep."""
    if len(ladder) == 1:
        return []
    count = round((ladder[-1] - ladder[0]) / POINT_STEP)
    return [ladder[0] + POINT_STEP / 2, *(ladder[0] + POINT_STEP * i for i in range(1, count))]


def make_point(name: str, kind: str, rule: Rule, result: Measurement, bundle: Bundle) -> OperatingPoint:
    """An operating point with its measured quality and size; figures rounded to what is meaningful."""
    layout, score = bundle.layout, result.score.to_json()
    pairs = sum(result.used.values())
    active = len(bundle.spec.moe_layers) * bundle.spec.top_k

    def mean(value: Callable[[int], float]) -> float:
        return sum(value(tier) * count for tier, count in result.used.items()) / pairs

    return OperatingPoint(
        name=name,
        kind=kind,
        decode=rule.rule.decode if isinstance(rule, Decoding) else (),
        prefill=rule.rule.prefill if isinstance(rule, Decoding) else (),
        bits_mean=round(mean(float), 4),
        effective_bits=round(mean(layout.bits_per_weight), 4),
        bytes_per_token=round(mean(layout.prefix_bytes) * active),
        kl=significant(score["kl"]),
        nll=significant(score["nll"], 6),
        top1_agreement=significant(score["top1_agreement"]),
        prefill_kl=math.nan,
    )


def one_fitted(tried: Sequence[tuple[OperatingPoint, Rule]]) -> list[tuple[OperatingPoint, Rule]]:
    """Of the two ways to fit thresholds per layer, mixed and tempered, the better one of each name, as mixed."""
    rate = _rate([point for point, _ in tried if point.kind == "uniform"])
    mild = {point.name: (point, rule) for point, rule in tried if point.kind == "tempered"}

    def better(point: OperatingPoint, rule: Rule) -> tuple[OperatingPoint, Rule]:
        other = mild.get(point.name) if point.kind == "mixed" else None
        if other is None or _worth(other[0], rate) >= _worth(point, rate):
            return point, rule
        return replace(other[0], kind="mixed"), other[1]

    return [better(point, rule) for point, rule in tried if point.kind != "tempered"]


def best_points(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """Uniform points, and of each other name the best that nothing of its size or smaller equals; by rising bits.

    What is kept counts as mixed, whichever schedule its thresholds came from.
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
    """How fast the logarithm of KL falls with bits, from the lowest to the highest tier."""
    low, high = uniform[0], uniform[-1]
    if high.effective_bits <= low.effective_bits or min(low.kl, high.kl) <= 0:
        return 0.0
    return max(0.0, math.log(low.kl / high.kl) / (high.effective_bits - low.effective_bits))


def _worth(point: OperatingPoint, rate: float) -> float:
    """Logarithm of KL at a common size: points of one name differ a little in bits."""
    return math.log(max(point.kl, 1e-12)) + rate * point.effective_bits


def default_point(points: Sequence[OperatingPoint], bundle: Bundle, profile: Profile) -> OperatingPoint:
    """The best mixed point whose experts fit the profile's memory, else the one nearest 3 bits.

    Uniform points stand in where no mixed one was kept.
    """
    mixed = [point for point in points if point.kind == "mixed"] or list(points)
    fitting = [point for point in mixed if fits(point, bundle, profile)]
    if fitting:
        return min(fitting, key=lambda point: point.kl)
    return min(mixed, key=lambda point: abs(point.bits_mean - 3))


def fits(point: OperatingPoint, bundle: Bundle, profile: Profile) -> bool:
    """Whether all experts, at the mean size of `point`, fit the profile's memory beside the rest."""
    whole = bundle.layout.bits_per_weight(bundle.manifest.ladder[-1])
    room = profile.memory_bytes - PROCESS_BYTES - bundle.manifest.files[DENSE].nbytes
    return bundle.expert_bytes() * point.effective_bits / whole <= room


def layer_policy(layer: int, statistics: Mapping[int, LayerStatistics], sensitivity: Table) -> LayerPolicy:
    if layer not in statistics:
        return LayerPolicy(layer, {}, (), (), {}, {}, (), (), "none", ())
    seen, row = statistics[layer], sensitivity[layer]
    early = "linear" if seen.predictor.size else "router"
    return LayerPolicy(
        layer=layer,
        sensitivity={str(tier): significant(row[tier].kl) for tier in sorted(row)},
        frequency=tuple(seen.frequency),
        gate_mass=tuple(seen.gate_mass),
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
    """Experts whose output the lowest tier ruins and the highest does not; `errors` by rising tier."""
    rows = list(errors.values())
    lowest, highest = rows[0], rows[-1]
    bound = max(RUINED_SHARE, RUINED_RATIO * median(lowest))
    return tuple(e for e, (low, high) in enumerate(zip(lowest, highest, strict=True)) if low > bound and high < low / 2)


def active_weights(spec: ModelSpec) -> int:
    """Routed expert weights that a token uses."""
    per_expert = sum(rows * cols for rows, cols in spec.expert_shapes.values())
    return len(spec.moe_layers) * spec.top_k * per_expert


def point_json(point: OperatingPoint) -> dict[str, Any]:
    """A point without its thresholds, its missing figures None."""
    values = {name: value for name, value in asdict(point).items() if name not in ("decode", "prefill")}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def excerpt_for(spec: ModelSpec, held_out: np.ndarray, original: Original, tokens: int) -> tuple[np.ndarray, Original]:
    """The first windows of `held_out`, `tokens` in all; of a large model fewer."""
    affordable = max(LEAST_TOKENS, int(MOST_WORK / active_weights(spec)))
    count = max(1, min(tokens, affordable) // held_out.shape[1])
    return held_out[:count], Original(original.hidden[:count], original.head)


def _reference_nll(held_out: np.ndarray, original: Original) -> float:
    from dymoe_runtime.evaluate import Score, score_window

    total = Score()
    for ids, hidden in zip(held_out, original.hidden, strict=True):
        total.add(score_window(ids, hidden, original.head))
    return significant(total.nll_sum / total.tokens, 6)


def _rule_of(point: OperatingPoint, ladder: tuple[int, ...], pinned: tuple[tuple[int, ...], ...]) -> TierRule:
    return TierRule(ladder, point.decode, point.prefill, pinned if point.kind == "mixed" else ())


def _with_layer(rule: TierRule, layer: int, other: TierRule) -> TierRule:
    """`rule` with the thresholds of `other` in one layer."""

    def swap(rows: tuple[Any, ...], row: Any) -> tuple[Any, ...]:
        return (*rows[:layer], row, *rows[layer + 1 :])

    return TierRule(rule.ladder, swap(rule.decode, other.decode[layer]), swap(rule.prefill, other.prefill[layer]))
