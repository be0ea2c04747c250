"""Interrupted runs, full disks and what is at the output already: nothing is lost, and the next run goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compile_kit import interrupt, same_files, without_stages
from helpers import EIGHT_BITS, assert_one_sentence, bundle_cli, compile_cli, run_cli, save_tiny

from dymoe_compile.compile import progress_key
from dymoe_compile.job import writer
from dymoe_compile.job.writer import BundleWriter
from dymoe_runtime.bundle.bundle import Bundle, LayerEntry
from dymoe_runtime.kernels import load_kernels

# Of the files that keep what an interrupted run has done.
SUFFIXES = ("json", "safetensors")


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

    monkeypatch.setattr("dymoe_compile.plan.sizes.SPILL_BYTES", 0)
    monkeypatch.setattr(BundleWriter, "scratch", counted)
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text, *EIGHT_BITS)
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
    """Others start over, with the first layer; what is done already is not done again."""
    written: list[int] = []
    write_layer = BundleWriter.write_layer

    def counted(writer: BundleWriter, index: int, *rest: Any) -> LayerEntry:
        written.append(index)
        return write_layer(writer, index, *rest)

    monkeypatch.setattr(BundleWriter, "write_layer", counted)
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text, *EIGHT_BITS)
    with monkeypatch.context() as patch:
        patch.setattr("dymoe_compile.compile.look_ahead_bytes", interrupt)
        assert compile_cli(*args).code == 130
    key = progress_key(load_kernels())
    monkeypatch.setattr("dymoe_compile.compile.progress_key", lambda kernels: key | change)
    assert compile_cli(*args).code == 0
    assert written == [0, 1, 2] * (2 if change else 1)
    assert same_files(tiny_path, tmp_path / "out.dymoe")


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
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text, *EIGHT_BITS)
    with monkeypatch.context() as patch:
        patch.setattr("dymoe_compile.policy.operating_points.measure_sensitivity", interrupt)
        assert compile_cli(*args).code == 130
    path = tmp_path / ".out.dymoe.partial" / harm
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert compile_cli(*args).code == 0
    assert same_files(tiny_path, tmp_path / "out.dymoe")


def test_no_room_for_hidden_states_gets_one_sentence(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dymoe_compile.plan.sizes.SPILL_BYTES", 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    outcome = compile_cli(tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    assert_one_sentence(without_stages(outcome), "the disk is full", "free space")


def test_a_full_disk_loses_nothing(tmp_path: Path, tiny_checkpoint: Path, calibration_text: Path) -> None:
    """A file system of 512 KiB; mounting one takes root."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        args = (tiny_checkpoint, "-o", place / "out.dymoe", "--calibration", calibration_text)
        assert_one_sentence(without_stages(compile_cli(*args)), "disk is full", "-o")
        assert not (place / "out.dymoe").exists()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_on_the_way_loses_nothing(
    tmp_path: Path, tiny_checkpoint: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses a write after the room looked sufficient; the next run goes on."""
    flush, calls = os.fsync, []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        flush(fd)

    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", full)
        assert_one_sentence(without_stages(compile_cli(*args)), "disk is full", "free space")
    assert not (tmp_path / "out.dymoe").exists()
    assert compile_cli(*args).code == 0
    assert bundle_cli("verify", tmp_path / "out.dymoe").code == 0


def test_only_one_compiler_writes_a_bundle(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> None:
    first = BundleWriter(tmp_path / "o.dymoe", {})
    try:
        args = (tiny_checkpoint, "-o", tmp_path / "o.dymoe", "--calibration", calibration_text)
        assert_one_sentence(without_stages(compile_cli(*args)), "another dymoe-compile")
    finally:
        first.close()


def test_the_old_bundle_stays_until_the_new_one_is_whole(
    tiny_checkpoint: Path, damaged: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_something_else_at_the_output_is_not_touched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    assert_one_sentence(compile_cli(tiny_checkpoint, "-o", tmp_path / "precious"), "precious", "not a bundle")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_link_at_the_output_is_followed(
    tiny_checkpoint: Path, damaged: Path, calibration_text: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link.dymoe"
    link.symlink_to(damaged)
    args = (tiny_checkpoint, "-o", link, "--calibration", calibration_text, "--seed", 5)
    assert compile_cli(*args).code == 0
    assert link.is_symlink() and Bundle.open(damaged).manifest.provenance["seed"] == 5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
