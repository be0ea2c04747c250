"""The cost model, what it is asked for, and the probe."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import run_cli

from dymoe_runtime import cost, probe
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.cost import CostModel
from dymoe_runtime.model import Model
from dymoe_runtime.options import RunOptions
from dymoe_runtime.probe import expected_hits
from dymoe_runtime.tiers import make_layout


def test_costs_between_the_measured_are_interpolated() -> None:
    model = CostModel((1, 4, 8), 5.0, {2: (1.0, 2.5, 4.0), 4: (2.0, 5.0, 9.0)})
    assert [model.expert(2, n) for n in (1, 2, 4, 6, 8, 16)] == pytest.approx([1.0, 1.5, 2.5, 3.25, 4.0, 7.0])
    assert model.layer([(2, 1), (4, 8)]) == pytest.approx(5.0 + 1.0 + 9.0)
    assert model.layer([]) == 5.0


def test_one_measured_count_is_enough_to_decode() -> None:
    model = CostModel((1,), 0.0, {2: (3.0,)})
    assert model.expert(2, 1) == 3.0 and model.expert(2, 4) == 12.0


@pytest.mark.parametrize("records", [1, 3, 40])
def test_measuring_takes_what_memory_it_is_given(records: int) -> None:
    layout = make_layout({"gate": (64, 128), "up": (64, 128), "down": (128, 64)}, (2, 3, 4))
    memory = np.zeros(records * sum(layout.segment_spans) + 7, np.uint8)
    model = cost.measure(layout, 4, 16, memory, counts=(1, 2, 32))
    assert model.counts == (1, 2, 32) and set(model.expert_s) == {2, 3, 4}
    assert all(len(times) == 3 for times in model.expert_s.values()) and model.call_s >= 0
    # Thirty-two tokens take longer than one on any machine.
    assert all(times[2] > times[0] for times in model.expert_s.values())
    used = min(records, 16) * sum(layout.segment_spans)
    assert (memory[:used] == cost.FILLER).all() and (memory[used:] == 0).all()


@pytest.mark.parametrize(("sweep_records", "used"), [(0.5, 1), (3.5, 3), (40, 5)])
def test_measuring_goes_through_as_much_memory_as_it_is_told(sweep_records: float, used: int) -> None:
    layout = make_layout({"gate": (64, 128), "up": (64, 128), "down": (128, 64)}, (2, 3, 4))
    size = sum(layout.segment_spans)
    memory = np.zeros(5 * size, np.uint8)
    cost.measure(layout, 4, 16, memory, counts=(1,), sweep_bytes=int(sweep_records * size))
    assert (memory[: used * size] == cost.FILLER).all() and (memory[used * size :] == 0).all()


def test_a_probe_tells_costs_and_expectations(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--probe", "--json")
    assert outcome.code == 0, outcome.err
    bundle = Bundle.open(shipped_path)
    assert set(outcome.json["cost"]["expert_us"]) == {"2", "3", "4"}
    assert outcome.json["disk_bytes_per_s"] > 0 and outcome.json["dense_ms"] > 0
    assert [p["name"] for p in outcome.json["points"]] == [p.name for p in bundle.policy.points]
    assert all(p["read_bytes_per_token"] == 0 for p in outcome.json["points"])  # everything fits
    assert "tokens/s" in run_cli(shipped_path, "--probe").out
    assert run_cli(shipped_path, "--probe", "--bench").code == 2


def test_expected_hits_rise_with_memory(shipped_path: Path) -> None:
    bundle = Bundle.open(shipped_path)
    point = bundle.policy.point("uniform-4")
    shares = []
    for share in (0.1, 0.3, 0.9):
        arena = max(int(share * bundle.expert_bytes()), 2 << 20)
        with Model(bundle, RunOptions(arena_bytes=arena, context=16, look_ahead=False)) as model:
            shares.append(expected_hits(model, point))
    assert 0 < shares[0] < shares[1] < shares[2] <= 1


@pytest.mark.parametrize(("missed", "read_s"), [(0.0, 1.0), (1.0, 0.5), (0.3, 0.2), (0.3, 3.0)])
def test_waiting_is_the_mean_over_what_may_be_missing(missed: float, read_s: float) -> None:
    expected = 0.0
    for there in itertools.product((False, True), repeat=4):
        chance = math.prod((1 - missed) if found else missed for found in there)
        expected += chance * max(0.0, (4 - sum(there)) * read_s - sum(there) * 0.4)
    assert probe.waiting_seconds(4, missed, read_s, 0.4) == pytest.approx(expected)


def test_a_model_that_does_not_fit_knows_its_costs_before_it_reads(shipped_path: Path) -> None:
    bundle = Bundle.open(shipped_path)
    for arena, known in ((2 << 20, True), (1 << 30, False)):
        with Model(bundle, RunOptions(arena_bytes=arena, context=16)) as model:
            assert (model.experts.cost is not None) == known
            model.prefill([1, 2, 3])


def test_the_time_between_layers_is_that_of_single_tokens(shipped_path: Path) -> None:
    with Model(Bundle.open(shipped_path), RunOptions(arena_bytes=2 << 20, context=16)) as model:
        for tokens in ([1, 2, 3], [4, 5]):
            model.prefill(tokens)
            model._trial.on = True  # as it is after some tokens
            started = time.perf_counter()
            model.decode(6)
            assert 0 < model.experts._between_s < time.perf_counter() - started


def test_a_time_per_token_picks_the_best_point_that_makes_it(
    shipped_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a point takes as many milliseconds as it has bits."""
    monkeypatch.setattr(probe, "predict", lambda model, point, *_: {"tpot_ms": point.bits_mean})
    tail = ("--prompt", "def", "--max-tokens", 3, "--ignore-eos", "--json")
    policy = Bundle.open(shipped_path).policy
    best = min(policy.points, key=lambda point: point.kl).name
    assert run_cli(shipped_path, "--tpot", "10s", *tail).json["point"] == best
    smallest = min(policy.points, key=lambda point: (point.bits_mean, point.kl)).name
    assert run_cli(shipped_path, "--tpot", "1ms", *tail).json["point"] == smallest
    middle = policy.point(run_cli(shipped_path, "--tpot", "3.1ms", *tail).json["point"])
    assert middle.kl == min(point.kl for point in policy.points if point.bits_mean <= 3.1)
    for wrong in ("fast", "0ms", "-1ms", "100"):
        assert run_cli(shipped_path, "--tpot", wrong, *tail).code == 2
    for clash in (("--point", 3), ("--no-depth",), ("--no-dynamic",), ("--quality", 1)):
        assert run_cli(shipped_path, "--tpot", "1s", *clash, *tail).code == 2


