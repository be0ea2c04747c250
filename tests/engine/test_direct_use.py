"""Resident experts that compiled code uses without asking for them change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import compile_cli, save_tiny

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.experts import StoredExperts
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.routing import Routing
from dymoe_runtime.model.tier_rule import ALWAYS, TierRule

pytestmark = pytest.mark.skipif(load_kernels().compiled_isa is None, reason="compiled kernels are missing")


@pytest.mark.parametrize("share", [0.3, 0.7, 1.1])
@pytest.mark.parametrize("setting", [{"point": "3"}, {"tier": 2}, {"point": "2.25"}], ids=str)
def test_experts_that_need_not_be_asked_for_change_nothing(
    setting: dict, share: float, shipped: Bundle, tmp_path: Path
) -> None:
    """A trace has every layer asked for; without it the same comes out, and the same is counted."""
    found = []
    for trace in (None, tmp_path / "trace.jsonl"):
        arena = int(shipped.expert_bytes() * share)
        options = RunOptions(context=128, arena_bytes=arena, prefetch=False, preload=False, trace=trace, **setting)
        with load_model(shipped, options) as model:
            logits, asked = decode_some(model, 100)
            stats, told = model.store.stats, model.statistics()
            stats.wait_s = 0.0
            model.store.check()
            shares, tiers = told["tier_shares"], told["last_token_tiers"]
            assert [told["expert_requests"], told["expert_hits"]] == [stats.requests, stats.hits]
            found.append((logits, stats, shares, tiers, model.store.resident(), model.store.rates(), asked))
    (first, *counts, rates, few), (second, *other, same_rates, many) = found
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert counts == other
    assert tiers == tiers_of_last_pass(tmp_path / "trace.jsonl")
    assert many == 100 * len(shipped.spec.moe_layers) and few < many and (share < 1 or few < 0.5 * many)
    if share < 1:  # else uses are only counted should memory become short
        assert np.allclose(rates, same_rates) and rates.max() > 0


def tiers_of_last_pass(trace: Path) -> dict[str, list[int]]:
    *lines, last = (json.loads(line) for line in trace.read_text().splitlines())
    of_layers = [line for line in lines if line["pass"] == last["pass"]]
    return {str(line["layer"]): [tier for _, tier, _ in line["wants"]] for line in of_layers}


def decode_some(model: Model, tokens: int, change: Callable[[int], None] = lambda token: None) -> tuple[list, int]:
    """Return logits of the likeliest tokens, one after another, and how many layers had their experts asked for."""
    asked = 0

    def note(experts: StoredExperts, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        nonlocal asked
        asked += 1
        return decode(experts, layer, h, routing)

    decode = StoredExperts.decode
    logits = [np.eye(1, model.spec.vocab_size, 3, np.float32)[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredExperts, "decode", note)
        for token in range(tokens):
            change(token)
            logits.append(model.decode(int(logits[-1].argmax())))
    return logits, asked


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_rule_that_changes_holds_for_experts_that_are_not_asked_for(
    prefetch: bool, shipped: Bundle, tmp_path: Path
) -> None:
    """And one that skips experts; whether others are prefetched changes nothing."""
    found = []
    for trace in (None, tmp_path / "trace.jsonl"):
        arena = int(shipped.expert_bytes() * (0.5 if prefetch else 1.1))
        with load_model(shipped, RunOptions(arena_bytes=arena, prefetch=prefetch, preload=False, trace=trace)) as model:
            layers = shipped.spec.num_layers
            skips = TierRule(model.rule.ladder, ((0.3, 0.5, 0.8),) * layers, ((ALWAYS,) * 3,) * layers)
            rules = [model.rule, skips, TierRule.uniform(3, model.rule.ladder, layers), skips]

            def change(token: int, model: Model = model, rules: list[TierRule] = rules) -> None:
                model.use("a rule", rules[token // 30])

            logits, asked = decode_some(model, 120, change)
            found.append((logits, model.statistics()["tier_shares"], asked))
    assert all(np.array_equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1] and {"0", "3"} <= found[0][1].keys()
    assert found[0][2] < found[1][2] == 120 * len(shipped.spec.moe_layers)


@pytest.mark.parametrize("dense", [[0], [1], [2], [0, 2]], ids=str)
def test_dense_layers_stand_between_experts_that_are_not_asked_for(
    dense: list[int], tmp_path: Path, calibration_text: Path
) -> None:
    save_tiny(tmp_path / "model", "qwen3_moe", num_hidden_layers=3, mlp_only_layers=dense)
    outcome = compile_cli(tmp_path / "model", "-o", tmp_path / "bundle", "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    bundle, found = Bundle.open(tmp_path / "bundle"), []
    for trace in (None, tmp_path / "trace.jsonl"):
        with load_model(bundle, RunOptions(trace=trace, preload=False)) as model:
            found.append(decode_some(model, 20))
    assert all(np.array_equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] < found[1][1] == 20 * (3 - len(dense))


def test_decisions_hold_for_experts_in_memory(shipped: Bundle, tmp_path: Path) -> None:
    """Whatever the rule would have chosen, and also where no trace is written."""
    traces = [tmp_path / f"{number}.jsonl" for number in range(3)]
    ids, found = [token % 90 + 3 for token in range(60)], []
    for trace, decisions in ((traces[0], None), (None, traces[1]), (traces[2], traces[1])):
        options = RunOptions(point="3", prefetch=False, trace=trace, decisions=decisions)
        with load_model(shipped, options) as model:
            assert [model.decode(token) for token in ids]  # for all that the rule chooses to be in memory
            model.reset()
            model.reset_stats()
            logits = [model.decode(token) for token in ids]
            found.append((logits, model.statistics()["tier_shares"]))
        if decisions is None:
            lines = [json.loads(line) for line in traces[0].read_text().splitlines()]
            for line in lines:  # of the last layer, so that no layer after it routes otherwise
                if line["pass"] >= len(ids) and line.get("layer") == shipped.spec.num_layers - 1:
                    line["wants"] = [[expert, 2, tokens] for expert, _, tokens in line["wants"]]
            traces[1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert all(np.array_equal(a, b) for a, b in zip(found[1][0], found[2][0], strict=True))
    assert found[1][1] == found[2][1] != found[0][1]
