"""Bundles with fewer tiers: the same weights, the points that are left, and refusals."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_one_sentence, bundle_cli, run_cli

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.bundle.tiers import (
    MXFP4,
    TRELLIS,
    QuantizedMatrix,
    dequantize,
    make_layout,
    pack_record,
    split_record,
    vector_of,
    widen_bf16,
)
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tools.shipping.slim import narrowed

SHAPES = {"gate": (5, 130), "down": (64, 70)}


def random_record(ladder: tuple[int, ...], grid: str) -> np.ndarray:
    layout, rng = make_layout(SHAPES, ladder, vectors={"bias": 5}, grid=grid), np.random.default_rng(1)
    matrices = {}
    for name, where in layout.matrices.items():
        shape = where.rows, where.scales
        shared = rng.integers(0, 15, shape, np.uint8)
        indices = {tier: shared if grid == MXFP4 else rng.integers(0, 15, shape, np.uint8) for tier in ladder}
        multiplier = widen_bf16(rng.integers(0x3C00, 0x4000, where.rows, np.uint16))
        codes = rng.integers(0, 2 ** ladder[-1], (where.rows, where.cols), np.uint8)
        matrices[name] = QuantizedMatrix(codes, indices, multiplier)
    return pack_record(layout, matrices, {"bias": rng.standard_normal(5).astype(np.float32)})


@pytest.mark.parametrize(
    ("ladder", "grid"),
    [((2, 3, 4), ""), ((2, 3, 4), MXFP4), ((3, 5, 6, 8), ""), ((2, 4), ""), ((2, 3, 4, 6), TRELLIS)],
    ids=str,
)
def test_records_keep_the_weights_of_the_tiers_that_stay(ladder: tuple[int, ...], grid: str) -> None:
    old, record = make_layout(SHAPES, ladder, vectors={"bias": 5}, grid=grid), random_record(ladder, grid)
    segments = split_record(old, record)
    for count in range(1, len(ladder)):
        for tiers in itertools.combinations(ladder, count):
            if not grid and ladder[-1] > 4 >= tiers[-1]:
                continue
            new = make_layout(SHAPES, tiers, vectors={"bias": 5}, grid=grid)
            kept = split_record(new, narrowed(old, segments, new))
            np.testing.assert_array_equal(
                vector_of(kept, new.vectors["bias"]), vector_of(segments, old.vectors["bias"])
            )
            for tier, name in itertools.product(tiers, SHAPES):
                np.testing.assert_array_equal(
                    dequantize(kept, new.matrices[name], tier), dequantize(segments, old.matrices[name], tier)
                )


@pytest.mark.parametrize("tiers", ["2", "2,3", "3,4", "4,2"])
def test_a_slim_bundle_has_the_same_weights_and_runs_the_same(tiny_path: Path, tmp_path: Path, tiers: str) -> None:
    outcome = bundle_cli("slim", tiny_path, "-o", tmp_path / "s", "--tiers", tiers)
    assert outcome.code == 0 and "are left out" in outcome.err
    assert bundle_cli("verify", tmp_path / "s").code == 0
    old, new = Bundle.open(tiny_path), Bundle.open(tmp_path / "s")
    assert new.layout.ladder == tuple(sorted(map(int, tiers.split(",")))) and new.total_bytes() < old.total_bytes()
    key = ExpertKey(2, 3)
    for tier, name in itertools.product(new.layout.ladder, old.layout.matrices):
        np.testing.assert_array_equal(
            dequantize(read_record(new, key), new.layout.matrices[name], tier),
            dequantize(read_record(old, key), old.layout.matrices[name], tier),
        )
    for point in new.policy.points:
        run = ("--prompt", "The river", "--greedy", "--max-tokens", 8, "--point", point.name)
        answers = [run_cli(path, *run) for path in (tmp_path / "s", tiny_path)]
        assert answers[0].code == 0 and answers[0].out == answers[1].out


def test_points_are_those_that_need_no_other_tier(tiny_path: Path, tmp_path: Path) -> None:
    bundle_cli("slim", tiny_path, "-o", tmp_path / "s", "--tiers", "2,3")
    old, new = Bundle.open(tiny_path).policy, Bundle.open(tmp_path / "s").policy
    kept = {point.name for point in new.points}
    assert {"uniform-2", "uniform-3"} <= kept and new.default_point in kept
    for point in old.points:
        uses_highest = any(row[0] > 0 for rows in (point.decode, point.prefill) for row in rows)
        assert (point.name in kept) == (not uses_highest)


@pytest.mark.parametrize(
    ("tiers", "message"), [("5", "no tier 5"), ("2,3,4", "nothing to leave out"), ("x", "whole numbers"), ("", "whole")]
)
def test_tiers_that_cannot_be_kept_are_refused(tiny_path: Path, tmp_path: Path, tiers: str, message: str) -> None:
    assert_one_sentence(bundle_cli("slim", tiny_path, "-o", tmp_path / "s", "--tiers", tiers), message)
    assert os.listdir(tmp_path) == []


def test_a_damaged_bundle_is_not_made_slim(damaged: Path, tmp_path: Path) -> None:
    path = damaged / "experts-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert_one_sentence(bundle_cli("slim", damaged, "-o", tmp_path / "s", "--tiers", "2"), "checksum mismatch")
    assert os.listdir(tmp_path) == ["damaged.dymoe"]


def test_the_difference_between_bundles_is_told(tiny_path: Path, tmp_path: Path) -> None:
    bundle_cli("slim", tiny_path, "-o", tmp_path / "s", "--tiers", "2,3")
    same = bundle_cli("diff", tiny_path, tiny_path, "--exit-code")
    assert same.code == 0 and "are the same" in same.out
    assert bundle_cli("diff", tiny_path, tmp_path / "s", "--exit-code").code == 3
    told = bundle_cli("diff", tiny_path, tmp_path / "s")
    assert told.code == 0 and "[2, 3, 4] -> [2, 3]" in told.out and "18 differ, the first is 0.0" in told.out
    values = bundle_cli("diff", tiny_path, tmp_path / "s", "--json").json
    assert not values["same"] and {d["kind"] for d in values["differences"]} >= {"digest", "options", "sizes", "points"}
