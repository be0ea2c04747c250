"""Candidate rules against the bits they may spend, and which of the points measured are kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from dymoe_compile.calibrate.statistics import LayerStatistics, layer_statistics
from dymoe_compile.policy.allocate import Choice, layer_options, lower_hull
from dymoe_compile.policy.candidates import Candidates, tempered
from dymoe_compile.policy.operating_points import (
    RUINED_SHARE,
    Sensitivity,
    best_points,
    candidate_rules,
    one_fitted,
    ruined_experts,
    wanted_bits,
)
from dymoe_compile.policy.sensitivity import Decoding, Prefilling, Static
from dymoe_runtime.bundle.policy import OperatingPoint, Thresholds
from dymoe_runtime.kernels import REFERENCE, load_kernels
from dymoe_runtime.model.routing import PromptRouting, chunk_lengths, in_groups
from dymoe_runtime.model.tier_rule import ALWAYS, TierRule
from dymoe_runtime.spec import AttentionSpec, ModelSpec, MoeSpec, Rope, RouterSpec, alike_layers

EXPERTS, TOP_K, WINDOWS, TOKENS = 8, 3, 10, 60
SPEC = ModelSpec(
    model_type="olmoe",
    vocab_size=256,
    hidden_size=4,
    max_context=64,
    norm_eps=1e-6,
    layers=alike_layers(
        5, AttentionSpec(1, 1, 4, Rope()), MoeSpec(RouterSpec(EXPERTS, TOP_K, False), 4), dense_layers=(1,)
    ),
)
LADDERS = [(2, 3, 4), (2, 4), (3, 4, 5, 8), (4,)]
BUDGETS = (0.05, 0.125, 0.3, 0.5, 0.8, 1.0)  # of the way from the lowest tier to the highest


@cache
def routing(layer: int) -> PromptRouting:
    """Random choices of a layer, some experts liked better than others; windows are chunks."""
    rng = np.random.default_rng(layer)
    taste = rng.standard_normal(EXPERTS, np.float32)
    logits = rng.standard_normal((WINDOWS * TOKENS, EXPERTS), np.float32) * np.float32(1 + 0.3 * layer) + taste
    experts, weights = load_kernels(REFERENCE).route(logits, SPEC.moe.router)
    token_weights = 2 * rng.random(WINDOWS * TOKENS, np.float32)
    return PromptRouting(
        experts, weights, np.zeros((len(weights), 1), np.float32), token_weights, chunk_lengths(len(weights), TOKENS)
    )


@cache
def statistics() -> dict[int, LayerStatistics]:
    return {layer: layer_statistics(routing(layer), EXPERTS, 0) for layer in SPEC.moe_layers}


def added(ladder: Sequence[int]) -> dict[int, dict[int, float]]:
    """Less than a quarter for every bit, and layers that differ fourfold."""
    factors = dict(zip(SPEC.moe_layers, (0.3, 1.2, 0.4, 0.7), strict=True))
    return {
        layer: {tier: factor * 4.5 ** (2 - tier) if tier < ladder[-1] else 0.0 for tier in ladder}
        for layer, factor in factors.items()
    }


@cache
def candidates(ladder: tuple[int, ...], pinned: tuple[tuple[int, ...], ...] = ()) -> Candidates:
    return Candidates(SPEC, ladder, statistics(), added(ladder), pinned)


def budgets(ladder: Sequence[int]) -> list[float]:
    return [ladder[0] + share * (ladder[-1] - ladder[0]) for share in BUDGETS]


def mean_bits(rule: Decoding | Prefilling | Static) -> float:
    """Mean tier over layers and what was routed, as the measurer counts it: experts of a prompt window by window."""
    means = []
    for layer in SPEC.moe_layers:
        whole = routing(layer)
        tiers = rule.choose(layer, whole)
        assert tiers.shape == whole.experts.shape
        if isinstance(rule, Prefilling):
            seen = [
                {(expert, tier) for expert, tier in zip(e.reshape(-1).tolist(), t.reshape(-1).tolist(), strict=True)}
                for e, t in zip(in_groups(whole.experts, TOKENS), in_groups(tiers, TOKENS), strict=True)
            ]
            means.append(np.mean([tier for window in seen for _, tier in window]))
        else:
            means.append(tiers.mean())
    return float(np.mean(means))


@pytest.mark.parametrize("phase", [Decoding, Prefilling])
@pytest.mark.parametrize("schedule", ["fitted", "flat", "cosine"])
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_schedules_keep_to_the_bits_on_what_they_were_fitted_to(
    ladder: tuple[int, ...], schedule: str, phase: type
) -> None:
    make = candidates(ladder)
    for bits in budgets(ladder):
        rule = getattr(make, schedule)(bits)
        assert rule.ladder == ladder and rule.pinned == ()
        assert len(rule.decode) == len(rule.prefill) == SPEC.num_layers
        for row in (*rule.decode, *rule.prefill):
            assert len(row) == len(ladder) and list(row) == sorted(row) and row[-1] == ALWAYS
        spent = mean_bits(phase(rule))
        assert spent <= bits + 1e-6
        # And they use what they may: only where a schedule has few settings is much left over.
        assert spent > bits - (0.1 if schedule == "fitted" else 0.3) * (ladder[-1] - ladder[0]) - 1e-6


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_static_tiers_keep_to_the_bits(ladder: tuple[int, ...]) -> None:
    make = candidates(ladder)
    for bits in budgets(ladder):
        rule = make.static(bits)
        assert len(rule.tiers) == SPEC.num_layers and all(len(row) == EXPERTS for row in rule.tiers)
        assert {tier for row in rule.tiers for tier in row} <= set(ladder)
        spent = mean_bits(rule)
        # Frequencies are kept to six digits.
        assert bits - 0.1 * (ladder[-1] - ladder[0]) - 1e-4 <= spent <= bits + 1e-4


@pytest.mark.parametrize("bits", [2.2, 3.0, 3.7])
def test_static_tiers_go_to_experts_that_gain_most_by_the_bit(bits: float) -> None:
    """One that gains more than another is left at 2 bits only if it is used more often, and did not fit."""
    rule, gains, cost = candidates((2, 4)).static(bits), [], added((2, 4))
    for layer in SPEC.moe_layers:
        seen = statistics()[layer]
        for e, frequency in enumerate(seen.frequency):
            share = frequency * EXPERTS / sum(seen.frequency)
            gains.append((cost[layer][2] * seen.weight_energy[e] / share, share, rule.tiers[layer][e]))
    assert {tier for _, _, tier in gains} == {2, 4}
    for (gain_a, share_a, tier_a), (gain_b, share_b, tier_b) in itertools.product(gains, repeat=2):
        if (tier_a, tier_b) == (2, 4) and gain_a > gain_b * (1 + 1e-6):
            assert share_a > share_b


@cache
def options(ladder: tuple[int, ...], prefill: bool = False) -> list[list[Choice]]:
    """What each layer with experts can be set to."""
    rows = []
    for layer in SPEC.moe_layers:
        seen = statistics()[layer]
        figures = (seen.chunk_importance, seen.chunk_energy) if prefill else (seen.weights, np.square(seen.weights))
        rows.append(layer_options(*figures, added(ladder)[layer], ladder))
    return rows


def modelled(rows: Sequence[Sequence[Choice]], thresholds: Sequence[Thresholds]) -> tuple[float, float]:
    """Mean bits and total cost of thresholds of the layers with experts."""
    found = [
        next(choice for choice in row if choice.thresholds == given)
        for row, given in zip(rows, (thresholds[layer] for layer in SPEC.moe_layers), strict=True)
    ]
    return sum(c.bits for c in found) / len(found), sum(c.cost for c in found)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4)], ids=str)
def test_fitted_thresholds_cost_no_more_than_flat_or_cosine_ones(ladder: tuple[int, ...], phase: str) -> None:
    """By the model that all are fitted with, up to the one step on a hull that may not fit any more."""
    make, rows = candidates(ladder), options(ladder, phase == "prefill")
    largest = max(a.cost - b.cost for row in rows for a, b in itertools.pairwise(lower_hull(row)))
    ratios = []
    for bits in budgets(ladder):
        fitted = modelled(rows, getattr(make.fitted(bits), phase))
        for other in (make.flat(bits), make.cosine(bits)):
            spent, cost = modelled(rows, getattr(other, phase))
            assert spent <= bits + 1e-9 and fitted[0] <= bits + 1e-9
            assert fitted[1] <= cost + largest + 1e-12
            ratios.append(fitted[1] / cost if cost else 1.0)
    # Where layers differ it does better on the whole.
    assert sum(ratios) / len(ratios) < 0.97


@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4)], ids=str)
def test_flat_thresholds_are_the_best_common_ones(ladder: tuple[int, ...]) -> None:
    make, rows = candidates(ladder), options(ladder)
    for bits in budgets(ladder):
        rule = make.flat(bits)
        assert len({rule.decode[layer] for layer in SPEC.moe_layers}) == 1
        assert len({rule.prefill[layer] for layer in SPEC.moe_layers}) == 1
        costs = [modelled(rows, [choice.thresholds] * SPEC.num_layers) for choice in rows[0]]
        best = min(cost for spent, cost in costs if spent <= bits + 1e-9)
        assert modelled(rows, rule.decode)[1] == pytest.approx(best)


def test_cosine_thresholds_fall_with_depth() -> None:
    rules = [candidates((2, 3, 4)).cosine(bits) for bits in budgets((2, 3, 4))]
    for rule, phase in itertools.product(rules, ("decode", "prefill")):
        rows = [getattr(rule, phase)[layer] for layer in SPEC.moe_layers]
        for column in zip(*rows, strict=True):
            assert list(column) == sorted(column, reverse=True)
    assert any(rule.decode[0] != rule.decode[-1] for rule in rules)


@pytest.mark.parametrize("schedule", ["fitted", "tempered", "flat", "cosine"])
def test_layers_without_experts_have_nothing_to_choose(schedule: str) -> None:
    rule = getattr(candidates((2, 3, 4)), schedule)(2.5)
    assert rule.decode[1] == rule.prefill[1] == (ALWAYS,) * 3


def test_every_kind_of_rule_is_a_candidate_and_only_mixed_ones_pin() -> None:
    pinned = ((0,), (), (), (3, 5), ())
    seen = {
        layer: {tier: Sensitivity(0.01 + cost, None) for tier, cost in row.items()}
        for layer, row in added((2, 3, 4)).items()
    }
    rules = candidate_rules(SPEC, (2, 3, 4), statistics(), seen, pinned)
    assert [name for name, kind in rules if kind == "uniform"] == ["uniform-2", "uniform-3", "uniform-4"]
    names = [f"{bits:g}" for bits in wanted_bits((2, 3, 4))]
    for kind in ("mixed", "tempered", "flat", "cosine", "static"):
        assert [name for name, k in rules if k == kind] == names
    for (_, kind), rule in rules.items():
        if isinstance(rule, Decoding):
            assert rule.rule.pinned == (() if kind == "uniform" else pinned)
        else:
            assert kind == "static"


def test_a_large_model_measures_what_fits_have_to_beat_at_every_other_size() -> None:
    seen = {
        layer: {tier: Sensitivity(0.01 + cost, None) for tier, cost in row.items()}
        for layer, row in added((2, 3, 4)).items()
    }
    every = candidate_rules(SPEC, (2, 3, 4), statistics(), seen, ())
    fewer = candidate_rules(SPEC, (2, 3, 4), statistics(), seen, (), 2)
    names = [f"{bits:g}" for bits in wanted_bits((2, 3, 4))]
    for kind, expected in {"mixed": names, "tempered": names, "flat": names[::2], "static": names[::2]}.items():
        assert [name for name, k in fewer if k == kind] == expected
    assert fewer == {key: every[key] for key in fewer}


def test_a_measured_layer_that_got_better_adds_nothing() -> None:
    """A lower tier may by chance come out ahead of the highest; bits are then not bought for it."""
    seen = {
        layer: {2: Sensitivity(0.009, None), 3: Sensitivity(0.0095, None), 4: Sensitivity(0.01, None)}
        for layer in SPEC.moe_layers
    }
    rules = candidate_rules(SPEC, (2, 3, 4), statistics(), seen, ())
    rule = rules["3.5", "mixed"]
    assert isinstance(rule, Decoding)
    assert mean_bits(rule) == 2.0


@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4), (3, 4, 5, 8), (2, 8)], ids=str)
def test_wanted_bits_lie_between_the_tiers(ladder: tuple[int, ...]) -> None:
    bits = wanted_bits(ladder)
    assert bits == sorted(set(bits))
    assert ladder[0] < bits[0] < ladder[0] + 0.25 and ladder[-1] - 0.3 < bits[-1] < ladder[-1]
    assert len({f"{value:g}" for value in bits}) == len(bits)


def test_a_single_tier_has_no_sizes_between_and_one_candidate() -> None:
    assert wanted_bits((4,)) == []
    seen = {layer: {4: Sensitivity(0.01, None)} for layer in SPEC.moe_layers}
    assert list(candidate_rules(SPEC, (4,), statistics(), seen, ())) == [("uniform-4", "uniform")]


# Experts that are ruined.


def test_an_expert_that_the_lowest_tier_ruins_is_found_and_others_are_left() -> None:
    low, middle, high = [0.1] * 8, [0.03] * 8, [0.01] * 8
    assert ruined_experts({"2": low, "3": middle, "4": high}) == ()
    low[5] = 0.9
    assert ruined_experts({"2": low, "3": middle, "4": high}) == (5,)
    low[0] = 3.0
    assert ruined_experts({"2": low, "3": middle, "4": high}) == (0, 5)


@pytest.mark.parametrize(
    ("low", "high", "why"),
    [
        (RUINED_SHARE * 0.99, 0.01, "most of its output is still there"),
        (0.9, 0.6, "the highest tier does not mend it"),
    ],
)
def test_an_expert_that_need_not_or_cannot_be_saved_is_not_ruined(low: float, high: float, why: str) -> None:
    assert ruined_experts({"2": [0.1, low, 0.1], "4": [0.01, high, 0.01]}) == (), why


def test_where_all_experts_are_bad_none_stands_out() -> None:
    assert ruined_experts({"2": [0.7, 0.6, 0.8, 0.9], "4": [0.1] * 4}) == ()


def test_a_single_tier_ruins_no_expert() -> None:
    assert ruined_experts({"4": [0.1, 0.9, 0.1]}) == ()


def test_pinned_experts_run_at_the_highest_tier_in_what_is_measured() -> None:
    """Decoding and prefilling; settings differ only in the layer that pins."""
    pinned = ((2,), (), (), (), ())
    bare, rule = candidates((2, 3, 4)).flat(2.125), candidates((2, 3, 4), pinned).flat(2.125)
    assert replace(rule, pinned=()) == bare
    for phase in (Decoding, Prefilling):
        for layer in SPEC.moe_layers:
            tokens = routing(layer)
            free, tiers = (phase(r).choose(layer, tokens) for r in (bare, rule))
            expected = np.where(tokens.experts == 2, 4, free) if layer == 0 else free
            assert np.array_equal(tiers, expected)
            assert (phase(bare).setting(layer)[1] == phase(rule).setting(layer)[1]) and (
                (phase(bare).setting(layer)[2:] == phase(rule).setting(layer)[2:]) == (layer != 0)
            )


def test_uniform_rules_pin_nothing() -> None:
    rule = TierRule.uniform(2, (2, 3, 4), SPEC.num_layers)
    assert all((Decoding(rule).choose(layer, routing(layer)) == 2).all() for layer in SPEC.moe_layers)


# Which points are kept.


def point(name: str, kind: str, size: float, kl: float) -> OperatingPoint:
    """`size` bytes, a hundred to a bit; thresholds tell points of one name apart."""
    thresholds, bits = ((size, kl, ALWAYS),), size / 100
    return OperatingPoint(name, kind, thresholds, thresholds, bits, bits, size, kl, 3.0, 0.9, float("nan"))


def kept(*points: OperatingPoint) -> list[tuple[float, float]]:
    return [(p.bytes_per_token, p.kl) for p in best_points(points)]


UNIFORM = [point(f"uniform-{tier}", "uniform", 100.0 * tier, 0.1 / 4.0 ** (tier - 2)) for tier in (2, 3, 4)]


def test_uniform_points_are_always_kept() -> None:
    better = point("2.5", "mixed", 150.0, 1e-6)
    assert [p.name for p in best_points([*UNIFORM, better])] == ["2.5", "uniform-2", "uniform-3", "uniform-4"]


def test_a_point_that_a_smaller_or_equal_one_beats_is_dropped() -> None:
    good = point("2.5", "mixed", 250.0, 0.05)
    assert (260.0, 0.06) not in kept(*UNIFORM, good, point("2.75", "flat", 260.0, 0.06))
    assert (250.0, 0.06) not in kept(*UNIFORM, good, point("2.75", "flat", 250.0, 0.06))
    assert (310.0, 0.03) not in kept(*UNIFORM, point("3.25", "mixed", 310.0, 0.03))
    assert (240.0, 0.06) in kept(*UNIFORM, good, point("2.75", "flat", 240.0, 0.06))


def test_of_equal_points_of_one_name_one_is_kept() -> None:
    same = [point("2.5", kind, 250.0, 0.05) for kind in ("mixed", "flat", "cosine")]
    assert len(best_points([*UNIFORM, *same])) == 4
    assert len(best_points([*UNIFORM, point("2.125", "flat", 200.0, UNIFORM[0].kl)])) == 3


def test_of_equal_points_of_different_names_one_is_kept() -> None:
    """Where there are few rules to choose from, several numbers of bits lead to the same one."""
    same = [point(f"{bits:g}", "mixed", 250.0, 0.05) for bits in (2.5, 2.75, 3)]
    assert kept(*UNIFORM, *same).count((250.0, 0.05)) == 1


def test_of_two_ways_to_fit_the_better_one_counts_as_mixed() -> None:
    """For its size: uniform tiers tell what KL is to be expected of it."""
    rules = [Decoding(TierRule.uniform(tier, (2, 3, 4), 2)) for tier in (2, 3)]
    for mixed, mild, wins in (((250.0, 0.05), (250.0, 0.04), 1), ((250.0, 0.05), (250.0, 0.06), 0)):
        points = point("2.5", "mixed", *mixed), point("2.5", "tempered", *mild)
        flat = point("2.5", "flat", 250.0, 0.055), rules[0]
        pairs = one_fitted([*((p, rules[0]) for p in UNIFORM), *zip(points, rules, strict=True), flat])
        assert [p.kind for p, _ in pairs] == ["uniform"] * 3 + ["mixed", "flat"]
        assert pairs[3] == (replace(points[wins], kind="mixed"), rules[wins])


def test_tempered_layers_differ_by_the_root() -> None:
    mild = tempered({0: {2: 0.04, 4: 0.0}, 1: {2: 0.01, 4: 0.0}})
    assert mild[0][2] / mild[1][2] == pytest.approx(2.0)
    assert mild[0][4] == mild[1][4] == 0.0


def test_of_points_of_one_name_the_best_for_its_size_is_kept() -> None:
    """Uniform tiers tell what KL is to be expected of a size."""
    larger, smaller = point("2.5", "mixed", 250.0, 0.04), point("2.5", "flat", 249.0, 0.05)
    assert (250.0, 0.04) in kept(*UNIFORM, larger, smaller) and (249.0, 0.05) not in kept(*UNIFORM, larger, smaller)
    larger, smaller = point("2.5", "mixed", 250.0, 0.0399), point("2.5", "flat", 230.0, 0.04)
    assert (230.0, 0.04) in kept(*UNIFORM, larger, smaller) and (250.0, 0.0399) not in kept(*UNIFORM, larger, smaller)


def test_points_are_kept_by_rising_size_whichever_schedule_they_came_from() -> None:
    schedules = zip(("cosine", "flat", "mixed"), (3.5, 2.5, 3.25), (0.003, 0.05, 0.005), strict=True)
    found = best_points([*(point(f"{bits:g}", kind, 100 * bits, kl) for kind, bits, kl in schedules), *UNIFORM])
    assert [p.name for p in found] == ["uniform-2", "2.5", "uniform-3", "3.25", "3.5", "uniform-4"]
    assert {p.kind for p in found if not p.name.startswith("uniform")} == {"mixed"}


def test_points_that_are_kept_have_names_of_their_own() -> None:
    """A flat schedule that spends less than the fitted one of its name, and costs more."""
    found = best_points([*UNIFORM, point("2.5", "mixed", 250.0, 0.04), point("2.5", "flat", 245.0, 0.05)])
    names = [p.name for p in found]
    assert len(names) == len(set(names))
