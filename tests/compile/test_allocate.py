"""Allocation of bits to layers against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from dymoe_compile.policy.allocate import FINE_SHARES, SHARES, Choice, expert_choices, layer_options, lower_hull, solve
from dymoe_runtime.model.tier_rule import ALWAYS, tiers_by_mass, uniform_thresholds


def choice(bits: float, cost: float) -> Choice:
    return Choice((bits,), bits, cost)


def random_choices(rng: random.Random, count: int) -> list[Choice]:
    """Points of small whole coordinates, so that ties and collinear points occur and are exact."""
    return [choice(float(rng.randint(0, 8)), float(rng.randint(0, 12))) for _ in range(count)]


def convex_layer(rng: random.Random, steps: int, step_bits: float = 0.5) -> list[Choice]:
    """A hull whose steps all take as many bits and gain ever less."""
    gains = sorted((float(rng.randint(1, 40)) for _ in range(steps)), reverse=True)
    gains = [gain - 0.01 * i for i, gain in enumerate(gains)]
    return [choice(2 + step_bits * i, sum(gains[i:])) for i in range(steps + 1)]


def plain_hull(choices: Sequence[Choice]) -> list[tuple[float, float]]:
    """The points that alone minimize cost + price * bits for some price above 0: no chord runs on or below them."""

    def chord_below(point: Choice) -> bool:
        for a, b in itertools.product(choices, repeat=2):
            if a.bits < point.bits < b.bits:
                share = (point.bits - a.bits) / (b.bits - a.bits)
                if a.cost + share * (b.cost - a.cost) <= point.cost:
                    return True
        return False

    def dominated(point: Choice) -> bool:
        return any(
            (o.bits <= point.bits and o.cost < point.cost) or (o.bits < point.bits and o.cost <= point.cost)
            for o in choices
        )

    return sorted({(p.bits, p.cost) for p in choices if not dominated(p) and not chord_below(p)})


def brute_force(layers: Sequence[Sequence[Choice]], bits: float) -> float:
    """The least cost of any combination with mean bits of at most `bits`."""
    limit = bits * len(layers) + 1e-9
    fitting = [picks for picks in itertools.product(*layers) if sum(p.bits for p in picks) <= limit]
    return min(sum(p.cost for p in picks) for picks in fitting)


@pytest.mark.parametrize("seed", range(100))
def test_the_hull_equals_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    choices = random_choices(rng, rng.randint(1, 14))
    assert [(c.bits, c.cost) for c in lower_hull(choices)] == plain_hull(choices)


def test_the_hull_does_not_depend_on_the_order() -> None:
    rng = random.Random(5)
    choices = random_choices(rng, 12)
    expected = [(c.bits, c.cost) for c in lower_hull(choices)]
    for _ in range(20):
        rng.shuffle(choices)
        assert [(c.bits, c.cost) for c in lower_hull(choices)] == expected


def collinear_layer(seed: int) -> list[Choice]:
    """Points of one line, off by rounding."""
    rng = random.Random(seed)
    slope = rng.random()
    bits = sorted(2 + 2 * rng.random() for _ in range(8))
    return [choice(b, slope * (4 - b)) for b in bits]


def test_with_bits_to_spare_every_layer_gets_its_best_even_where_rounding_decides() -> None:
    for seed in range(300):
        choices = collinear_layer(seed)
        (pick,) = solve([lower_hull(choices)], 8.0)
        assert pick.cost == min(c.cost for c in choices), f"seed {seed}"


@pytest.mark.parametrize("seed", range(30))
def test_solving_equals_brute_force_where_all_steps_are_of_one_size(seed: int) -> None:
    rng = random.Random(seed)
    layers = [convex_layer(rng, rng.randint(1, 4)) for _ in range(rng.randint(1, 4))]
    for bits in (2.0, 2.13, 2.25, 2.5, 2.9, 3.25, 4.0, 9.0):
        picks = solve(layers, bits)
        assert sum(p.cost for p in picks) == pytest.approx(brute_force(layers, bits))


@pytest.mark.parametrize("seed", range(30))
def test_solving_is_at_most_one_step_from_the_best(seed: int) -> None:
    rng = random.Random(seed)
    layers = [lower_hull(random_choices(rng, 10)) for _ in range(3)]
    largest = max((a.cost - b.cost for hull in layers for a, b in itertools.pairwise(hull)), default=0.0)
    least = sum(hull[0].bits for hull in layers) / 3
    for bits in (least, least + 0.5, least + 1.5, least + 4):
        cost = sum(p.cost for p in solve(layers, bits))
        assert brute_force(layers, bits) - 1e-9 <= cost <= brute_force(layers, bits) + largest + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_the_bits_are_never_exceeded_and_each_layer_gets_one_of_its_choices(seed: int) -> None:
    rng = random.Random(seed)
    layers = [lower_hull(random_choices(rng, 10)) for _ in range(rng.randint(1, 6))]
    least = sum(hull[0].bits for hull in layers) / len(layers)
    for bits in (least + rng.random() * 8 for _ in range(20)):
        picks = solve(layers, bits)
        assert sum(p.bits for p in picks) / len(layers) <= bits + 1e-9
        assert all(any(pick is c for c in hull) for pick, hull in zip(picks, layers, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_more_bits_never_cost_more(seed: int) -> None:
    rng = random.Random(seed)
    layers = [lower_hull(random_choices(rng, 12)) for _ in range(5)]
    costs = [sum(p.cost for p in solve(layers, bits / 20)) for bits in range(181)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_bits_go_where_they_buy_most() -> None:
    poor, rich = [choice(2, 1.0), choice(3, 0.9), choice(4, 0.85)], [choice(2, 1.0), choice(3, 0.2), choice(4, 0.0)]
    assert [p.bits for p in solve([poor, rich], 2.5)] == [2, 3]
    assert [p.bits for p in solve([poor, rich], 3.0)] == [2, 4]
    assert [p.bits for p in solve([poor, rich], 3.5)] == [3, 4]


def test_where_nothing_fits_every_layer_gets_its_least() -> None:
    layers = [[choice(2, 1.0), choice(3, 0.5)], [choice(2.5, 1.0), choice(4, 0.1)]]
    assert [p.bits for p in solve(layers, 0.0)] == [2, 2.5]


def routed(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Routing weights of 4 active experts of 300 tokens, and their squares."""
    odds = np.exp(2 * np.random.default_rng(seed).standard_normal((300, 4), np.float32))
    weights = -np.sort(-odds / odds.sum(-1, keepdims=True))
    return weights, np.square(weights)


