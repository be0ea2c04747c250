"""The sampler keeps what transformers' processors keep, to the bit, and draws reproducibly."""

from __future__ import annotations

import json
import math
import warnings
from array import array
from collections import Counter

import numpy as np
import pytest
import torch

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.sampling import LIMITS, Sampler, SamplingParams, candidates, keep_top_p, penalize_repetition

VOCABULARY = 1000


def random_logits(seed: int, size: int = VOCABULARY, ties: bool = False) -> np.ndarray:
    logits = 4 * np.random.default_rng(seed).standard_normal(size, np.float32)
    return logits.round() if ties else logits


def expected_scores(logits: np.ndarray, history: list[int], params: SamplingParams) -> np.ndarray:
    """What transformers leaves of the logits."""
    generation = pytest.importorskip("transformers.generation")
    steps = [generation.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    steps.append(generation.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        steps.append(generation.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(generation.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(generation.MinPLogitsWarper(params.min_p))
    scores = torch.from_numpy(logits.copy())[None]
    return generation.LogitsProcessorList(steps)(torch.tensor([history]), scores)[0].numpy()


def our_scores(logits: np.ndarray, history: list[int], params: SamplingParams) -> np.ndarray:
    ids, scores = candidates(penalize_repetition(logits, history, params.repetition_penalty), params)
    assert scores.dtype == logits.dtype
    whole = np.full_like(logits, -math.inf)
    whole[ids] = scores
    return whole


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (50, 1.0, 0.0), (5000, 1.0, 0.0),
    (0, 0.9, 0.0), (0, 0.3, 0.0), (0, 0.0, 0.0), (0, 0.99999, 0.0),
    (0, 1.0, 0.1), (0, 1.0, 1.0),
    (20, 0.8, 0.05), (300, 0.95, 0.01), (7, 0.5, 0.0),
])  # fmt: skip
def test_filters_equal_transformers(top_k: int, top_p: float, min_p: float, penalty: float, ties: bool) -> None:
    for seed in range(4):
        temperature = (0.3, 1, 1.7, 0.01)[seed]
        params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty=penalty)
        logits = random_logits(seed, ties=ties)
        history = [3, 3, 999, *range(100 * seed, 100 * seed + 90), int(logits.argmax())]
        ours = our_scores(logits, history, params)
        expected = expected_scores(logits, history, params)
        # Which of equal scores top-p removes is left to torch's unstable sort there.
        assert np.array_equal(np.sort(ours), np.sort(expected)) if ties else np.array_equal(ours, expected)


@pytest.mark.parametrize("seed", range(3))
def test_filters_equal_transformers_at_full_vocabulary(seed: int) -> None:
    logits = random_logits(seed, size=151_936)
    for params in (
        SamplingParams(0.8, top_p=0.95),
        SamplingParams(0.6, 20, 0.95),
        SamplingParams(1, min_p=0.1),
    ):
        assert np.array_equal(our_scores(logits, [1], params), expected_scores(logits, [1], params))


def test_top_p_keeps_the_lowest_ids_of_equal_scores() -> None:
    kept = keep_top_p(np.array([0, 1, 1, 0, 1, 1], np.float32), 0.3)
    assert np.flatnonzero(np.isfinite(kept)).tolist() == [1, 2]
    assert Sampler(SamplingParams(1.0, top_p=0.0)).sample(np.zeros(9, np.float32), []) == 0


def test_filters_leave_the_input_alone() -> None:
    logits = random_logits(0)
    before = logits.copy()
    Sampler(SamplingParams(0.7, 40, 0.9, 0.05, 1.2)).sample(logits, [1, 2, 3])
    assert np.array_equal(logits, before)


def test_greedy_is_the_lowest_id_of_the_largest_logit() -> None:
    for size, ids in ((7, (2, 5)), (151_936, (70_001, 70_002, 151_935))):
        logits = np.zeros(size, np.float32)
        logits[list(ids)] = 3.0
        assert Sampler(SamplingParams()).sample(logits, []) == ids[0]


def test_greedy_ignores_filters_but_not_the_penalty() -> None:
    logits = np.array([1, 3, 2], np.float32)
    assert Sampler(SamplingParams(top_k=1, top_p=0.1, min_p=1.0)).sample(logits, [1]) == 1
    assert Sampler(SamplingParams(repetition_penalty=2.0)).sample(logits, [1]) == 2


def test_a_vanishing_temperature_is_greedy() -> None:
    logits = random_logits(1)
    assert Sampler(SamplingParams(temperature=1e-30)).sample(logits, []) == int(logits.argmax())


def test_penalty_ignores_ids_outside_the_logits_and_reads_arrays() -> None:
    logits = np.array([1, -1, 2], np.float32)
    expected = np.array([0.5, -2, 2], np.float32)
    for history in ([0, 1, 1, 3, 99], array("q", [0, 1, 1, 3, 99])):
        assert np.array_equal(penalize_repetition(logits, history, 2.0), expected)
    assert np.array_equal(penalize_repetition(logits, [], 2.0), logits)


def test_a_sampled_history_array_can_still_grow() -> None:
    history = array("q", [1, 2])
    Sampler(SamplingParams(repetition_penalty=1.5)).sample(random_logits(0), history)
    history.append(3)


def draws(params: SamplingParams, count: int = 50) -> list[int]:
    sampler = Sampler(params)
    return [sampler.sample(random_logits(7), []) for _ in range(count)]


def test_seeds_reproduce_and_differ() -> None:
    np.random.seed(0)
    first = draws(SamplingParams(temperature=1.0, seed=5))
    np.random.seed(1)
    assert draws(SamplingParams(temperature=1.0, seed=5)) == first
    assert draws(SamplingParams(temperature=1.0, seed=6)) != first


def test_filters_do_not_change_which_token_a_seed_draws_among_all() -> None:
    assert draws(SamplingParams(temperature=1.0, top_k=VOCABULARY)) == draws(SamplingParams(temperature=1.0))


def test_draws_follow_the_distribution_and_never_a_removed_token() -> None:
    logits = np.array([-math.inf, *np.log([0.5, 0.3, 0.2]), -math.inf], np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0))
    counts = Counter(sampler.sample(logits, []) for _ in range(4000))
    assert set(counts) == {1, 2, 3}
    for token, probability in ((1, 0.5), (2, 0.3), (3, 0.2)):
        assert abs(counts[token] / 4000 - probability) < 0.03


