"""Tiers by importance against a plain loop."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dymoe_runtime.bundle.policy import LayerPolicy, OperatingPoint, Policy
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.routing import PromptRouting, Routing, chunk_lengths
from dymoe_runtime.model.tier_rule import (
    ALWAYS,
    NEVER,
    TierRule,
    chunk_importance,
    only_tier,
    tiers_by_mass,
    tiers_of_token,
    uniform_thresholds,
)

LADDER = (2, 3, 4)


def plain_tiers(importance: Sequence[float], thresholds: Sequence[float], ladder: Sequence[int]) -> list[int]:
    """One token: experts by falling importance, each the highest tier whose threshold exceeds the share before it."""
    total = sum(importance)
    tiers, before = [0] * len(importance), 0.0
    for i in sorted(range(len(importance)), key=lambda i: -importance[i]):
        share = before / total if total else 0.0
        allowed = [t for t, threshold in zip(reversed(ladder), thresholds, strict=True) if share < threshold]
        tiers[i] = max(allowed, default=0)
        before += importance[i]
    return tiers


def decoding(experts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Routing:
    return Routing(np.array(experts), floats(weights), np.zeros((len(experts), 1), np.float32))


def prompt(
    experts: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    token_weights: Sequence[float],
    group: int | None = None,
) -> PromptRouting:
    """Routing of a prompt, by default of one chunk."""
    residual = np.zeros((len(experts), 1), np.float32)
    chunks = chunk_lengths(len(experts), group or len(experts))
    return PromptRouting(np.array(experts), floats(weights), residual, floats(token_weights), chunks)


def floats(values: object) -> np.ndarray:
    return np.array(values, np.float32)


def distinct(g: np.random.Generator, tokens: int, experts: int, ranks: int) -> np.ndarray:
    """int64 [tokens, ranks] of random experts, none of them twice for a token."""
    return np.stack([g.permutation(experts)[:ranks] for _ in range(tokens)])


def rule(decode: Sequence[float], prefill: Sequence[float], ladder: tuple[int, ...] = LADDER) -> TierRule:
    return TierRule(ladder, (tuple(decode),), (tuple(prefill),))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 3, 4, 8), (4,), (3, 5)], ids=str)
def test_tiers_equal_a_plain_loop_over_tokens(ladder: tuple[int, ...], seed: int) -> None:
    g = np.random.default_rng(seed)
    # Sixty-fourths add up exactly in any order, so that shares on a threshold are no matter of rounding.
    importance = floats(g.integers(0, 64, (100, 1 + seed)) / 64)
    thresholds = np.sort(g.integers(0, 17, len(ladder))) / 16
    got = tiers_by_mass(importance, thresholds.tolist(), ladder)
    assert got.dtype == np.int64
    if (thresholds >= 1).all():
        assert (got == ladder[-1]).all()
        return
    expected = [plain_tiers(row, thresholds.tolist(), ladder) for row in importance.tolist()]
    mismatched = [i for i, row in enumerate(expected) if got[i].tolist() != row]
    assert mismatched == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ladder", [(2, 3, 4), (4,), (3, 5)], ids=str)
def test_a_token_alone_gets_the_tiers_that_it_gets_in_company(ladder: tuple[int, ...], seed: int) -> None:
    """Bit for bit, on random weights: both ways must round alike."""
    powers = np.exp(np.random.default_rng(seed).random((300, 6)) ** 3)
    weights = -np.sort(-floats(powers / powers.sum(-1, keepdims=True)))
    exact = weights.astype(np.float64)
    shares = (exact.cumsum(-1) - exact) / exact.sum(-1, keepdims=True)
    for token in range(0, 300, 7):  # thresholds that are the shares of some token
        thresholds = sorted(shares[token, 1 : 1 + len(ladder)].tolist())
        expected = tiers_by_mass(weights, thresholds, ladder).tolist()
        assert [tiers_of_token(row, thresholds, ladder) for row in weights.tolist()] == expected
        assert [compiled_tiers(row, thresholds, ladder) for row in weights.tolist()] == expected
    assert tiers_of_token([0.0, 0.0], (0.5, ALWAYS, ALWAYS), (2, 3, 4)) == [4, 4]


def compiled_tiers(
    weights: Sequence[float], thresholds: Sequence[float], ladder: Sequence[int], pinned: Sequence[int] = ()
) -> list[int]:
    """What compiled code gives the experts 0, 1, ... of a token; without it the reference."""
    table = load_kernels().resident_table(2, len(weights), ladder)
    if table is None:
        tiers = tiers_of_token(weights, thresholds, ladder)
        return [ladder[-1] if expert in pinned else tier for expert, tier in enumerate(tiers)]
    table.set_rule(1, thresholds, pinned)
    return table.choose_tiers(1, list(range(len(weights))), weights)


def test_a_token_alone_obeys_pins_and_depth() -> None:
    thresholds = ((0.3, 0.7, ALWAYS), (0.9, 0.95, ALWAYS), (0.1, 0.2, NEVER))
    rule = TierRule((2, 3, 4), thresholds, thresholds, ((1,), (), (0, 2)))
    for layer in range(3):
        given = decoding([[0, 1, 2]], [[0.5, 0.3, 0.2]])
        experts, weights = given.of_token()
        expected = rule.choose(layer, given)[0].tolist()
        assert rule.choose_for_token(layer, experts, weights) == expected
        assert compiled_tiers(weights, thresholds[layer], (2, 3, 4), rule.pinned[layer]) == expected


@pytest.mark.parametrize("thresholds", [*itertools.combinations_with_replacement((NEVER, 0.4, 1.0, ALWAYS), 3)])
def test_where_weights_do_not_matter_their_shares_are_not_computed(thresholds: tuple[float, ...]) -> None:
    only, weights = only_tier(thresholds, LADDER), ([0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    rule = TierRule(LADDER, (thresholds,), (thresholds,))
    for row in weights:
        expected = tiers_of_token(row, thresholds, LADDER)
        assert only is None or set(expected) == {only}
        assert compiled_tiers(row, thresholds, LADDER) == expected
        assert rule.choose_for_token(0, [0, 1, 2], row) == expected
    assert (only is None) == any(NEVER < threshold <= 1 for threshold in thresholds)


def test_shapes_before_the_last_dimension_are_tokens() -> None:
    importance = np.random.default_rng(0).random((3, 5, 4), np.float32)
    thresholds = (0.3, 0.7, ALWAYS)
    got = tiers_by_mass(importance, thresholds, LADDER)
    assert np.array_equal(got, tiers_by_mass(importance.reshape(15, 4), thresholds, LADDER).reshape(3, 5, 4))


def test_the_order_of_the_experts_does_not_matter() -> None:
    importance = floats([0.1, 0.5, 0.15, 0.25])
    assert tiers_by_mass(importance, (0.4, 0.7, 0.8), LADDER).tolist() == [0, 4, 2, 3]
    assert tiers_by_mass(importance[::-1], (0.4, 0.7, 0.8), LADDER).tolist() == [3, 2, 4, 0]


def test_of_equally_important_experts_the_first_is_taken_first() -> None:
    assert tiers_by_mass(np.full((1, 4), 0.25, np.float32), (0.25, 0.5, ALWAYS), LADDER).tolist() == [[4, 3, 2, 2]]
    assert tiers_by_mass(np.full((1, 4), 0.25, np.float32), (0.25, 0.5, 0.75), LADDER).tolist() == [[4, 3, 2, 0]]


def test_a_share_on_the_threshold_is_beyond_it() -> None:
    assert tiers_by_mass(floats([0.5, 0.5]), (0.5, ALWAYS, ALWAYS), LADDER).tolist() == [4, 3]
    assert tiers_by_mass(floats([0.5, 0.5]), (0.51, ALWAYS, ALWAYS), LADDER).tolist() == [4, 4]


def test_the_most_important_expert_has_no_share_before_it() -> None:
    assert tiers_by_mass(floats([[0.9, 0.1]]), (1e-6, 1e-6, ALWAYS), LADDER).tolist() == [[4, 2]]


def test_an_expert_of_no_importance_comes_last() -> None:
    assert tiers_by_mass(floats([0.0, 1.0, 0.0]), (0.5, 0.9, ALWAYS), LADDER).tolist() == [2, 4, 2]
    assert tiers_by_mass(floats([0.0, 1.0, 0.0]), (0.5, 0.9, 0.9), LADDER).tolist() == [0, 4, 0]


def test_no_importance_at_all_is_no_division_by_zero() -> None:
    assert tiers_by_mass(np.zeros((2, 3), np.float32), (0.5, 0.9, ALWAYS), LADDER).tolist() == [[4, 4, 4]] * 2


@pytest.mark.parametrize("ladder", [(2, 3, 4), (4,), (2, 8)], ids=str)
def test_uniform_rules_give_one_tier(ladder: tuple[int, ...]) -> None:
    random = np.random.default_rng(3).random((50, 6))
    importance = floats(np.concatenate([random, np.zeros((1, 6)), np.eye(6)]))
    for tier in ladder:
        assert (tiers_by_mass(importance, uniform_thresholds(tier, ladder), ladder) == tier).all()
        uniform = TierRule.uniform(tier, ladder, 2)
        token = decoding([[0, 1, 2]], [[0.5, 0.3, 0.2]])
        tokens = prompt([[0, 1], [2, 1]], [[0.9, 0.1], [0.6, 0.4]], [0.0, 2.0])
        for layer in range(2):
            assert (uniform.choose(layer, token) == tier).all()
            assert (uniform.choose_for_prompt(layer, tokens) == tier).all()


def test_what_lies_beyond_the_last_threshold_is_skipped() -> None:
    importance = floats([[0.7, 0.2, 0.1]])
    assert tiers_by_mass(importance, (0.1, 0.1, 0.8), LADDER).tolist() == [[4, 2, 0]]
    assert tiers_by_mass(importance, (NEVER, NEVER, NEVER), LADDER).tolist() == [[0, 0, 0]]


def test_decoding_looks_at_each_token_alone() -> None:
    chosen = rule((0.5, 0.8, ALWAYS), (NEVER, NEVER, ALWAYS)).choose(
        0, decoding([[3, 1, 0], [1, 0, 3]], [[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])
    )
    assert chosen.tolist() == [[4, 3, 2], [4, 4, 3]]


def test_each_layer_has_its_own_thresholds() -> None:
    always, never = uniform_thresholds(4, LADDER), uniform_thresholds(2, LADDER)
    deep = TierRule(LADDER, (always, never), (never, always))
    token, tokens = decoding([[0, 1]], [[0.5, 0.5]]), prompt([[0, 1]], [[0.5, 0.5]], [1.0])
    assert [deep.choose(layer, token)[0, 0].item() for layer in (0, 1)] == [4, 2]
    assert [deep.choose_for_prompt(layer, tokens)[0, 0].item() for layer in (0, 1)] == [2, 4]


def test_without_depth_every_layer_has_the_mean_thresholds() -> None:
    rows = ((0.2, 0.4, ALWAYS), (0.6, 0.8, ALWAYS), (0.1, ALWAYS, ALWAYS))
    flat = TierRule(LADDER, rows, rows[::-1]).without_depth()
    assert len(flat.decode) == len(flat.prefill) == 3
    for row in (*flat.decode, *flat.prefill):
        assert row[:2] == pytest.approx((0.3, 2.2 / 3))
        assert row[2] == ALWAYS


@pytest.mark.parametrize("tier", LADDER)
def test_without_depth_a_uniform_rule_is_itself(tier: int) -> None:
    uniform = TierRule.uniform(tier, LADDER, 5)
    assert uniform.without_depth() == uniform


def test_importance_in_a_chunk_sums_routing_weights_times_token_weights() -> None:
    g = np.random.default_rng(4)
    experts, weights, token_weights = distinct(g, 20, 7, 3), g.random((20, 3), np.float32), g.random(20, np.float32)
    expected = [0.0] * (int(experts.max()) + 1)
    for token in range(20):
        for rank in range(3):
            expected[experts[token, rank]] += (weights[token, rank] * token_weights[token]).item()
    got = chunk_importance(experts, weights, token_weights)
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_in_a_chunk_every_token_of_an_expert_gets_the_tier_of_a_plain_loop(seed: int) -> None:
    g = np.random.default_rng(seed)
    experts = distinct(g, 30, 16, 4)
    weights, token_weights = floats(g.integers(1, 64, (30, 4)) / 64), floats(g.integers(1, 64, 30) / 16)
    thresholds = (0.4, 0.7, 0.95 if seed % 2 else ALWAYS)
    importance: dict[int, float] = {}
    for token in range(30):
        for rank in range(4):
            expert = int(experts[token, rank])
            importance[expert] = importance.get(expert, 0.0) + (weights[token, rank] * token_weights[token]).item()
    active = sorted(importance)
    expected = dict(zip(active, plain_tiers([importance[e] for e in active], thresholds, LADDER), strict=True))
    tokens = PromptRouting(experts, weights, np.zeros((30, 1), np.float32), token_weights, [30])
    got = rule((NEVER,) * 3, thresholds).choose_for_prompt(0, tokens)
    assert got.tolist() == [[expected[e] for e in row] for row in experts.tolist()]
    assert len(set(expected.values())) >= 3


@pytest.mark.parametrize("group", [1, 7, 8, 29, 30, 100])
def test_each_chunk_of_a_prompt_is_as_a_prompt_of_its_own(group: int) -> None:
    """The last has what is left."""
    g = np.random.default_rng(group)
    experts, weights, token_weights = distinct(g, 30, 16, 4), g.random((30, 4), np.float32), g.random(30, np.float32)
    chosen = replace(rule((NEVER,) * 3, (0.3, 0.6, 0.9)), pinned=((3,),))

    def choose(tokens: slice, size: int) -> list[list[int]]:
        residual = np.zeros((30, 1), np.float32)[tokens]
        routing = PromptRouting(
            experts[tokens], weights[tokens], residual, token_weights[tokens], chunk_lengths(len(residual), size)
        )
        return chosen.choose_for_prompt(0, routing).tolist()

    alone = [choose(slice(start, start + group), group) for start in range(0, 30, group)]
    assert choose(slice(0, 30), group) == [row for chunk in alone for row in chunk]


def test_heavy_hitters_decide_which_experts_are_critical() -> None:
    experts, weights = [[0, 1], [2, 1]], [[0.9, 0.1], [0.9, 0.1]]
    chunk = rule((NEVER,) * 3, (1e-3, 1e-3, ALWAYS))
    assert chunk.choose_for_prompt(0, prompt(experts, weights, [1.5, 0.5])).tolist() == [[4, 2], [2, 2]]
    assert chunk.choose_for_prompt(0, prompt(experts, weights, [0.5, 1.5])).tolist() == [[2, 2], [4, 2]]


def test_the_highest_tier_of_a_layer_is_one_that_it_can_get() -> None:
    assert [TierRule.uniform(tier, LADDER, 1).highest for tier in LADDER] == [(2,), (3,), (4,)]
    assert rule((NEVER, 0.5, ALWAYS), (NEVER, NEVER, ALWAYS)).highest == (3,)
    assert rule((NEVER, NEVER, ALWAYS), (0.1, 0.5, ALWAYS)).highest == (4,)
    assert replace(TierRule.uniform(2, LADDER, 2), pinned=((), (5,))).highest == (2, 4)


@pytest.mark.parametrize(
    ("decode", "prefill", "weighs"),
    [
        ((ALWAYS, ALWAYS, ALWAYS), (ALWAYS, ALWAYS, ALWAYS), False),
        ((NEVER, NEVER, ALWAYS), (NEVER, NEVER, ALWAYS), False),
        ((NEVER, 0.5, ALWAYS), (NEVER, 0.5, ALWAYS), True),
        ((NEVER, NEVER, ALWAYS), (NEVER, ALWAYS, ALWAYS), True),
    ],
)
def test_token_weights_are_needed_where_tiers_depend_on_them(
    decode: Sequence[float], prefill: Sequence[float], weighs: bool
) -> None:
    chosen = rule(decode, prefill)
    assert chosen.weighs_tokens == weighs
    routed = [[0, 1], [1, 2]], [[0.9, 0.1], [0.6, 0.4]]
    weighed, alike = (chosen.choose_for_prompt(0, prompt(*routed, weights)) for weights in ([0.1, 1.9], [1.0, 1.0]))
    assert weighs or weighed.tolist() == alike.tolist() == chosen.choose(0, decoding(*routed)).tolist()


def test_an_expert_whose_tokens_weigh_nothing_is_still_active() -> None:
    chosen = rule((NEVER,) * 3, (0.5, 0.9, ALWAYS))
    assert chosen.choose_for_prompt(0, prompt([[0], [5]], [[1.0], [1.0]], [0.0, 2.0])).tolist() == [[2], [4]]


def test_experts_that_no_token_of_a_chunk_was_routed_to_take_no_share_of_it() -> None:
    chosen = rule((NEVER,) * 3, (0.5, 0.9, ALWAYS))
    near, far = (chosen.choose_for_prompt(0, prompt([ids], [[0.6, 0.4]], [1.0])) for ids in ([0, 1], [100, 200]))
    assert near.tolist() == far.tolist() == [[4, 3]]


# The rule of an operating point


def make_policy(kind: str = "mixed") -> Policy:
    """Two layers, of which the first pins expert 0."""
    rows = (0.25, 0.5, ALWAYS), (0.5, 0.75, ALWAYS)
    layers = tuple(
        LayerPolicy(layer, {}, (), (), {}, {}, pinned, (), "none", ()) for layer, pinned in enumerate(((0,), ()))
    )
    point = OperatingPoint("some", kind, rows, rows[::-1], 3.0, 3.4, 100.0, 0.1, 3.0, 0.9, 0.15)
    return Policy(LADDER, layers, (point,), point.name)


def rule_of(policy: Policy) -> TierRule:
    return TierRule.of(policy.points[0], policy)


def test_a_rule_read_from_json_chooses_the_same() -> None:
    policy = make_policy()
    again = Policy.from_json(json.loads(json.dumps(policy.to_json())))
    weights = np.random.default_rng(0).random((20, 4), np.float32)
    tokens = Routing(np.tile(np.arange(4), (20, 1)), weights, np.zeros((20, 1), np.float32))
    for layer in (0, 1):
        ours, theirs = (rule_of(p).choose(layer, tokens) for p in (policy, again))
        assert np.array_equal(ours, theirs)


def test_pinned_experts_run_at_the_highest_tier_under_mixed_points() -> None:
    rule = rule_of(make_policy())
    bare = replace(rule, pinned=())
    assert rule.pinned == ((0,), ())
    token = decoding([[0, 1], [1, 0]], [[0.2, 0.8], [0.6, 0.4]])
    tokens = prompt(token.experts, token.weights, [0.5, 1.5])

    def both(layer: int, rule: TierRule) -> np.ndarray:
        return np.stack([rule.choose(layer, token), rule.choose_for_prompt(layer, tokens)])

    for free, chosen in zip(both(0, bare), both(0, rule), strict=True):
        assert (free[token.experts == 0] < 4).any()
        assert (chosen == np.where(token.experts == 0, 4, free)).all()
    # The pinned experts of one layer are not those of another.
    assert np.array_equal(both(1, rule), both(1, bare))


def test_pinned_experts_run_at_their_tier_under_uniform_points() -> None:
    policy = make_policy("uniform")
    low = (uniform_thresholds(2, LADDER),) * 2
    rule = TierRule.of(replace(policy.points[0], decode=low, prefill=low), policy)
    assert rule.pinned == ()
    assert (rule.choose(0, decoding([[0, 1]], [[0.5, 0.5]])) == 2).all()
    assert (rule.choose_for_prompt(0, prompt([[0, 1]], [[0.5, 0.5]], [1.0])) == 2).all()


def test_a_pinned_expert_is_never_skipped_and_takes_no_share_from_others() -> None:
    thresholds = ((0.1, 0.1, 0.8),)
    token = decoding([[3, 1, 0]], [[0.7, 0.2, 0.1]])
    assert TierRule(LADDER, thresholds, thresholds).choose(0, token).tolist() == [[4, 2, 0]]
    assert TierRule(LADDER, thresholds, thresholds, ((0,),)).choose(0, token).tolist() == [[4, 2, 4]]


def test_without_depth_pinned_experts_stay() -> None:
    assert rule_of(make_policy()).without_depth().pinned == ((0,), ())
