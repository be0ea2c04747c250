"""A probe measures the machine, and points are chosen by what it predicts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from helpers import run_cli

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.tools import probe
from dymoe_runtime.tools.probe import expected_hits


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
        with load_model(bundle, RunOptions(arena_bytes=arena, context=16, prefetch=False)) as model:
            shares.append(expected_hits(model, point))
    assert 0 < shares[0] < shares[1] < shares[2] <= 1


@pytest.mark.parametrize(("missed", "read_s"), [(0.0, 1.0), (1.0, 0.5), (0.3, 0.2), (0.3, 3.0)])
def test_waiting_is_the_mean_over_what_may_be_missing(missed: float, read_s: float) -> None:
    expected = 0.0
    for there in itertools.product((False, True), repeat=4):
        chance = math.prod((1 - missed) if found else missed for found in there)
        expected += chance * max(0.0, (4 - sum(there)) * read_s - sum(there) * 0.4)
    assert probe.waiting_seconds(4, missed, read_s, 0.4) == pytest.approx(expected)


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