def layer_hull(
    importance: np.ndarray, energy: np.ndarray, sensitivity: dict[int, float], ladder: tuple[int, ...]
) -> list[Choice]:
    return lower_hull(layer_options(importance, energy, sensitivity, ladder))


@pytest.mark.parametrize("ladder", [(2, 3, 4, 8), (2, 3, 4), (2, 4), (4,)], ids=str)
def test_the_choices_of_a_layer_are_all_rules_of_the_grid(ladder: tuple[int, ...]) -> None:
    importance, energy = routed()
    sensitivity = dict(zip(ladder, (0.1, 0.03, 0.01, 0.0)[-len(ladder) :], strict=True))
    options = layer_options(importance, energy, sensitivity, ladder)
    got = lower_hull(options)
    everything = []
    for shares in itertools.product(FINE_SHARES if len(ladder) <= 3 else SHARES, repeat=len(ladder) - 1):
        if list(shares) != sorted(shares):
            continue
        tiers = tiers_by_mass(importance, (*shares, ALWAYS), ladder)
        cost = sum(sensitivity[t] * float(energy[tiers == t].sum() / energy.sum()) for t in ladder)
        everything.append(choice(float(tiers.mean()), cost))
    figures = sorted((c.bits, c.cost) for c in everything)
    assert len(options) == len(everything)
    np.testing.assert_allclose(sorted((c.bits, c.cost) for c in options), figures, rtol=1e-5, atol=1e-6)
    for price in (0.001, 0.01, 0.02, 0.05, 0.1, 0.5):
        best = min(c.cost + price * c.bits for c in everything)
        assert min(c.cost + price * c.bits for c in got) == pytest.approx(best, rel=1e-5)
    assert (got[0].bits, got[-1].bits) == (ladder[0], ladder[-1])
    assert all(a.bits < b.bits and a.cost > b.cost for a, b in itertools.pairwise(got))


def test_the_ends_of_a_layer_are_the_uniform_rules() -> None:
    importance, energy = routed()
    choices = layer_hull(importance, energy, {2: 0.1, 3: 0.03, 4: 0.0}, (2, 3, 4))
    for end, tier, cost in ((choices[0], 2, 0.1), (choices[-1], 4, 0.0)):
        uniform = tiers_by_mass(importance, uniform_thresholds(tier, (2, 3, 4)), (2, 3, 4))
        assert np.array_equal(tiers_by_mass(importance, end.thresholds, (2, 3, 4)), uniform)
        assert end.cost == pytest.approx(cost)


def test_experts_that_were_not_active_do_not_count() -> None:
    importance, energy = routed()
    none = np.zeros((300, 3), np.float32)
    sensitivity = {2: 0.1, 3: 0.03, 4: 0.0}
    got = layer_hull(np.hstack([importance, none]), np.hstack([energy, none]), sensitivity, (2, 3, 4))
    expected = layer_hull(importance, energy, sensitivity, (2, 3, 4))
    assert [c.bits for c in got] == pytest.approx([c.bits for c in expected])
    assert [c.cost for c in got] == pytest.approx([c.cost for c in expected])


def test_choices_do_better_than_uniform_bits_where_importance_is_uneven() -> None:
    choices = layer_hull(*routed(), {2: 0.1, 3: 0.03, 4: 0.0}, (2, 3, 4))
    (pick,) = solve([choices], 3.0)
    assert pick.bits <= 3.0
    assert pick.cost < 0.03


def test_an_expert_that_keeps_its_tier_counts_as_often_as_it_is_used() -> None:
    choices = expert_choices(1.5, 0.25, {2: 0.1, 3: 0.03, 4: 0.0}, (2, 3, 4))
    assert [c.thresholds for c in choices] == [(2,), (3,), (4,)]
    assert [c.bits for c in choices] == [3.0, 4.5, 6.0]
    assert [c.cost for c in choices] == pytest.approx([0.025, 0.0075, 0.0])


def test_a_tier_off_the_hull_is_no_choice_of_an_expert() -> None:
    choices = expert_choices(1.0, 1.0, {2: 0.1, 3: 0.09, 4: 0.0}, (2, 3, 4))
    assert [c.thresholds for c in choices] == [(2,), (4,)]


def test_an_expert_that_is_never_used_takes_the_lowest_tier() -> None:
    assert [c.thresholds for c in expert_choices(0.0, 0.0, {2: 0.1, 3: 0.03, 4: 0.0}, (2, 3, 4))] == [(2,)]
