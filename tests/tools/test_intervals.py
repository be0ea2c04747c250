"""Intervals of a text's scores: how often they hold what they should, and what short texts give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dymoe_runtime.model.score import SCORED_ROWS, Score
from dymoe_runtime.tools.intervals import CONFIDENCE, MAX_BATCHES, T_QUANTILES, intervals

RUNS = 300
# Mean of exp(0.8 x) and share of x < 1, for standard normal x.
MEAN, SHARE = math.exp(0.32), 0.8413


def correlated(generator: np.random.Generator, tokens: int, correlation: float) -> np.ndarray:
    """Standard normal values, each correlated with the one before."""
    values = generator.normal(size=tokens)
    values[1:] *= math.sqrt(1 - correlation**2)
    for i in range(1, tokens):
        values[i] += correlation * values[i - 1]
    return values


def blocks_of(values: np.ndarray) -> list[Score]:
    """Scores of tokens whose losses are exp(0.8 value), and that agree where the value is below 1."""
    blocks = []
    for start in range(0, len(values), SCORED_ROWS):
        part = values[start : start + SCORED_ROWS]
        losses, agreed = float(np.exp(0.8 * part).sum()), int((part < 1).sum())
        blocks.append(Score(len(part), nll_sum=losses, kl_sum=losses, agreed=agreed, compared=len(part)))
    return blocks


@pytest.mark.parametrize("tokens", [150, 1000, 4000])
@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_19_of_20_intervals_hold_the_true_figure(tokens: int, correlation: float) -> None:
    generator = np.random.default_rng(0)
    found = {"nll": 0, "top1_agreement": 0, "of independent tokens": 0}
    for _ in range(RUNS):
        values = correlated(generator, tokens, correlation)
        result = intervals(blocks_of(values))
        for name, truth in (("nll", MEAN), ("top1_agreement", SHARE)):
            low, high = result[f"{name}_interval"]
            found[name] += low <= truth <= high
        losses = np.exp(0.8 * values)
        found["of independent tokens"] += abs(losses.mean() - MEAN) < 1.96 * losses.std() / math.sqrt(tokens)
    assert found["nll"] / RUNS > 0.91 and found["top1_agreement"] / RUNS > 0.91
    assert (found["of independent tokens"] / RUNS > 0.91) == (correlation == 0)


def test_the_interval_of_the_perplexity_is_that_of_the_nll() -> None:
    result = intervals(blocks_of(correlated(np.random.default_rng(1), 1000, 0.5)))
    assert result["perplexity_interval"] == pytest.approx(tuple(map(math.exp, result["nll_interval"])))


def test_one_batch_says_nothing_about_variation() -> None:
    values = correlated(np.random.default_rng(2), SCORED_ROWS + 5, 0)
    assert set(intervals(blocks_of(values)).values()) == {None}
    assert set(intervals([Score(tokens=3, nll_sum=1.0)])) == {"nll_interval", "perplexity_interval"}


def test_agreement_of_all_tokens_is_not_certain_and_stays_a_share() -> None:
    blocks = [Score(SCORED_ROWS, nll_sum=64.0, agreed=SCORED_ROWS, compared=SCORED_ROWS) for _ in range(4)]
    low, high = intervals(blocks)["top1_agreement_interval"]
    assert 0.9 < low < 1 and high == 1
    assert intervals(blocks)["kl_interval"] == (0, 0)


def test_short_windows_are_joined_to_batches() -> None:
    """Windows of 16 tokens give blocks of 15 predictions, too short to be independent."""
    values = np.random.default_rng(3).normal(size=4 * SCORED_ROWS)
    whole = intervals([Score(SCORED_ROWS, nll_sum=float(v.sum())) for v in values.reshape(4, -1)])
    pieces = intervals([Score(16, nll_sum=float(v.sum())) for v in values.reshape(-1, 16)])
    assert pieces["nll_interval"] == pytest.approx(whole["nll_interval"])


def test_quantiles_are_those_of_student() -> None:
    stats = pytest.importorskip("scipy.stats")
    freedom = range(1, MAX_BATCHES)
    assert [round(stats.t.ppf((1 + CONFIDENCE) / 2, k), 3) for k in freedom] == list(T_QUANTILES)
