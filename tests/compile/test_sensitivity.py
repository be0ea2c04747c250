"""What rules cost, measured all at once: as if each were measured alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dymoe_compile.checkpoint.window_decoder import bundle_decoder
from dymoe_compile.policy.sensitivity import Decoding, Measurement, Measurer, Original, Prefilling, Rule, Static
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.routing import NoExperts
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.model.weights import BundleDense

LADDER = (2, 3, 4)
WINDOWS, LENGTH = 3, 20


# Every place where a token is predicted.
PLACES = [(window, position) for window in range(WINDOWS) for position in range(LENGTH - 1)]


@pytest.fixture(scope="module")
def measurer(tiny_path: Path) -> Measurer:
    """Of random text, against random final states; guesses are kept everywhere."""
    bundle, kernels, rng = Bundle.open(tiny_path), load_kernels(), np.random.default_rng(0)
    windows = rng.integers(0, bundle.spec.vocab_size, (WINDOWS, LENGTH))
    hidden = rng.standard_normal((WINDOWS, LENGTH, bundle.spec.hidden_size), np.float32)
    head = Decoder(bundle.spec, BundleDense(bundle, kernels), NoExperts(), kernels).logits
    return Measurer(bundle, windows, Original(list(hidden), head), bundle_decoder(bundle, kernels), kernels, PLACES)


def rules(pinned: tuple[tuple[int, ...], ...] = ()) -> list[Rule]:
    thresholds = ((0.3, 0.6, 2.0), (0.5, 0.8, 2.0), (0.2, 0.9, 2.0))
    mixed = TierRule(LADDER, thresholds, thresholds[::-1], pinned)
    uniform = [TierRule.uniform(tier, LADDER, 3) for tier in LADDER]
    static = Static(tuple(tuple(LADDER[(layer + e) % 3] for e in range(6)) for layer in range(3)))
    return [*(Decoding(rule) for rule in uniform[::-1]), Decoding(mixed), Prefilling(mixed), static]


def figures(results: Sequence[Measurement]) -> list[tuple]:
    return [(r.kl, r.score.nll_sum, dict(sorted(r.counts.used.items()))) for r in results]


def test_rules_measured_together_are_as_measured_alone(measurer: Measurer) -> None:
    together = figures(measurer.measure(rules()))
    for rule, (kl, nll, used) in zip(rules(), together, strict=True):
        ((alone_kl, alone_nll, alone_used),) = figures(measurer.measure([rule]))
        assert alone_used == used
        assert (alone_kl, alone_nll) == pytest.approx((kl, nll), rel=1e-5)
    assert len({kl for kl, _, _ in together}) == len(together)


def test_one_tier_is_one_tier_however_it_is_chosen(measurer: Measurer) -> None:
    for tier in LADDER:
        uniform = TierRule.uniform(tier, LADDER, 3)
        same = [Decoding(uniform), Prefilling(uniform), Static(((tier,) * 6,) * 3)]
        results = measurer.measure(same)
        assert all(result.counts.used == {tier: WINDOWS * LENGTH * 2 * 3} for result in results)
        assert figures(results)[0] == figures(results)[1] == figures(results)[2]


def test_routers_are_compared_with_those_of_the_first_rule(measurer: Measurer) -> None:
    results = measurer.measure(rules())
    assert results[0].router_overlap == {0: 1.0, 1: 1.0, 2: 1.0}
    for result in results[1:]:
        # The first router sees what no expert has touched yet.
        assert result.router_overlap[0] == 1.0
        assert all(0 < overlap <= 1 for overlap in result.router_overlap.values())
    coarse = results[2].router_overlap
    assert coarse[2] < 1.0


def test_guesses_are_those_that_scores_count(measurer: Measurer) -> None:
    own = measurer.measure(rules())
    for result in own:
        assert len(result.guesses) == len(PLACES) == result.score.tokens
        same = [guess for guess in result.guesses if guess.probability == guess.of_original]
        assert len(same) == result.score.agreed
        assert all(0 <= guess.of_original <= guess.probability <= 1 for guess in result.guesses)
    assert len({tuple(result.guesses) for result in own}) == len(own)


def test_every_pair_of_token_and_expert_is_counted_once(measurer: Measurer) -> None:
    for result in measurer.measure(rules()):
        assert result.counts.pairs == WINDOWS * LENGTH * 2 * 3
        assert set(result.counts.used) <= set(LADDER)


def test_pinned_experts_are_measured_at_the_highest_tier(measurer: Measurer) -> None:
    """With all experts pinned a mixed rule is the highest tier."""
    whole = tuple(range(6))
    highest, *_, decoding, prefilling, _ = measurer.measure(rules((whole,) * 3))
    assert decoding.kl == pytest.approx(highest.kl, rel=1e-6) and prefilling.kl == pytest.approx(highest.kl, rel=1e-6)
    free, pinned = (measurer.measure([rules(pins)[3]])[0].counts.used for pins in ((), ((1,), (), ())))
    assert pinned[4] > free[4]
