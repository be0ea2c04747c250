"""Compiling: bundles of every family and shape, reproducible, resumable, never half there."""

from __future__ import annotations

import errno
import filecmp
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_sentence, bundle_cli, compile_cli, run_cli, save_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_report import Page

from dymoe_compile.compile import progress_key
from dymoe_compile.families import supported
from dymoe_compile.writer import BundleWriter
from dymoe_runtime.bundle import Bundle, read_manifest
from dymoe_runtime.decoder import Routing
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tiers import PAGE, dequantize, unpack_codes

# Of the files that keep what an interrupted run has done.
SUFFIXES = ("json", "safetensors")


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.mark.parametrize("family", supported())
def test_every_family_compiles_and_runs(family: str, tmp_path: Path, calibration_text: Path) -> None:
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


def assert_findings_fit(path: Path) -> None:
    """compile.json and report.html are files of the bundle, can be read, and tell what policy.json tells."""
    bundle, manifest = Bundle.open(path), read_manifest(path)
    policy, spec = bundle.policy, bundle.spec
    for name in ("compile.json", "report.html"):
        assert manifest.files[name].nbytes == (path / name).stat().st_size and manifest.files[name].sha256
    found = json.loads((path / "compile.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["version"] == 2 and found["ladder"] == list(manifest.ladder)
    assert found["default_point"] == policy.default_point and found["notes"] == list(policy.notes)
    assert found["provenance"] == manifest.provenance
    points = [asdict(point) for point in policy.points]
    assert found["points"] == [{k: v for k, v in p.items() if k not in ("decode", "prefill")} for p in points]
    kinds = {point["kind"] for point in found["compared"]}
    assert kinds == ({"uniform", "mixed", "flat", "cosine", "static"} if len(manifest.ladder) > 1 else {"uniform"})
    measured = {(p["bytes_per_token"], p["kl"], p["nll"], p["top1_agreement"]) for p in found["compared"]}
    assert {(p["bytes_per_token"], p["kl"], p["nll"], p["top1_agreement"]) for p in found["points"]} <= measured
    assert math.isfinite(found["reference_nll"]) and found["measured_tokens"] > 0
    assert found["storage"]["expert_bytes"] == bundle.expert_bytes()
    assert found["storage"]["dense_bytes"] == (path / "dense.safetensors").stat().st_size
    assert len(found["layers"]) == spec.num_layers
    for layer, entry in zip(policy.layers, found["layers"], strict=True):
        assert entry["layer"] == layer.layer and entry["dense"] == (layer.layer in spec.dense_layers)
        if not entry["dense"]:
            for name in ("frequency", "gate_mass", "pinned", "data_free"):
                assert entry[name] == list(getattr(layer, name))
            assert entry["sensitivity"] == layer.sensitivity and set(entry["sensitivity"]) == {
                str(tier) for tier in manifest.ladder
            }
            assert [len(errors) for errors in entry["expert_error"].values()] == [spec.num_experts] * len(
                manifest.ladder
            )
    page = Page((path / "report.html").read_text(encoding="utf-8"))
    shown = {row[0].removesuffix(" (default)") for row in page.rows if row}
    assert {point.name for point in policy.points} <= shown


def test_what_was_measured_is_in_the_bundle(tiny_path: Path) -> None:
    assert_findings_fit(tiny_path)


def test_what_was_measured_of_the_shipped_model_is_in_the_bundle(shipped_path: Path) -> None:
    assert_findings_fit(shipped_path)


def test_no_two_points_have_one_name(shipped: Bundle, tiny_path: Path) -> None:
    for policy in (shipped.policy, Bundle.open(tiny_path).policy):
        names = [point.name for point in policy.points]
        assert len(set(names)) == len(names)


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


def assert_codes_nest(bundle: Bundle) -> None:
    """The codes of every tier of every record are the top bits of its highest tier's."""
    top = bundle.layout.ladder[-1]
    for layer in bundle.spec.moe_layers:
        for expert in range(bundle.spec.num_experts):
            segments = bundle.read_record(ExpertKey(layer, expert))
            for where in bundle.layout.matrices.values():
                codes = unpack_codes(segments, where, top)
                for tier in bundle.layout.ladder:
                    prefix = segments[: bundle.layout.segments_of(tier)]
                    assert np.array_equal(unpack_codes(prefix, where, tier), codes >> (top - tier))


def test_codes_nest_in_the_shipped_bundle(shipped: Bundle) -> None:
    assert_codes_nest(shipped)


def test_records_hold_the_weights(shipped: Bundle) -> None:
    """Each tier of a record is nearer to the original weights than the tier below."""
    from conftest import MODEL

    from dymoe_compile.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(MODEL)
    for key in (ExpertKey(0, 0), ExpertKey(3, 7), ExpertKey(5, 15)):
        original = checkpoint.expert(key)
        segments = shipped.read_record(key)
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
        segments = shipped.read_record(ExpertKey(layer, 3))
        assert record.dtype == torch.uint8
        assert np.array_equal(record.numpy(), np.concatenate(segments))


def test_one_direct_read_brings_a_record_prefix(shipped: Bundle) -> None:
    import mmap

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
            expected = np.concatenate(shipped.read_record(key)[: shipped.layout.segments_of(tier)])
            assert bytes(buffer) == expected.tobytes()
    finally:
        os.close(fd)


def test_the_same_input_gives_the_same_bytes(
    tiny_checkpoint: Path, tiny_path: Path, calibration_text: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.dymoe"
    assert compile_cli(tiny_checkpoint, "-o", again, "--calibration", calibration_text).code == 0
    assert same_files(tiny_path, again)


def test_what_is_up_to_date_is_left_alone(tiny_checkpoint: Path, damaged: Path, calibration_text: Path) -> None:
    args = (tiny_checkpoint, "-o", damaged, "--calibration", calibration_text)
    before = (damaged / "manifest.json").stat().st_ino
    assert "up to date" in compile_cli(*args).out
    assert (damaged / "manifest.json").stat().st_ino == before
    assert compile_cli(*args, "--fresh", "--json").json["changed"]
    assert (damaged / "manifest.json").stat().st_ino != before


@pytest.mark.parametrize("change", [("--seed", 1), ("--tiers", "2,4"), ("--dense-bits", 6)])
def test_a_change_of_options_recompiles(
    change: tuple, tiny_checkpoint: Path, damaged: Path, calibration_text: Path
) -> None:
    outcome = compile_cli(tiny_checkpoint, "-o", damaged, "--calibration", calibration_text, *change, "--json")
    assert outcome.code == 0 and outcome.json["changed"]
    assert bundle_cli("verify", damaged).code == 0


@pytest.mark.parametrize("name", ["policy.json", "compile.json", "report.html"])
def test_a_damaged_bundle_is_compiled_again(
    name: str, tiny_checkpoint: Path, damaged: Path, calibration_text: Path
) -> None:
    (damaged / name).write_text("{}")
    args = (tiny_checkpoint, "-o", damaged, "--calibration", calibration_text, "--json")
    assert compile_cli(*args).json["changed"]
    assert bundle_cli("verify", damaged).code == 0


def test_a_kill_leaves_no_bundle_and_the_next_run_goes_on_to_the_same_bytes(
    tmp_path: Path, calibration_text: Path
) -> None:
    """SIGKILL as soon as each layer's file is there; what is resumed equals what was never interrupted."""
    model = save_tiny(tmp_path / "model", "qwen3_moe", num_hidden_layers=4, moe_intermediate_size=264)
    whole, killed = tmp_path / "whole.dymoe", tmp_path / "killed.dymoe"
    args = ["--calibration", str(calibration_text), "--jobs", "1"]
    assert compile_cli(model, "-o", whole, *args).code == 0
    partial = tmp_path / ".killed.dymoe.partial"
    kills = 0
    for layer in range(3):
        command = [sys.executable, "-m", "dymoe_compile", str(model), "-o", str(killed), *args]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (partial / "state" / f"hidden-{layer}.json").exists():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        kills += process.wait(timeout=120) == -signal.SIGKILL
        if not killed.exists():
            assert not list(tmp_path.glob("**/.killed.dymoe.partial/**/manifest.json"))
            assert_one_sentence(run_cli(killed, "--prompt", "x"), "no such bundle")
    assert kills >= 2
    assert compile_cli(model, "-o", killed, *args).code == 0
    assert same_files(whole, killed)
    assert not partial.exists()


def test_hidden_states_on_the_disk_change_nothing(
    tiny_checkpoint: Path, tiny_path: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the run is interrupted; and no file of theirs is left."""
    spilled: list[tuple[int, ...]] = []
    scratch = BundleWriter.scratch

    def counted(writer: BundleWriter, shape: tuple[int, ...]) -> np.ndarray:
        spilled.append(shape)
        return scratch(writer, shape)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dymoe_compile.calibration.SPILL_BYTES", 0)
    monkeypatch.setattr(BundleWriter, "scratch", counted)
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    with monkeypatch.context() as patch:
        patch.setattr("dymoe_compile.compile.look_ahead_bytes", interrupt)
        assert compile_cli(*args).code == 130
    assert len(spilled) == 4  # the residual stream, and what each layer's experts see
    assert {path.name for path in (tmp_path / ".out.dymoe.partial" / "state").iterdir()} == {
        f"{name}.{suffix}" for name in ("dense", "hidden-2", *(f"layer-{i}" for i in range(3))) for suffix in SUFFIXES
    }
    assert compile_cli(*args).code == 0
    assert same_files(tiny_path, tmp_path / "out.dymoe")


@pytest.mark.parametrize("change", [{}, {"sources_sha256": "of another version"}, {"kernels": "others"}], ids=str)
def test_only_the_same_version_and_kernels_go_on(
    change: dict[str, str],
    tiny_checkpoint: Path,
    tiny_path: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[object] = []
    start_over = BundleWriter._start_over

    def counted(writer: BundleWriter, identity: dict) -> None:
        starts.append(identity)
        start_over(writer, identity)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BundleWriter, "_start_over", counted)
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    with monkeypatch.context() as patch:
        patch.setattr("dymoe_compile.compile.look_ahead_bytes", interrupt)
        assert compile_cli(*args).code == 130
    key = progress_key()
    monkeypatch.setattr("dymoe_compile.compile.progress_key", lambda: key | change)
    assert compile_cli(*args).code == 0
    assert len(starts) == (2 if change else 1)
    assert same_files(tiny_path, tmp_path / "out.dymoe")


def test_no_room_for_hidden_states_gets_one_sentence(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dymoe_compile.calibration.SPILL_BYTES", 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    outcome = compile_cli(tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    assert_one_sentence(outcome, "the disk is full", "free space")


def test_the_old_bundle_stays_until_the_new_one_is_whole(
    tiny_checkpoint: Path, damaged: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dymoe_compile.compile.fit_policy", interrupt)
    args = (tiny_checkpoint, "-o", damaged, "--calibration", calibration_text, "--seed", 3)
    outcome = compile_cli(*args)
    assert outcome.code == 130 and "Traceback" not in outcome.err
    assert bundle_cli("verify", damaged).code == 0
    assert Bundle.open(damaged).manifest.provenance["seed"] == 0


def test_files_beside_a_bundle_or_a_foreign_manifest_are_not_touched(
    tiny_checkpoint: Path, damaged: Path, tmp_path: Path
) -> None:
    (damaged / "notes.txt").write_text("mine")
    assert_one_sentence(compile_cli(tiny_checkpoint, "-o", damaged, "--fresh"), "other files")
    assert (damaged / "notes.txt").read_text() == "mine"
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"name": "web extension", "files": {}}')
    assert_one_sentence(compile_cli(tiny_checkpoint, "-o", tmp_path / "extension"), "not a bundle")
    assert (tmp_path / "extension" / "manifest.json").exists()


def test_a_link_at_the_output_is_followed(
    tiny_checkpoint: Path, damaged: Path, calibration_text: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link.dymoe"
    link.symlink_to(damaged)
    args = (tiny_checkpoint, "-o", link, "--calibration", calibration_text, "--seed", 5)
    assert compile_cli(*args).code == 0
    assert link.is_symlink() and Bundle.open(damaged).manifest.provenance["seed"] == 5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


DAMAGED_RESTS = (
    "state/hidden-2.safetensors",
    "state/layer-0.json",
    "state/dense.json",
    "bundle/experts-00000.safetensors",
    "bundle/dense.safetensors",
)


@pytest.mark.parametrize("harm", DAMAGED_RESTS)
def test_a_damaged_rest_of_an_interrupted_run_is_done_again(
    harm: str,
    tiny_checkpoint: Path,
    tiny_path: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    with monkeypatch.context() as patch:
        patch.setattr("dymoe_compile.points.measure_sensitivity", interrupt)
        assert compile_cli(*args).code == 130
    path = tmp_path / ".out.dymoe.partial" / harm
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert compile_cli(*args).code == 0
    assert same_files(tiny_path, tmp_path / "out.dymoe")


def test_something_else_at_the_output_is_not_touched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    assert_one_sentence(compile_cli(tiny_checkpoint, "-o", tmp_path / "precious"), "precious", "not a bundle")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_quality_gate_that_is_not_met_exits_with_3(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    assert_one_sentence(compile_cli(*args, "--max-kl", 1e-9), "KL", "1e-09", code=3)
    assert not (tmp_path / "out.dymoe").exists()
    assert compile_cli(*args, "--max-kl", 10).code == 0


def test_a_device_that_cannot_hold_the_bundle_exits_with_4(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "watch.toml"
    profile.write_text(
        'name = "watch"\nladder = [2, 4]\ndense_bits = 8\nmemory = "64MiB"\ndisk_bandwidth = "1MB/s"\nthreads = 1\n'
    )
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text, "--profile", profile)
    assert_one_sentence(compile_cli(*args), "watch", "64.0 MiB", code=4)


def test_a_full_disk_loses_nothing(tmp_path: Path, tiny_checkpoint: Path, calibration_text: Path) -> None:
    """A file system of 512 KiB; mounting one takes root."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        args = (tiny_checkpoint, "-o", place / "out.dymoe", "--calibration", calibration_text)
        assert_one_sentence(compile_cli(*args), "disk is full", "-o")
        assert not (place / "out.dymoe").exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_on_the_way_loses_nothing(
    tmp_path: Path, tiny_checkpoint: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses a write after the room looked sufficient; the next run goes on."""
    from dymoe_compile import writer

    flush, calls = os.fsync, []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        flush(fd)

    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", full)
        assert_one_sentence(compile_cli(*args), "disk is full", "free space")
    assert not (tmp_path / "out.dymoe").exists()
    assert compile_cli(*args).code == 0
    assert bundle_cli("verify", tmp_path / "out.dymoe").code == 0


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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tiers", "4,2"), ("--tiers", "4,2")),
        (("--tiers", "1,2"), ("--tiers",)),
        (("--tiers", "four"), ("--tiers", "four")),
        (("--dense-bits", 3), ("--dense-bits",)),
        (("--profile", "toaster"), ("toaster", "laptop-8gb")),
        (("--max-kl", "nan"), ("--max-kl",)),
    ],
)
def test_bad_options_get_one_sentence(flags: tuple, words: tuple, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert_one_sentence(compile_cli(tiny_checkpoint, "-o", tmp_path / "o.dymoe", *flags), *words)


def test_an_unknown_flag_is_a_usage_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert compile_cli(tiny_checkpoint, "-o", tmp_path / "o.dymoe", "--frobnicate").code == 2
    assert compile_cli(tiny_checkpoint).code == 2


def test_only_one_compiler_writes_a_bundle(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> None:
    from dymoe_compile.writer import BundleWriter

    writer = BundleWriter(tmp_path / "o.dymoe", {})
    try:
        args = (tiny_checkpoint, "-o", tmp_path / "o.dymoe", "--calibration", calibration_text)
        assert_one_sentence(compile_cli(*args), "another dymoe-compile")
    finally:
        writer.close()
