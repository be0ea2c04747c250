"""Compiling: bundles of every family and shape, reproducible, good enough for the device or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compile_kit import assert_codes_nest, assert_findings_fit, same_files, without_stages
from helpers import EIGHT_BITS, assert_one_sentence, bundle_cli, compile_cli, run_cli, save_tiny
from safetensors.torch import load_file, save_file

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.routing import Routing
from dymoe_runtime.model.tier_rule import TierRule


@pytest.mark.parametrize("family", ("mixtral", "olmoe", "qwen3_moe"))  # tests/families has the others
def test_a_family_compiles_and_runs(family: str, tmp_path: Path, calibration_text: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    bundle = tmp_path / "out.dymoe"
    assert compile_cli(model, "-o", bundle, "--calibration", calibration_text).code == 0
    assert bundle_cli("verify", bundle).code == 0
    outcome = run_cli(bundle, "--prompt", "Hello there", "--max-tokens", 4, "--ignore-eos", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["new_tokens"] == 3


ODD_SHAPES = [
    ("qwen3_moe", {"mlp_only_layers": [0], "tie_word_embeddings": True}, "2,3,4"),
    ("qwen3_moe", {"hidden_size": 72, "moe_intermediate_size": 130, "attention_bias": True}, "2,4"),
    ("olmoe", {"hidden_size": 64, "num_experts": 9, "num_experts_per_tok": 9}, "3"),
    ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 48}, "2,3,4,8"),
    ("mixtral", {"num_hidden_layers": 1, "intermediate_size": 8}, "3,5"),
]


@pytest.mark.parametrize(("family", "changes", "tiers"), ODD_SHAPES)
def test_odd_shapes_and_ladders(family: str, changes: dict, tiers: str, tmp_path: Path, calibration_text: Path) -> None:
    model = save_tiny(tmp_path / "model", family, **changes)
    bundle = tmp_path / "out.dymoe"
    outcome = compile_cli(model, "-o", bundle, "--tiers", tiers, "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    assert_codes_nest(Bundle.open(bundle))
    assert_findings_fit(bundle)
    for extra in ([], ["--no-dynamic"], ["--arena", "1MB"], ["--tiers", tiers[-1]]):
        outcome = run_cli(bundle, "--prompt", "Some text to go on from.", "--max-tokens", 6, "--ignore-eos", *extra)
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(("matrix", "factor"), [("up_proj", 100), ("down_proj", 1000)])
def test_an_expert_with_enormous_weights_spoils_no_other(
    matrix: str, factor: float, tmp_path: Path, calibration_text: Path
) -> None:
    """Three weights of one expert far out of range: it is measured as what it is, and lower tiers that ruin it are
    left to uniform points only."""
    shape = {"hidden_size": 192, "moe_intermediate_size": 128, "num_hidden_layers": 2, "num_experts": 4}
    model = save_tiny(tmp_path / "model", "qwen3_moe", **shape)
    file = model / "model.safetensors"
    tensors = load_file(file)
    chosen = torch.randperm(192 * 128, generator=torch.Generator().manual_seed(0))[:3]
    tensors[f"model.layers.1.mlp.experts.1.{matrix}.weight"].view(-1)[chosen] *= factor
    save_file(tensors, file, {"format": "pt"})
    path = tmp_path / "out.dymoe"
    outcome = compile_cli(model, "-o", path, "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    assert_findings_fit(path)
    policy = Bundle.open(path).policy
    errors = policy.layers[1].expert_error
    assert all(math.isfinite(error) for row in errors.values() for error in row)
    for tier, bound in (("2", 0.3), ("3", 0.1), ("4", 0.03)):
        assert all(error < bound for expert, error in enumerate(errors[tier]) if expert != 1)
        assert all(error < bound for error in policy.layers[0].expert_error[tier])
    assert policy.layers[0].pinned == () and policy.layers[1].pinned in ((), (1,))
    # Not pinned only if it is not ruined or the highest tier is hardly better.
    ruined = errors["2"][1] > 0.5 and errors["4"][1] < errors["2"][1] / 2
    assert (policy.layers[1].pinned == (1,)) == ruined
    for point in policy.points:
        routing = Routing(np.array([[0, 1]]), np.array([[0.9, 0.1]], np.float32), np.zeros((1, 1), np.float32))
        tier = TierRule.of(point, policy).choose(1, routing)[0, 1].item()
        assert tier == 4 or not ruined or point.kind == "uniform"


def test_an_expert_whose_errors_have_no_size_is_named(tmp_path: Path, calibration_text: Path) -> None:
    """Its output is finite, and the square of it is not."""
    model = save_tiny(tmp_path / "model", "olmoe", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    down = next(name for name in tensors if "experts" in name and "down" in name)
    save_file({**tensors, down: tensors[down] * 1e25}, model / "model.safetensors", {"format": "pt"})
    outcome = compile_cli(model, "-o", tmp_path / "out", "--calibration", calibration_text)
    assert_one_sentence(without_stages(outcome), "expert 0.", "not finite", "copy the checkpoint again")
    assert not (tmp_path / "out").exists()


def test_the_same_input_gives_the_same_bytes(
    tiny_checkpoint: Path, tiny_path: Path, calibration_text: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.dymoe"
    assert compile_cli(tiny_checkpoint, "-o", again, "--calibration", calibration_text, *EIGHT_BITS).code == 0
    assert same_files(tiny_path, again)


def test_what_is_up_to_date_is_left_alone(tiny_checkpoint: Path, damaged: Path, calibration_text: Path) -> None:
    args = (tiny_checkpoint, "-o", damaged, "--calibration", calibration_text, *EIGHT_BITS)
    before = (damaged / "manifest.json").stat().st_ino
    assert "up to date" in compile_cli(*args).out
    assert (damaged / "manifest.json").stat().st_ino == before
    assert compile_cli(*args, "--fresh", "--json").json["changed"]
    assert (damaged / "manifest.json").stat().st_ino != before


@pytest.mark.parametrize("change", [("--seed", 1), ("--tiers", "2,4"), ("--dense-bits", 6)])
def test_a_change_of_options_recompiles(
    change: tuple, tiny_checkpoint: Path, damaged: Path, calibration_text: Path
) -> None:
    args = ("-o", damaged, "--calibration", calibration_text, *EIGHT_BITS)
    outcome = compile_cli(tiny_checkpoint, *args, *change, "--json")
    assert outcome.code == 0 and outcome.json["changed"]
    assert bundle_cli("verify", damaged).code == 0


@pytest.mark.parametrize("name", ["policy.json", "compile.json", "report.html"])
def test_a_damaged_bundle_is_compiled_again(
    name: str, tiny_checkpoint: Path, damaged: Path, calibration_text: Path
) -> None:
    (damaged / name).write_text("{}")
    args = (tiny_checkpoint, "-o", damaged, "--calibration", calibration_text, *EIGHT_BITS, "--json")
    assert compile_cli(*args).json["changed"]
    assert bundle_cli("verify", damaged).code == 0


def test_a_quality_gate_that_is_not_met_exits_with_3(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    outcome = compile_cli(*args, "--max-kl", 1e-9, "--json")
    assert_one_sentence(without_stages(outcome), "KL", "1e-09", "out.dymoe.failed", code=3)
    assert outcome.json["changed"] is False and "1e-09" in outcome.json["failed"]
    left = tmp_path / "out.dymoe.failed"
    assert not (tmp_path / "out.dymoe").exists()
    assert sorted(path.name for path in left.iterdir()) == ["compile.json", "report.html"]
    points = json.loads((left / "compile.json").read_text(encoding="utf-8"))["points"]
    assert points and all(point["kl"] > 1e-9 for point in points)
    assert compile_cli(*args, "--max-kl", 10).code == 0
    assert not left.exists()


def test_a_device_that_cannot_hold_the_bundle_exits_with_4(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "watch.toml"
    profile.write_text(
        'name = "watch"\nladder = [2, 4]\ndense_bits = 8\nmemory = "64MiB"\ndisk_bandwidth = "1MB/s"\nthreads = 1\n'
    )
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text, "--profile", profile)
    outcome = compile_cli(*args)
    assert_one_sentence(outcome, "watch", "64.0 MiB", code=4)  # before any stage
    assert not (tmp_path / "out.dymoe.failed").exists()


def test_a_bundle_says_what_rounded_its_sums(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> None:
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text, "--jobs", 1, "--json")
    args = (*args, *EIGHT_BITS)
    built = compile_cli(*args).json["provenance"]["built_with"]
    assert built["instruction_set"] == load_kernels().name and built["threads"] == 1
    assert set(built) == {"instruction_set", "torch_instruction_set", "machine", "threads", "python", "numpy", "torch"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYMOE_ISA", "numpy")
        assert not compile_cli(*args).json["changed"]  # it stays good
        again = compile_cli(*args, "--fresh").json["provenance"]
    assert again["built_with"] == {**built, "instruction_set": "numpy"}


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("", "empty.txt", ("empty.txt", "empty")),
        ("too short", "short.txt", ("tokens", "--calibration")),
        ('{"no": "text"}\n', "bad.jsonl", ("bad.jsonl", "line 1", "text")),
        ("not json\n", "bad.jsonl", ("bad.jsonl", "line 1")),
        ('{"text": 5}\n', "bad.jsonl", ("bad.jsonl", "line 1")),
        (None, "missing.txt", ("missing.txt", "no such file")),
    ],
)
def test_bad_calibration_text_gets_one_sentence(
    content: str | None, name: str, words: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert_one_sentence(compile_cli(tiny_checkpoint, "-o", tmp_path / "o.dymoe", "--calibration", path), *words)


def test_calibration_takes_several_files_and_jsonl(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    parts = calibration_text.read_text(encoding="utf-8").split(".")
    # U+2028 may stand in JSON text and ends no line.
    lines = [json.dumps({"text": part + "\u2028"}, ensure_ascii=False) for part in parts]
    jsonl = tmp_path / "text.jsonl"
    jsonl.write_text("\n".join(lines), encoding="utf-8")
    outcome = compile_cli(
        tiny_checkpoint,
        "-o",
        tmp_path / "o.dymoe",
        "--calibration",
        calibration_text,
        jsonl,
        "--tiers",
        "2,4",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["provenance"]["ladder"] == [2, 4]
