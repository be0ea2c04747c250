"""What is prefetched for the next layer, when, and how much there is time for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine import cost as cost_module
from dymoe_runtime.engine import prefetch as prefetch_module
from dymoe_runtime.engine.control import TURN
from dymoe_runtime.engine.cost import CostModel
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.engine.precision import Precision
from dymoe_runtime.engine.prefetch import SMOOTHING, Prefetcher
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.routing import PromptRouting, Routing
from dymoe_runtime.model.tier_rule import ALWAYS, NEVER, TierRule
from dymoe_runtime.store.request import ExpertRequest, token_request

LADDER, LAYERS, HIDDEN = (2, 3, 4), 3, 5
COST = CostModel((1,), 10.0, {2: (1.0,), 3: (2.0,), 4: (3.0,)})
# The heaviest experts at 4 bits, others at 2, and those that hardly count are skipped.
MIXED = (0.6, NEVER, 0.9)


class Guessed:
    """A prefetcher with made-up guesses, and what it asked of its store: (requests, needed now, idle time)."""

    def __init__(
        self,
        rows: Sequence[Sequence[tuple[int, float]]],
        thresholds: tuple[float, ...] = (ALWAYS, ALWAYS, ALWAYS),
        ranks: int = 4,
        width: int = 8,
        cost: CostModel | None = None,
    ) -> None:
        self.asked: list[tuple[list[ExpertRequest], list[ExpertRequest], float | None]] = []
        self.layers: list[int] = []  # that were guessed
        self.held: set[tuple[int, int]] = set()  # (layer, tier) of which all is in memory
        self.enabled = True
        rule = TierRule(LADDER, (thresholds,) * LAYERS, (thresholds,) * LAYERS)
        store: Any = SimpleNamespace(prefetch=self._ask, holds_layer=lambda *layer_tier: layer_tier in self.held)
        self._rows = rows
        self.prefetcher = Prefetcher(
            store, Precision("made up", rule), self._guess, {1: ranks, 2: ranks}, width, lambda: self.enabled, cost
        )

    def _ask(self, requests: list[ExpertRequest], needed_now: list[ExpertRequest], idle_s: float | None = None) -> None:
        self.asked.append((requests, needed_now, idle_s))

    def _guess(self, layer: int, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.layers.append(layer)
        experts, weights = zip(*(zip(*row, strict=True) for row in self._rows), strict=True)
        return np.array(experts), np.array(weights, np.float32)


def routing(tokens: int = 1) -> Routing:
    shape = (tokens, 1)
    return Routing(np.zeros(shape, np.int64), np.ones(shape, np.float32), np.zeros((tokens, HIDDEN), np.float32))


def prompt(token_weights: Sequence[float]) -> PromptRouting:
    of = routing(len(token_weights))
    return PromptRouting(of.experts, of.weights, of.residual, np.array(token_weights, np.float32), [len(token_weights)])


NOW = [token_request(0, 7, 4)]
TOKEN = [(5, 0.5), (3, 0.3), (1, 0.15), (0, 0.05)]


def test_a_token_prefetches_its_likeliest_experts_at_the_tiers_of_the_rule() -> None:
    guessed = Guessed([TOKEN], MIXED)
    guessed.prefetcher.for_token(0, routing(), NOW, 0.0)
    ((requests, needed_now, idle_s),) = guessed.asked
    assert guessed.layers == [1]
    assert requests == [token_request(1, 5, 4), token_request(1, 3, 4), token_request(1, 1, 2)]  # the last is skipped
    assert needed_now == NOW and idle_s is None


def test_only_ranks_whose_guess_is_often_right_are_prefetched() -> None:
    guessed = Guessed([TOKEN], ranks=2)
    guessed.prefetcher.for_token(0, routing(), NOW, 0.0)
    assert guessed.asked[0][0] == [token_request(1, 5, 4), token_request(1, 3, 4)]
    unlikely = Guessed([TOKEN], ranks=0)
    unlikely.prefetcher.for_token(0, routing(), NOW, 0.0)
    assert unlikely.asked == [] and unlikely.layers == [] and not unlikely.prefetcher.has_work()


def test_experts_without_weight_are_not_prefetched() -> None:
    guessed = Guessed([[(5, 1.0), (3, 0.0)]])
    guessed.prefetcher.for_token(1, routing(), [], 0.0)
    assert guessed.asked[0][0] == [token_request(2, 5, 4)]


def test_tokens_together_prefetch_what_weighs_most_over_all_of_them() -> None:
    rows = [[(5, 0.6), (3, 0.4)], [(3, 0.7), (2, 0.3)], [(1, 0.9), (2, 0.1)]]
    for width, experts in ((8, [3, 1, 5, 2]), (3, [3, 1, 5])):
        guessed = Guessed(rows, width=width)
        guessed.prefetcher.for_tokens(0, routing(3), NOW)
        guessed.prefetcher.for_prompt(0, prompt([1.0, 1.0, 1.0]), NOW)
        wanted = [token_request(1, expert, 4) for expert in experts]
        assert guessed.asked == [(wanted, NOW, None)] * 2


def test_an_expert_is_prefetched_at_the_highest_tier_that_a_token_wants() -> None:
    """Each decoded token chooses by itself; the tokens of a prompt choose together."""
    guessed = Guessed([[(5, 0.7), (3, 0.25), (1, 0.05)], [(3, 0.7), (1, 0.25), (5, 0.05)]], MIXED)
    guessed.prefetcher.for_tokens(0, routing(2), NOW)
    assert guessed.asked[0][0] == [token_request(1, 3, 4), token_request(1, 5, 4), token_request(1, 1, 2)]
    guessed.prefetcher.for_prompt(0, prompt([1.9, 0.1]), NOW)  # the first token counts
    assert [(request.key.expert, request.tier) for request in guessed.asked[1][0]] == [(3, 2), (5, 4)]


def test_nothing_is_prefetched_where_it_is_off_or_the_layer_is_in_memory() -> None:
    guessed = Guessed([TOKEN])
    calls = (
        lambda layer: guessed.prefetcher.for_token(layer, routing(), NOW, 0.0),
        lambda layer: guessed.prefetcher.for_tokens(layer, routing(), NOW),
        lambda layer: guessed.prefetcher.for_prompt(layer, prompt([1.0]), NOW),
    )
    for call in calls:
        call(LAYERS - 1)  # there is no layer after it
        guessed.enabled = False
        call(0)
        assert not guessed.prefetcher.has_work()
        guessed.enabled, guessed.held = True, {(1, 4)}
        call(0)
        assert guessed.prefetcher.has_work()  # for layer 2
        guessed.held |= {(2, 4)}
        assert not guessed.prefetcher.has_work()
        assert guessed.asked == [] and guessed.layers == []
        guessed.held = {(1, 3)}  # some planes are missing
        call(0)
        assert len(guessed.asked) == 1 and guessed.prefetcher.has_work()
        guessed.asked.clear()
        guessed.layers.clear()


def test_there_is_time_until_the_next_layer_of_the_same_token_needs_its_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That is what this layer's experts take, and the time between layers, smoothed; that of single tokens alone."""
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(prefetch_module, "time", clock)
    guessed = Guessed([TOKEN], cost=COST)
    layer_s = COST.layer([(4, 1), (2, 1)])
    now_requests = [token_request(0, 7, 4), token_request(0, 8, 2)]

    def idle_s(layer: int, entered: float) -> float | None:
        guessed.prefetcher.for_token(layer, routing(), now_requests, entered)
        return guessed.asked[-1][2]

    assert idle_s(0, 100.0) == layer_s  # nothing is known of the time between layers
    now = 120.0
    guessed.prefetcher.note_end(0)
    gap = SMOOTHING * 4.0
    assert idle_s(1, 124.0) == pytest.approx(layer_s + gap)
    now = 130.0
    guessed.prefetcher.note_end(1)
    assert idle_s(1, 199.0) == pytest.approx(layer_s + gap)  # of another token: it is not the layer after it
    now = 200.0
    guessed.prefetcher.note_end(0)
    guessed.prefetcher.note_gap()  # layers have been computed without a call
    assert idle_s(1, 299.0) == pytest.approx(layer_s + gap)
    now = 300.0
    guessed.prefetcher.note_end(0)
    guessed.prefetcher.for_prompt(0, prompt([1.0]), now_requests)
    assert guessed.asked[-1][2] is None
    assert idle_s(1, 399.0) == pytest.approx(layer_s + gap)
    now = 400.0
    guessed.prefetcher.note_end(0)
    assert idle_s(1, 403.0) == pytest.approx(layer_s + gap + SMOOTHING * (3.0 - gap))


