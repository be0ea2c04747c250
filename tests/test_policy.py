"""Tiers by importance against a plain loop, and policy.json."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dymoe_runtime.decoder import Routing
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import native
from dymoe_runtime.policy import (
    ALWAYS,
    NEVER,
    SAME_BITS,
    VERSION,
    LayerPolicy,
    OperatingPoint,
    Policy,
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


def routing(
    experts: Sequence[Sequence[int]], gates: Sequence[Sequence[float]], weights: Sequence[float] | None = None
) -> Routing:
    tokens = None if weights is None else floats(weights)
    return Routing(np.array(experts), floats(gates), np.zeros((len(experts), 1), np.float32), tokens)


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
    wanted = [plain_tiers(row, thresholds.tolist(), ladder) for row in importance.tolist()]
    mismatched = [i for i, row in enumerate(wanted) if got[i].tolist() != row]
    assert mismatched == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ladder", [(2, 3, 4), (4,), (3, 5)], ids=str)
def test_a_token_alone_gets_the_tiers_that_it_gets_in_company(ladder: tuple[int, ...], seed: int) -> None:
    """Bit for bit, on random gates: both ways must round alike."""
    powers = np.exp(np.random.default_rng(seed).random((300, 6)) ** 3)
    gates = -np.sort(-floats(powers / powers.sum(-1, keepdims=True)))
    exact = gates.astype(np.float64)
    shares = (exact.cumsum(-1) - exact) / exact.sum(-1, keepdims=True)
    for token in range(0, 300, 7):  # thresholds that are the shares of some token
        thresholds = sorted(shares[token, 1 : 1 + len(ladder)].tolist())
        expected = tiers_by_mass(gates, thresholds, ladder).tolist()
        assert [tiers_of_token(row, thresholds, ladder) for row in gates.tolist()] == expected
        assert [compiled_tiers(row, thresholds, ladder) for row in gates.tolist()] == expected
    assert tiers_of_token([0.0, 0.0], (0.5, ALWAYS, ALWAYS), (2, 3, 4)) == [4, 4]


def compiled_tiers(
    gates: Sequence[float], thresholds: Sequence[float], ladder: Sequence[int], pinned: Sequence[int] = ()
) -> list[int]:
    """What compiled code gives the experts 0, 1, ... of a token; without it the reference."""
    if native is None:
        tiers = tiers_of_token(gates, thresholds, ladder)
        return [ladder[-1] if expert in pinned else tier for expert, tier in enumerate(tiers)]
    table = native._native.AtHand(2, len(gates), ladder)
    table.rule(1, thresholds, pinned)
    return table.tiers(1, list(range(len(gates))), gates)


def test_a_token_alone_obeys_pins_and_depth() -> None:
    thresholds = ((0.3, 0.7, ALWAYS), (0.9, 0.95, ALWAYS), (0.1, 0.2, NEVER))
    rule = TierRule((2, 3, 4), thresholds, thresholds, ((1,), (), (0, 2)))
    for layer in range(3):
        given = routing([[0, 1, 2]], [[0.5, 0.3, 0.2]])
        gates = given.gates[0].tolist()
        expected = rule.choose(layer, given)[0].tolist()
        assert rule.choose_for_token(layer, [0, 1, 2], gates) == expected
        assert compiled_tiers(gates, thresholds[layer], (2, 3, 4), rule.pinned[layer]) == expected


@pytest.mark.parametrize("thresholds", [*itertools.combinations_with_replacement((NEVER, 0.4, 1.0, ALWAYS), 3)])
def test_where_gates_do_not_matter_their_shares_are_not_asked_for(thresholds: tuple[float, ...]) -> None:
    only, gates = only_tier(thresholds, LADDER), ([0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    rule = TierRule(LADDER, (thresholds,), (thresholds,))
    for row in gates:
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
        decoding = routing([[0, 1, 2]], [[0.5, 0.3, 0.2]])
        prefilling = routing([[0, 1], [2, 1]], [[0.9, 0.1], [0.6, 0.4]], [0.0, 2.0])
        for layer in range(2):
            assert (uniform.choose(layer, decoding) == tier).all()
            assert (uniform.choose(layer, prefilling) == tier).all()


def test_what_lies_beyond_the_last_threshold_is_skipped() -> None:
    importance = floats([[0.7, 0.2, 0.1]])
    assert tiers_by_mass(importance, (0.1, 0.1, 0.8), LADDER).tolist() == [[4, 2, 0]]
    assert tiers_by_mass(importance, (NEVER, NEVER, NEVER), LADDER).tolist() == [[0, 0, 0]]


def test_decoding_looks_at_each_token_alone() -> None:
    chosen = rule((0.5, 0.8, ALWAYS), (NEVER, NEVER, ALWAYS)).choose(
        0, routing([[3, 1, 0], [1, 0, 3]], [[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])
    )
    assert chosen.tolist() == [[4, 3, 2], [4, 4, 3]]


def test_each_layer_has_its_own_thresholds() -> None:
    always, never = uniform_thresholds(4, LADDER), uniform_thresholds(2, LADDER)
    deep = TierRule(LADDER, (always, never), (never, always))
    decoding, prefilling = routing([[0, 1]], [[0.5, 0.5]]), routing([[0, 1]], [[0.5, 0.5]], [1.0])
    assert [deep.choose(layer, decoding)[0, 0].item() for layer in (0, 1)] == [4, 2]
    assert [deep.choose(layer, prefilling)[0, 0].item() for layer in (0, 1)] == [2, 4]


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


def test_importance_in_a_chunk_sums_gates_times_token_weights() -> None:
    g = np.random.default_rng(4)
    experts, gates, weights = distinct(g, 20, 7, 3), g.random((20, 3), np.float32), g.random(20, np.float32)
    expected = [0.0] * (int(experts.max()) + 1)
    for token in range(20):
        for rank in range(3):
            expected[experts[token, rank]] += (gates[token, rank] * weights[token]).item()
    got = chunk_importance(experts, gates, weights)
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_in_a_chunk_every_token_of_an_expert_gets_the_tier_of_a_plain_loop(seed: int) -> None:
    g = np.random.default_rng(seed)
    experts = distinct(g, 30, 16, 4)
    gates, weights = floats(g.integers(1, 64, (30, 4)) / 64), floats(g.integers(1, 64, 30) / 16)
    thresholds = (0.4, 0.7, 0.95 if seed % 2 else ALWAYS)
    importance: dict[int, float] = {}
    for token in range(30):
        for rank in range(4):
            expert = int(experts[token, rank])
            importance[expert] = importance.get(expert, 0.0) + (gates[token, rank] * weights[token]).item()
    active = sorted(importance)
    expected = dict(zip(active, plain_tiers([importance[e] for e in active], thresholds, LADDER), strict=True))
    got = rule((NEVER,) * 3, thresholds).choose(0, Routing(experts, gates, np.zeros((30, 1), np.float32), weights))
    assert got.tolist() == [[expected[e] for e in row] for row in experts.tolist()]
    assert len(set(expected.values())) >= 3


def test_heavy_hitters_decide_which_experts_are_critical() -> None:
    experts, gates = [[0, 1], [2, 1]], [[0.9, 0.1], [0.9, 0.1]]
    chunk = rule((NEVER,) * 3, (1e-3, 1e-3, ALWAYS))
    assert chunk.choose(0, routing(experts, gates, [1.5, 0.5])).tolist() == [[4, 2], [2, 2]]
    assert chunk.choose(0, routing(experts, gates, [0.5, 1.5])).tolist() == [[2, 2], [4, 2]]


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
def test_token_weights_are_asked_for_where_tiers_depend_on_them(
    decode: Sequence[float], prefill: Sequence[float], weighs: bool
) -> None:
    chosen = rule(decode, prefill)
    assert chosen.weighs_tokens == weighs
    tokens = routing([[0, 1], [1, 2]], [[0.9, 0.1], [0.6, 0.4]], weights=[0.1, 1.9])
    without = replace(tokens, token_weights=None)
    assert weighs or chosen.choose(0, without).tolist() == chosen.choose(0, tokens).tolist()


def test_an_expert_whose_tokens_weigh_nothing_is_still_active() -> None:
    chosen = rule((NEVER,) * 3, (0.5, 0.9, ALWAYS)).choose(0, routing([[0], [5]], [[1.0], [1.0]], [0.0, 2.0]))
    assert chosen.tolist() == [[2], [4]]


def test_a_chunk_without_look_at_other_experts() -> None:
    """Experts that no token of the chunk was routed to take no share of it."""
    near = rule((NEVER,) * 3, (0.5, 0.9, ALWAYS)).choose(0, routing([[0, 1]], [[0.6, 0.4]], [1.0]))
    far = rule((NEVER,) * 3, (0.5, 0.9, ALWAYS)).choose(0, routing([[100, 200]], [[0.6, 0.4]], [1.0]))
    assert near.tolist() == far.tolist() == [[4, 3]]


# policy.json


def point(name: str, bits: float, kl: float, bytes_per_token: float = 0.0) -> OperatingPoint:
    thresholds = ((0.25, 0.5, ALWAYS), (0.5, 0.75, ALWAYS))
    return OperatingPoint(
        name=name,
        kind="mixed",
        decode=thresholds,
        prefill=thresholds[::-1],
        bits_mean=bits,
        effective_bits=bits + 0.4,
        bytes_per_token=bytes_per_token,
        kl=kl,
        nll=3.0,
        top1_agreement=0.9,
        prefill_kl=1.5 * kl,
    )


def make_policy(*points: OperatingPoint) -> Policy:
    layers = (
        LayerPolicy(
            layer=0,
            sensitivity={"2": 0.04, "3": 0.01, "4": 0.0},
            frequency=(0.5, 0.25),
            gate_mass=(0.75, 0.25),
            expert_error={"2": (0.9, 0.2), "3": (0.4, 0.1), "4": (0.05, 0.02)},
            router_overlap={"2": 0.9, "3": 0.97, "4": 1.0},
            pinned=(0,),
            data_free=(1,),
            look_ahead_by="linear",
            look_ahead_recall=(0.9, 0.6),
        ),
        LayerPolicy(1, {}, (), (), {}, {}, (), (), "none", ()),
    )
    points = points or (point("2", 2.0, 0.1, 100.0), point("mixed-3.0", 3.0, 0.02, 150.0))
    return Policy(LADDER, layers, points, points[-1].name, ("importance is flat in layer 1",))


def as_read(policy: Policy) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(policy.to_json()))
    return data


def test_a_policy_comes_back_from_json_as_it_was() -> None:
    policy = make_policy()
    assert Policy.from_json(as_read(policy)) == policy


def test_a_rule_read_from_json_chooses_the_same() -> None:
    policy = make_policy()
    again = Policy.from_json(as_read(policy))
    gates = np.random.default_rng(0).random((20, 4), np.float32)
    tokens = Routing(np.tile(np.arange(4), (20, 1)), gates, np.zeros((20, 1), np.float32))
    for layer in (0, 1):
        ours, theirs = (TierRule.of(p.points[0], p).choose(layer, tokens) for p in (policy, again))
        assert np.array_equal(ours, theirs)


def test_pinned_experts_run_at_the_highest_tier_under_mixed_points() -> None:
    policy = make_policy()
    rule = TierRule.of(policy.points[0], policy)
    bare = replace(rule, pinned=())
    assert rule.pinned == ((0,), ())
    decoding = routing([[0, 1], [1, 0]], [[0.2, 0.8], [0.6, 0.4]])
    prefilling = replace(decoding, token_weights=floats([0.5, 1.5]))
    for tokens in (decoding, prefilling):
        free = bare.choose(0, tokens)
        assert (free[tokens.experts == 0] < 4).any()
        assert (rule.choose(0, tokens) == np.where(tokens.experts == 0, 4, free)).all()
        # The pinned experts of one layer are not those of another.
        assert np.array_equal(rule.choose(1, tokens), bare.choose(1, tokens))


def test_pinned_experts_run_at_their_tier_under_uniform_points() -> None:
    policy = make_policy()
    low = (uniform_thresholds(2, LADDER),) * 2
    uniform = replace(policy.points[0], kind="uniform", decode=low, prefill=low)
    rule = TierRule.of(uniform, policy)
    assert rule.pinned == ()
    assert (rule.choose(0, routing([[0, 1]], [[0.5, 0.5]])) == 2).all()
    assert (rule.choose(0, routing([[0, 1]], [[0.5, 0.5]], [1.0])) == 2).all()


def test_a_pinned_expert_is_never_skipped_and_takes_no_share_from_others() -> None:
    thresholds = ((0.1, 0.1, 0.8),)
    tokens = routing([[3, 1, 0]], [[0.7, 0.2, 0.1]])
    assert TierRule(LADDER, thresholds, thresholds).choose(0, tokens).tolist() == [[4, 2, 0]]
    assert TierRule(LADDER, thresholds, thresholds, ((0,),)).choose(0, tokens).tolist() == [[4, 2, 4]]


def test_without_depth_pinned_experts_stay() -> None:
    policy = make_policy()
    assert TierRule.of(policy.points[0], policy).without_depth().pinned == ((0,), ())


def test_notes_may_be_absent() -> None:
    data = as_read(make_policy())
    del data["notes"]
    assert Policy.from_json(data).notes == ()


@pytest.mark.parametrize("place", ["", "layers", "points"])
def test_an_unknown_key_is_named(place: str) -> None:
    data = as_read(make_policy())
    (data[place][1] if place else data)["zzz_extra"] = 1
    with pytest.raises(DymoeError, match=r"policy\.json.*zzz_extra"):
        Policy.from_json(data)


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("", "ladder"),
        ("", "layers"),
        ("", "points"),
        ("", "default_point"),
        ("layers", "sensitivity"),
        ("layers", "look_ahead_by"),
        ("layers", "look_ahead_recall"),
        ("layers", "expert_error"),
        ("layers", "router_overlap"),
        ("layers", "pinned"),
        ("layers", "data_free"),
        ("points", "decode"),
        ("points", "prefill_kl"),
        ("points", "kl"),
    ],
)
def test_a_missing_key_is_named(place: str, key: str) -> None:
    data = as_read(make_policy())
    del (data[place][1] if place else data)[key]
    with pytest.raises(DymoeError, match=rf"policy\.json.*{key}"):
        Policy.from_json(data)


@pytest.mark.parametrize(
    ("key", "value"), [("ladder", None), ("ladder", 3), ("layers", None), ("layers", [3]), ("points", 3), ("notes", 3)]
)
def test_a_value_of_the_wrong_kind_is_an_error_and_no_traceback(key: str, value: Any) -> None:
    with pytest.raises(DymoeError, match=r"policy\.json"):
        Policy.from_json({**as_read(make_policy()), key: value})


@pytest.mark.parametrize("version", [VERSION + 1, 0, None, "1"])
def test_another_version_is_named(version: Any) -> None:
    with pytest.raises(DymoeError, match=rf"policy\.json: version {version}.*reads {VERSION}"):
        Policy.from_json({**as_read(make_policy()), "version": version})


def test_a_missing_version_is_an_error() -> None:
    data = as_read(make_policy())
    del data["version"]
    with pytest.raises(DymoeError, match="version"):
        Policy.from_json(data)


def test_a_point_is_found_by_name() -> None:
    policy = make_policy(point("a", 2.0, 0.1), point("b", 3.0, 0.2))
    assert policy.point("b") is policy.points[1]


@pytest.mark.parametrize(("bits", "name"), [(0.0, "2"), (2.4, "2"), (2.6, "3"), (3.4, "3"), (3.6, "4"), (9.0, "4")])
def test_the_nearest_point_is_that_of_the_nearest_bits(bits: float, name: str) -> None:
    assert make_policy(*(point(str(b), b, 0.1 / b) for b in (2, 3, 4))).nearest(bits).name == name


def test_of_points_about_as_near_the_best_is_taken() -> None:
    uniform, mixed = point("3", 3.0, 0.02), point("mixed", 3.0 + SAME_BITS * 0.9, 0.01)
    assert make_policy(uniform, mixed).nearest(3.0).name == "mixed"
    assert make_policy(uniform, replace(mixed, kl=0.03)).nearest(3.0).name == "3"
    assert make_policy(uniform, replace(mixed, bits_mean=3.0 + 1.1 * SAME_BITS)).nearest(3.0).name == "3"


def test_the_best_point_within_the_bytes_is_that_of_least_kl() -> None:
    policy = make_policy(point("a", 2.0, 0.1, 100.0), point("b", 2.5, 0.01, 200.0), point("c", 3.0, 0.05, 150.0))
    wanted = {100.0: "a", 149.9: "a", 150.0: "c", 199.0: "c", 200.0: "b", 1e9: "b"}
    assert {nbytes: policy.best_within(nbytes).name for nbytes in wanted} == wanted


def test_where_no_point_fits_the_smallest_is_taken() -> None:
    policy = make_policy(point("b", 2.5, 0.01, 200.0), point("a", 2.0, 0.1, 100.0))
    assert policy.best_within(99.9).name == "a"