def plain_scores(
    logits: np.ndarray, history: list[int], generated: list[int], params: SamplingParams
) -> list[np.float32]:
    """A token after the other, by the formulas: bias, repetition, then presence and frequency."""
    scores = []
    for token_id, score in enumerate(logits):
        score = np.float32(score + np.float32(dict(params.bias).get(token_id, 0)))
        if token_id in history:
            factor = np.float32(params.repetition_penalty)
            score = score * factor if score < 0 else score / factor
        count = generated.count(token_id)
        taken = count * params.frequency_penalty + (1 if count else 0) * params.presence_penalty
        scores.append(score - np.float32(taken))
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_penalties_and_bias_equal_a_plain_reference(seed: int) -> None:
    generator = np.random.default_rng(seed)
    bias = {int(i): float(b) for i, b in zip(generator.integers(0, 30, 5), generator.uniform(-9, 9, 5), strict=True)}
    presence, frequency = generator.uniform(-2, 2, 2).tolist()
    params = SamplingParams(
        repetition_penalty=(1.0, 1.3)[seed % 2],
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias if seed % 3 else tuple(bias.items()),
    )
    sampler, generated, prompt = Sampler(params), list[int](), [3, 3, 7]
    for _ in range(40):
        logits = 2 * generator.standard_normal(30, np.float32)
        before = logits.copy()
        expected = plain_scores(logits, [*prompt, *generated], generated, params)
        generated.append(sampler.sample(logits, [*prompt, *generated]))
        assert generated[-1] == int(np.argmax(expected))
        assert np.array_equal(logits, before)
    assert min(presence, frequency) < 0 or len(set(generated)) > 5