def test_tokens_of_a_model_prefetch_within_the_time_of_a_layer_and_rest_where_the_trial_says_so(
    shipped_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(shipped_path)
    options = RunOptions(arena_bytes=bundle.expert_bytes() // 2, context=64, tier=4, preload=False)
    asked: list[tuple[int, float | None]] = []
    untried = 4 * TURN
    with load_model(bundle, options) as model:
        real = model.store.prefetch

        def prefetch(
            requests: Sequence[ExpertRequest], needed_now: Sequence[ExpertRequest], idle_s: float | None = None
        ) -> None:
            asked.append((model.stats.decode.tokens, idle_s))
            real(requests, needed_now, idle_s)

        monkeypatch.setattr(model.store, "prefetch", prefetch)
        model.prefill([1, 2, 3])
        assert asked and all(idle_s is None for _, idle_s in asked)  # a prompt takes long
        asked.clear()
        model.reset_stats()
        for token in range(untried + TURN):
            model.decode(20 + token)
        assert asked == [] and model.store.stats.prefetch_reads == 0
        for token in range(2 * TURN):
            model.decode(50 + token)
        assert {token for token, _ in asked} == {*range(untried + TURN, untried + 3 * TURN)}
        assert model.store.stats.prefetch_reads > 0
        if load_kernels().timed_at_start:
            times = [idle_s for _, idle_s in asked if idle_s is not None]
            assert len(times) == len(asked) and min(times) > 0
            assert max(times) < model.stats.decode.seconds
        before = len(asked), model.store.stats.prefetch_reads
        for token in range(TURN):
            model.decode(60 + token)
        assert (len(asked), model.store.stats.prefetch_reads) == before


def test_a_model_that_does_not_fit_measures_its_costs_before_it_reads(
    shipped_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what that leaves in memory does no harm."""
    bundle, measured, logits = Bundle.open(shipped_path), list[CostModel](), []
    real = cost_module.measure_for

    def measure_for(*args: Any) -> CostModel:
        measured.append(real(*args))
        return measured[-1]

    monkeypatch.setattr(cost_module, "measure_for", measure_for)
    for arena, prefetch, times in ((2 << 20, True, 1), (2 << 20, False, 0), (1 << 30, True, 0)):
        with load_model(bundle, RunOptions(arena_bytes=arena, context=16, prefetch=prefetch)) as model:
            assert len(measured) == times * load_kernels().timed_at_start
            logits.append([model.prefill([1, 2, 3]), model.decode(4)])
        measured.clear()
    assert all(np.array_equal(first, other) for row in logits[1:] for first, other in zip(logits[0], row, strict=True))