def test_a_quality_picks_the_smallest_point_that_has_it(shipped_path: Path) -> None:
    tail = ("--prompt", "def", "--max-tokens", 3, "--ignore-eos", "--json")
    policy = Bundle.open(shipped_path).policy
    smallest = min(policy.points, key=lambda point: point.bytes_per_token)
    assert run_cli(shipped_path, "--quality", smallest.kl, *tail).json["point"] == smallest.name
    chosen = policy.point(run_cli(shipped_path, "--quality", 0.01, *tail).json["point"])
    assert chosen.kl <= 0.01 and not [p for p in policy.points if p.kl <= 0.01 and p.bits_mean < chosen.bits_mean - 0.1]
    outcome = run_cli(shipped_path, "--quality", 1e-9, *tail)
    assert outcome.code == 1 and "allow as much" in outcome.err and outcome.err.count("\n") == 1


def test_look_ahead_rests_where_the_trial_says_so(shipped_path: Path) -> None:
    bundle = Bundle.open(shipped_path)
    options = RunOptions(arena_bytes=bundle.expert_bytes() // 2, context=64, tier=4)
    for on in (True, False):
        with Model(bundle, options) as model:
            model.prefill([1, 2, 3])
            model.reset_stats()
            model._trial.on, model._trial._left = on, 1000
            for token in range(20, 50):
                model.decode(token)
            assert (model.store.stats.look_ahead_reads > 0) == on
