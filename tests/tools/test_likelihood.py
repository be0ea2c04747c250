"""Log-likelihoods of given texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EXAMPLES, run_cli

from dymoe_runtime import DymoeError, RunOptions, Scorer, load_scorer, log_likelihoods, rolling_log_likelihood
from dymoe_runtime.model.score import SCORED_ROWS, log_softmax
from dymoe_runtime.tools.likelihood import rolling_requests

VOCAB = 32


class AnySpec:
    """A specification that knows all tokens."""

    @staticmethod
    def check_ids(ids: object) -> None:
        pass


class Bigrams:
    """A model whose prediction depends on the last token only; it counts its passes."""

    spec: Any = AnySpec

    def __init__(self, damage: float = 0.0) -> None:
        self.table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32) + np.float32(damage)
        self.passes: list[list[int]] = []

    def hidden(self, ids: np.ndarray) -> np.ndarray:
        self.passes.append(ids.tolist())
        return np.eye(VOCAB, dtype=np.float32)[ids]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        assert len(hidden) <= SCORED_ROWS
        return hidden @ self.table

    def expected(self, context: list[int], continuation: list[int]) -> float:
        log_p, text = log_softmax(self.table), [*context, *continuation]
        pairs = zip(text[len(context) - 1 : -1], text[len(context) :], strict=True)
        return sum(float(log_p[before, after]) for before, after in pairs)

    def greedy(self, last: int, tokens: int) -> list[int]:
        ids: list[int] = []
        for _ in range(tokens):
            ids.append(int(self.table[ids[-1] if ids else last].argmax()))
        return ids


@pytest.fixture(scope="module")
def scorer(tiny_path: Path) -> Iterator[Scorer]:
    with load_scorer(tiny_path, RunOptions(tier=4), window=200) as made:
        yield made


def random_ids(tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, tokens).tolist()


@pytest.mark.parametrize("context", [1, 5, SCORED_ROWS, 3 * SCORED_ROWS])
@pytest.mark.parametrize("continuation", [0, 1, 2, SCORED_ROWS, SCORED_ROWS + 1, 200])
def test_a_log_likelihood_is_that_of_the_continuation_alone(context: int, continuation: int) -> None:
    model, request = Bigrams(), (random_ids(context), random_ids(continuation, 1))
    (result,) = log_likelihoods(model, [request])
    assert result.value == pytest.approx(model.expected(*request), abs=1e-4)


@pytest.mark.parametrize("tokens", [1, SCORED_ROWS + 3])
def test_greedy_says_whether_each_token_is_the_likeliest(tokens: int) -> None:
    model, context = Bigrams(), [3, 7]
    best = model.greedy(7, tokens)
    for at in (0, tokens - 1):
        other = [*best[:at], (best[at] + 1) % VOCAB, *best[at + 1 :]]
        assert [result.greedy for result in log_likelihoods(model, [(context, best), (context, other)])] == [
            True,
            False,
        ]


def test_choices_of_one_token_share_a_pass() -> None:
    model, context = Bigrams(), random_ids(SCORED_ROWS + 9)
    requests = [(context, [choice]) for choice in range(8)]
    requests.insert(3, ([1, 2], [3, 4]))
    requests.append((context[:2], [*context[2:], 1]))  # scores more of the same tokens
    results = log_likelihoods(model, requests)
    assert len(model.passes) == 2
    assert [r.value for r in results] == pytest.approx([model.expected(*request) for request in requests], abs=1e-4)


def test_damaged_weights_are_an_error() -> None:
    with pytest.raises(DymoeError, match="dymoe-bundle verify"):
        log_likelihoods(Bigrams(math.nan), [([1], [2])])


def test_a_request_without_context_says_what_to_do() -> None:
    with pytest.raises(DymoeError, match="BOS"):
        log_likelihoods(Bigrams(), [([1], [2]), ([], [2])])


@pytest.mark.parametrize("window", [1, 2, 5, 10])
def test_rolling_windows_score_each_token_once_after_as_much_as_fits(window: int) -> None:
    for tokens in range(23):
        ids = random_ids(tokens)
        requests = rolling_requests(ids, 0, window)
        assert [token for _, continuation in requests for token in continuation] == ids
        assert all(0 < len(a) + len(b) - 1 <= window for a, b in requests)
        assert all(len(a) + len(b) - 1 == window for a, b in requests[1:])
        expected = Bigrams().expected([0], ids)
        assert rolling_log_likelihood(Bigrams(), ids, 0, window) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("window", [1, 2, 5, 10])
def test_rolling_windows_are_those_of_lm_eval(window: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for tokens in range(23):
        ids = random_ids(tokens)
        theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 0, window, 1))
        assert rolling_requests(ids, 0, window) == list(theirs)


def test_log_likelihoods_are_those_of_eval(scorer: Scorer, tiny_path: Path, tmp_path: Path) -> None:
    from dymoe_runtime import Tokenizer

    text = (EXAMPLES / "heldout" / "wiki.txt").read_text(encoding="utf-8")[:200]
    (tmp_path / "text.txt").write_text(text)
    outcome = run_cli(tiny_path, "--eval", tmp_path / "text.txt", "--tiers", 4, "--json").json["files"][0]
    ids = Tokenizer.load(tiny_path).encode(text)[:200]
    assert outcome["tokens"] == len(ids) - 1
    (result,) = log_likelihoods(scorer, [(ids[:1], ids[1:])])
    assert result.value == pytest.approx(-outcome["nll"] * outcome["tokens"], rel=1e-6)


def test_a_scorer_refuses_what_does_not_fit(scorer: Scorer) -> None:
    assert len(log_likelihoods(scorer, [([1] * 200, [1])])) == 1
    for context, word in (([1] * 201, "1 to 200"), ([256], "token 256"), ([-1], "token")):
        with pytest.raises(DymoeError, match=word):
            log_likelihoods(scorer, [(context, [1])])
    with pytest.raises(DymoeError, match="token 300"):
        log_likelihoods(scorer, [([1], [300])])


@pytest.mark.parametrize("window", [0, -1, 257])
def test_a_window_is_at_most_the_models_context(window: int, tiny_path: Path) -> None:
    with pytest.raises(DymoeError, match="256"):
        load_scorer(tiny_path, window=window)


def test_a_scorer_takes_the_context_by_default(tiny_path: Path) -> None:
    with load_scorer(tiny_path) as scorer:
        assert scorer.hidden([1] * 256).shape == (256, scorer.spec.hidden_size)
