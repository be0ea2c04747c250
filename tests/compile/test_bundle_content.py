"""What a compiled bundle holds: records whose tiers nest, read by one direct read, and what was measured."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from compile_kit import assert_codes_nest, assert_findings_fit
from helpers import MODEL, answer, bundle_cli, compile_cli, save_tiny
from safetensors import safe_open

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.bundle.tiers import PAGE, dequantize
from dymoe_runtime.spec import ExpertKey


def test_what_was_measured_is_in_the_bundle(tiny_path: Path) -> None:
    assert_findings_fit(tiny_path)


def test_what_was_measured_of_the_shipped_model_is_in_the_bundle(shipped_path: Path) -> None:
    assert_findings_fit(shipped_path)


def test_no_two_points_have_one_name(shipped: Bundle, tiny_path: Path) -> None:
    for policy in (shipped.policy, Bundle.open(tiny_path).policy):
        names = [point.name for point in policy.points]
        assert len(set(names)) == len(names)


def test_codes_nest_in_the_shipped_bundle(shipped: Bundle) -> None:
    assert_codes_nest(shipped)


def test_records_hold_the_weights(shipped: Bundle) -> None:
    """Each tier of a record is nearer to the original weights than the tier below."""
    checkpoint = Checkpoint.open(MODEL)
    for key in (ExpertKey(0, 0), ExpertKey(3, 7), ExpertKey(5, 15)):
        original = checkpoint.expert(key)
        segments = read_record(shipped, key)
        for name, where in shipped.layout.matrices.items():
            weight = original[name].float().numpy()
            errors = [
                np.square(dequantize(segments, where, t) - weight).sum() / np.square(weight).sum() for t in (2, 3, 4)
            ]
            # More than without calibration: it is outputs that are made near, not weights.
            assert errors[0] < 0.25 and errors[1] < 0.08 and errors[2] < 0.04, errors
            assert errors[0] > 2 * errors[1] > 3 * errors[2], errors


def test_the_error_of_every_expert_falls_with_the_tier(shipped: Bundle) -> None:
    for layer in shipped.policy.layers:
        low, middle, high = (layer.expert_error[tier] for tier in ("2", "3", "4"))
        assert len(low) == shipped.spec.num_experts
        for expert in range(shipped.spec.num_experts):
            assert 0.5 > low[expert] > 2 * middle[expert] > 4 * high[expert] > 0, f"{layer.layer}.{expert}"


def test_record_files_are_page_aligned_safetensors(shipped: Bundle) -> None:
    for layer, entry in shipped.manifest.layers.items():
        path = shipped.path / entry.file
        assert entry.data_start % PAGE == 0 and shipped.layout.record_bytes % PAGE == 0
        with safe_open(path, framework="pt") as file:
            assert len(file.keys()) == shipped.spec.num_experts
            record = file.get_tensor(f"experts.{layer}.3")
        segments = read_record(shipped, ExpertKey(layer, 3))
        assert record.dtype == torch.uint8
        assert np.array_equal(record.numpy(), np.concatenate(segments))


def test_one_direct_read_brings_a_record_prefix(shipped: Bundle) -> None:
    key = ExpertKey(2, 5)
    path, offset = shipped.record_span(key)
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        for tier in shipped.layout.ladder:
            buffer = mmap.mmap(-1, shipped.layout.prefix_bytes(tier))
            try:
                count = os.preadv(fd, [buffer], offset)
            except OSError as error:
                pytest.skip(f"the file system of {path} refuses O_DIRECT: {error}")
            assert count == len(buffer)
            expected = np.concatenate(read_record(shipped, key)[: shipped.layout.segments_of(tier)])
            assert bytes(buffer) == expected.tobytes()
    finally:
        os.close(fd)


def test_a_bundle_has_the_tokens_of_all_files(tmp_path: Path, calibration_text: Path) -> None:
    model, bundle = save_tiny(tmp_path / "model", "qwen3_moe", vocab_size=260), tmp_path / "out.dymoe"
    (model / "added_tokens.json").write_text('{"<|a|>": 256, "<|b|>": 257}')
    outcome = compile_cli(model, "-o", bundle, "--calibration", calibration_text, "--jobs", 1)
    assert outcome.code == 0, outcome.err
    assert answer(bundle, prompt="<|a|>a<|b|>", tokens=1)["prompt_tokens"] == 3
    assert not (bundle / "added_tokens.json").exists()
    assert bundle_cli("verify", bundle).code == 0
