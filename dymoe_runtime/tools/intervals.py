"""Confidence intervals of a text's scores, by batch means: the losses of neighbouring tokens are correlated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dymoe_runtime.model.score import SCORED_ROWS, Score

CONFIDENCE = 0.95
# More batches hardly narrow an interval, but shorter ones are less independent (Schmeiser 1982).
MAX_BATCHES = 30
# Student's t distribution: the quantile 0.975 by degrees of freedom, from 1.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)

Interval = tuple[float, float]


def total(blocks: Sequence[Score]) -> Score:
    """Return the sum of the scores of `blocks`."""
    score = Score()
    for block in blocks:
        score.add(block)
    return score


def intervals(blocks: Sequence[Score]) -> dict[str, Interval | None]:
    """Return the 95% interval (low, high) of each figure of `Score.to_json`, by name: `nll_interval` and so on.

    `blocks` are scores of consecutive tokens. An interval says where the figure of all text like this one should be.

    The losses of neighbouring tokens are correlated, so their own variance would give intervals that are too narrow.
    Batch means take the variance from sums over long batches, which are nearly independent: consecutive blocks are
    joined to at most MAX_BATCHES batches of about equal numbers of tokens, and the interval is Student's, with one
    degree of freedom less than batches. Nothing is random, so equal scores give equal intervals.

    An interval is None if there are fewer than two batches, because one says nothing about variation. That of the
    perplexity is the exponential of that of the nll. KL is never below 0. The interval of the agreement is Wilson's
    with the number of independent tokens that would have the variance of the batches, which stays within 0 and 1 and
    has a width also where all tokens agree.
    """
    batches = _batches(blocks)
    nll = _interval(batches, lambda score: score.nll_sum, lambda score: score.tokens)
    result: dict[str, Interval | None] = {
        "nll_interval": nll,
        "perplexity_interval": nll and (_exp(nll[0]), _exp(nll[1])),
    }
    if any(block.compared for block in blocks):
        kl = _interval(batches, lambda score: score.kl_sum, lambda score: score.compared)
        result["kl_interval"] = kl and (max(0.0, kl[0]), kl[1])
        result["top1_agreement_interval"] = _agreement_interval(batches)
    return result


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def _batches(blocks: Sequence[Score]) -> list[Score]:
    """Join consecutive blocks to at most MAX_BATCHES batches of about equal numbers of tokens, SCORED_ROWS or more."""
    tokens = sum(block.tokens for block in blocks)
    count = min(MAX_BATCHES, max(1, round(tokens / SCORED_ROWS)))
    batches: dict[int, Score] = {}
    before = 0
    for block in blocks:
        # The batch in which the middle of the block lies.
        batch = (2 * before + block.tokens) * count // (2 * tokens)
        batches.setdefault(batch, Score()).add(block)
        before += block.tokens
    return list(batches.values())


def _interval(
    batches: Sequence[Score], value: Callable[[Score], float], count: Callable[[Score], int]
) -> Interval | None:
    """Return the interval of the sum of `value` over the sum of `count`; None if there are fewer than two batches."""
    if len(batches) < 2:
        return None
    mean = sum(map(value, batches)) / sum(map(count, batches))
    half = T_QUANTILES[len(batches) - 2] * math.sqrt(_variance(batches, value, count))
    return mean - half, mean + half


def _variance(batches: Sequence[Score], value: Callable[[Score], float], count: Callable[[Score], int]) -> float:
    """Return the variance of the ratio of two sums over two or more batches, whose counts may differ (Cochran 1977)."""
    tokens, n = sum(map(count, batches)), len(batches)
    mean = sum(map(value, batches)) / tokens
    squares = sum((value(batch) - mean * count(batch)) ** 2 for batch in batches)
    return n / (n - 1) * squares / tokens**2


def _agreement_interval(batches: Sequence[Score]) -> Interval | None:
    if len(batches) < 2:
        return None
    t = T_QUANTILES[len(batches) - 2]
    tokens = sum(batch.compared for batch in batches)
    share = sum(batch.agreed for batch in batches) / tokens
    variance = _variance(batches, lambda score: score.agreed, lambda score: score.compared)
    independent = share * (1 - share) / variance if variance else tokens
    independent = max(1.0, min(independent, tokens))
    middle = (share + t * t / (2 * independent)) / (1 + t * t / independent)
    half = t * math.sqrt(share * (1 - share) / independent + (t / (2 * independent)) ** 2) / (1 + t * t / independent)
    return max(0.0, middle - half), min(1.0, middle + half)