def test_penalties_do_not_count_the_prompt() -> None:
    logits = np.array([1, 1.5, 0], np.float32)
    sampler = Sampler(SamplingParams(presence_penalty=1.0))
    assert [sampler.sample(logits, [1, 1, 1]) for _ in range(3)] == [1, 0, 1]
    sampler = Sampler(SamplingParams(frequency_penalty=0.3))
    assert [sampler.sample(logits, []) for _ in range(5)] == [1, 1, 0, 1, 0]


def test_a_bias_makes_a_token_certain_or_impossible() -> None:
    logits = np.array([1, 3, 2], np.float32)
    assert Sampler(SamplingParams(logit_bias={1: -100})).sample(logits, []) == 2
    sampler = Sampler(SamplingParams(1.0, logit_bias={0: 100}))
    assert {sampler.sample(logits, []) for _ in range(50)} == {0}
    assert SamplingParams(logit_bias={5: 1, 2: -1}) == SamplingParams(logit_bias=[(2, -1), [5, 1.0]])  # type: ignore[arg-type, list-item]
    again = SamplingParams(**json.loads(json.dumps(SamplingParams(0.5, logit_bias={5: 1}).to_json())))
    assert again == SamplingParams(0.5, logit_bias={5: 1}) and hash(again)
    with pytest.raises(DymoeError, match="no token 3; give ids below 3"):
        Sampler(SamplingParams(logit_bias={3: 1})).sample(logits, [])


@pytest.mark.parametrize(
    "bias", [7, None, "ab", {"1": 2}, {-1: 2}, {1: "x"}, {1: 101}, {1: math.nan}, {True: 1}, [(1,)], {2**31: 0}]
)
def test_a_bias_that_is_not_possible_is_refused(bias: object) -> None:
    with pytest.raises(DymoeError, match=r"^logit_bias: give a map of token ids to numbers from -100 to 100$"):
        SamplingParams(logit_bias=bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinite")])
def test_broken_logits_are_an_error(temperature: float, bad: float, word: str) -> None:
    logits = random_logits(0)
    logits[500] = bad
    with pytest.raises(DymoeError, match=f"produced {word} logits.*dymoe-bundle verify"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits, [])


def test_logits_without_any_candidate_are_an_error() -> None:
    with pytest.raises(DymoeError, match="infinite logits"):
        Sampler(SamplingParams(temperature=1.0)).sample(np.full(5, -math.inf, np.float32), [])


@pytest.mark.parametrize(("name", "value", "flag"), [
    ("temperature", -0.1, "--temperature"), ("temperature", math.nan, "--temperature"),
    ("temperature", math.inf, "--temperature"), ("temperature", "hot", "--temperature"),
    ("top_k", -1, "--top-k"), ("top_k", 1.5, "--top-k"), ("top_k", True, "--top-k"),
    ("top_p", 1.01, "--top-p"), ("top_p", math.nan, "--top-p"),
    ("min_p", -0.1, "--min-p"), ("min_p", 1.1, "--min-p"),
    ("repetition_penalty", 0.0, "--repetition-penalty"), ("repetition_penalty", None, "--repetition-penalty"),
    ("seed", -1, "--seed"), ("seed", 2**63, "--seed"), ("seed", 0.5, "--seed"),
])  # fmt: skip
def test_values_out_of_range_name_the_flag_and_the_range(name: str, value: object, flag: str) -> None:
    low, high = LIMITS[name]
    with pytest.raises(DymoeError, match=f"^{flag} {value}: must be .* from {low} to {high}$"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_of_every_range_sample(end: int) -> None:
    for name, limits in LIMITS.items():
        params = SamplingParams(**{"temperature": 1.0, name: limits[end]})  # type: ignore[arg-type]
        assert 0 <= Sampler(params).sample(random_logits(0), [1, 2]) < VOCABULARY


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 2}], ids=str)
def test_logits_that_a_temperature_makes_infinite_are_an_error(filters: dict[str, float]) -> None:
    params = SamplingParams(1e-4, **filters)  # type: ignore[arg-type]
    with warnings.catch_warnings(), pytest.raises(DymoeError, match="infinite logits"):
        warnings.simplefilter("error")
        Sampler(params).sample(np.array([1e36, 9e35, 1], np.float32), [])
