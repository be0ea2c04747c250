"""What is expected before anything was used decides what is read first and what may leave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_one_sentence, run_cli

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.eviction import Eviction
from dymoe_runtime.store.warm_up import (
    expected_uses,
    loss_without,
    make_eviction,
    preload_order,
    read_warm_set,
    shares_of_segments,
)

PROMPT = ("--prompt", "The river flows through the town of", "--max-tokens", 24, "--ignore-eos", "--json")


def test_what_is_used_most_is_read_first_as_far_as_it_fits(shipped: Bundle) -> None:
    uses, tier = expected_uses(shipped), shipped.layout.ladder[-1]
    record = sum(shipped.layout.segment_spans)
    requests = preload_order(shipped, uses, tier, 20 * record)
    assert 17 <= len(requests) <= 19 and [request.key for request in requests] == sorted(
        request.key for request in requests
    )
    assert sum(request.tier < tier for request in requests) <= 1  # the last that fits
    inside = {request.key for request in requests}
    left = [uses[key] for key in np.ndindex(*uses.shape) if ExpertKey(*key) not in inside]
    assert min(uses[key] for key in inside) >= max(left)
    everything = preload_order(shipped, uses, tier, 1 << 40)
    assert len(everything) == (uses > 0).sum()


def test_refinement_planes_are_read_as_far_as_the_point_uses_them(shipped: Bundle) -> None:
    uses, (low, *_, high) = expected_uses(shipped), shipped.layout.ladder
    assert {request.tier for request in preload_order(shipped, uses, low, 1 << 40)} == {low}
    assert {request.tier for request in preload_order(shipped, uses, high, 1 << 40)} == {high}
    some = preload_order(shipped, uses, low + 0.5, shipped.expert_bytes() // 2)
    refined = [uses[request.key] for request in some if request.tier > low]
    assert min(refined) > max(uses[request.key] for request in some if request.tier == low)
    everything = preload_order(shipped, uses, low + 0.5, 1 << 40)  # some of its uses have the highest tier
    assert {request.tier for request in everything} == {high}


@pytest.mark.parametrize(
    ("bits", "shares"),
    [(2, [1, 0, 0]), (2.5, [1, 0.375, 0.125]), (3, [1, 1, 0]), (3.5, [1, 0.875, 0.625]), (4, [1, 1, 1])],
)
def test_shares_of_segments(bits: float, shares: list[float]) -> None:
    assert shares_of_segments((2, 3, 4), bits) == shares


def test_losses_are_larger_where_layers_hurt_more_and_reads_are_small(shipped: Bundle) -> None:
    loss, spans = loss_without(shipped), shipped.layout.segment_spans
    assert loss.shape == (*expected_uses(shipped).shape, len(spans)) and (loss > 0).all()
    assert (loss[:, :, 0] >= loss[:, :, 1]).all()  # without its base plane an expert is nothing
    hurt = [layer.sensitivity[str(shipped.layout.ladder[0])] for layer in shipped.policy.layers]
    assert loss[:, 0, 0].argmax() == int(np.argmax(hurt))


def test_a_model_that_preloads_finds_its_experts(shipped: Bundle) -> None:
    answers, hits = [], []
    for preload in (False, True):
        options = RunOptions(
            tier=4, context=128, arena_bytes=shipped.expert_bytes() // 2, preload=preload, prefetch=False
        )
        with load_model(shipped, options) as model:
            model.store.drain()
            answers.append(model.prefill(list(range(3))))
            assert (model.store.stats.background_bytes > 0) == preload
            hits.append(model.store.stats.hits / model.store.stats.requests)
    assert np.array_equal(answers[0], answers[1])
    assert hits[1] > hits[0] + 0.2


def test_a_warm_set_holds_what_was_used(shipped: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "warm.json"
    arena = ("--arena", shipped.expert_bytes() // 3)
    first = run_cli(shipped.path, *PROMPT, *arena, "--warm-set", path).json
    uses = read_warm_set(path, shipped)
    assert uses is not None and uses.max() <= 1 and not np.array_equal(uses, expected_uses(shipped))
    second = run_cli(shipped.path, *PROMPT, *arena, "--warm-set", path).json
    assert second["text"] == first["text"] and second["read_bytes"] != first["read_bytes"]
    assert not list(tmp_path.glob("*.partial"))
    kept = path.read_bytes()
    assert run_cli(shipped.path, *PROMPT, "--warm-set", path).code == 0  # all fits: nothing is learnt, nothing lost
    assert path.read_bytes() == kept


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"uses": 3}', '{"uses": [[1, 2]]}', '{"uses": "a"}'])
def test_what_is_no_warm_set_is_refused(text: str, shipped_path: Path, tmp_path: Path) -> None:
    (tmp_path / "warm.json").write_text(text)
    outcome = run_cli(shipped_path, *PROMPT, "--warm-set", tmp_path / "warm.json")
    assert_one_sentence(outcome, "warm.json", "delete it")
    assert (tmp_path / "warm.json").read_text() == text


def test_a_warm_set_of_numbers_that_are_none_is_refused(shipped: Bundle, tmp_path: Path) -> None:
    uses = expected_uses(shipped)
    uses[0, 0] = np.nan
    (tmp_path / "warm.json").write_text(json.dumps({"uses": uses.tolist()}))
    assert_one_sentence(run_cli(shipped.path, *PROMPT, "--warm-set", tmp_path / "warm.json"), "delete it")


def test_a_policy_by_layer_lets_each_layer_have_its_share(shipped: Bundle) -> None:
    for name, layer in (("global", 1), ("per-layer", 0)):
        eviction = make_eviction(shipped, eviction=name)
        for expert in range(4):
            for place, tokens in ((0, 9), (1, 1)):
                eviction.use(ExpertKey(place, expert), 1, 10_000 * tokens)
                eviction.offer(ExpertKey(place, expert), 0)
        victim = eviction.cheapest((), 0)
        assert victim is not None and victim.layer == layer


def test_a_warm_set_that_cannot_be_written_is_refused_at_once(shipped_path: Path, tmp_path: Path) -> None:
    outcome = run_cli(shipped_path, *PROMPT, "--warm-set", tmp_path / "none" / "warm.json")
    assert_one_sentence(outcome, "warm.json", "--warm-set")
    assert not outcome.out


def test_rates_are_uses_per_token() -> None:
    eviction = Eviction((1, 4), 1, prior=np.full((1, 4), 0.5), prior_tokens=20)
    for token in range(400):
        eviction.use(ExpertKey(0, 0), 1)
        if token % 10 == 0:
            eviction.use(ExpertKey(0, 1), 1)
        eviction.tick()
    assert eviction.rates()[0] == pytest.approx([1.0, 0.1, 0.0, 0.0], abs=0.03)
    eviction.tick(100_000)
    assert np.isfinite(eviction.rates()).all()
