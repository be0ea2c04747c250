"""Bundles that somebody forged, or changes under a run: a sentence each, and never other text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_kit import Change, forge
from helpers import PROMPT, Outcome, assert_one_sentence, bundle_cli, run_cli
from safetensors.numpy import load_file, save

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.store.record_reader import RecordReader


def put(name: str, data: bytes) -> Change:
    return lambda directory, manifest: (directory / name).write_bytes(data)


def predictor(name: str, shape: tuple[int, ...], value: float = 0.0) -> bytes:
    return bytes(save({name: np.full(shape, value, np.float32)}))


def spec(**changes: Any) -> Change:
    return lambda directory, manifest: manifest["spec"].update(changes)


def of_manifest(**changes: Any) -> Change:
    return lambda directory, manifest: manifest.update(changes)


def of_policy(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(directory: Path, manifest: dict[str, Any]) -> None:
        policy = json.loads((directory / "policy.json").read_text())
        change(policy)
        (directory / "policy.json").write_text(json.dumps(policy))

    return changed


# Each with right digests. The tiny bundle has 3 layers, 6 experts, a hidden size of 48, and a manifest of the old form.
FORGED: dict[str, Change] = {
    "a look-ahead file that is none": put("look_ahead.safetensors", b"\xff" * 64),
    "a predictor of no layer": put("look_ahead.safetensors", predictor("99", (6, 49))),
    "a predictor of no number": put("look_ahead.safetensors", predictor("abc", (6, 49))),
    "a predictor of 01": put("look_ahead.safetensors", predictor("01", (6, 49))),
    "a predictor of another shape": put("look_ahead.safetensors", predictor("1", (6, 48))),
    "a predictor that is not finite": put("look_ahead.safetensors", predictor("1", (6, 49), np.nan)),
    "no files": of_manifest(files={}),
    "a layer of another file": lambda d, m: m["layers"]["0"].update(file="experts-00001.safetensors"),
    "a file outside": lambda d, m: m["layers"]["0"].update(file="../outside.safetensors"),
    "an absolute file": lambda d, m: m["files"].update({"/etc/passwd": {"nbytes": 1, "sha256": "0" * 64}}),
    "a listed parent": lambda d, m: m["files"].update({"..": {"nbytes": 1, "sha256": "0" * 64}}),
    "a file without a digest": lambda d, m: m["files"]["tokenizer.json"].update(sha256=""),
    "weights without a digest": lambda d, m: m["files"]["dense.safetensors"].update(sha256=""),
    "no provenance": lambda d, m: m.pop("provenance"),
    "an unknown key": of_manifest(extra=1),
    "a version that is a text": of_manifest(version="5"),
    "a version that is true": of_manifest(version=True),
    "a layer whose key is no number": lambda d, m: m["layers"].update({"x": m["layers"]["0"]}),
    "a layer with another spelling": lambda d, m: m["layers"].update({"00": m["layers"].pop("0")}),
    "checksums that are texts": lambda d, m: m["layers"]["0"].update(crc32=[["1"]]),
    "a start that is no page": lambda d, m: m["layers"]["0"].update(data_start=1),
    "a checksum of no tensor": lambda d, m: m["dense_crc32"].update(other=1),
    "a tensor without a checksum": lambda d, m: m["dense_crc32"].pop("norm"),
    "a ladder that falls": of_manifest(ladder=[4, 3, 2]),
    "more layers than there are": spec(num_layers=1 << 62),
    "a layer more": spec(num_layers=4),
    "no layers": spec(num_layers=0),
    "no specification": of_manifest(spec=None),
    "a specification that is a list": of_manifest(spec=[1]),
    "a wider model": spec(hidden_size=4800),
    "a larger vocabulary": spec(vocab_size=1 << 30),
    "more experts a token than there are": spec(top_k=7),
    "no expert a token": spec(top_k=0),
    "wider experts": spec(expert_width=1 << 20),
    "experts without width": spec(expert_width=0),
    "half a head": spec(num_kv_heads=3),
    "odd heads": spec(head_dim=17),
    "a window of less than nothing": spec(sliding_window=-1),
    "a window that is a text": spec(sliding_window="1"),
    "an endless context": spec(max_context=1 << 63),
    "no context": spec(max_context=None),
    "an unknown activation": spec(activation="relu"),
    "half an activation": spec(activation="clamped_swiglu:1"),
    "an unknown norm of queries": spec(qk_norm="both"),
    "a number in place of a flag": spec(norm_topk=1),
    "a theta that is a text": lambda d, m: m["spec"]["rope"].update(theta="x"),
    "a theta of 0": lambda d, m: m["spec"]["rope"].update(theta=0),
    "an unknown rope": lambda d, m: m["spec"]["rope"].update(kind="new"),
    "yarn without a context": lambda d, m: m["spec"]["rope"].update(
        kind="yarn", original_max_position_embeddings=0, factor=2.0
    ),
    "a dense layer that is not there": spec(dense_layers=[3]),
    "dense layers alone": spec(dense_layers=[0, 1, 2]),
    "a negative token": spec(eos_ids=[-1]),
    "a policy without points": of_policy(lambda p: p.update(points=[])),
    "a policy of another layer": of_policy(lambda p: p["layers"][0].update(layer=7)),
    "too few frequencies": of_policy(lambda p: p["layers"][0]["frequency"].pop()),
    "a frequency that is a text": of_policy(lambda p: p["layers"][0].update(frequency=["a"] * 6)),
    "a pinned expert that is not there": of_policy(lambda p: p["layers"][0].update(pinned=[6])),
    "errors of too few tiers": of_policy(lambda p: p["layers"][0]["expert_error"].pop("2")),
    "a falling threshold": of_policy(lambda p: p["points"][0]["decode"].__setitem__(0, [2.0, 1.0, 0.0])),
    "a threshold below all": of_policy(lambda p: p["points"][0]["decode"][0].__setitem__(0, -1)),
    "an unknown kind of point": of_policy(lambda p: p["points"][0].update(kind="new")),
    "two points of a name": of_policy(lambda p: p["points"].append(p["points"][0])),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_bundle_with_right_digests_gets_one_sentence(case: str, damaged: Path) -> None:
    forge(damaged, FORGED[case])
    for outcome in (run_cli(damaged, "--prompt", "x", "--max-tokens", 2), bundle_cli("verify", damaged)):
        assert_one_sentence(outcome)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("how", [fifo, link, folder])
@pytest.mark.parametrize("name", ["manifest.json", "policy.json", "tokenizer.json", "dense.safetensors"])
def test_only_regular_files_are_read(name: str, how: Callable[[Path], None], damaged: Path) -> None:
    how(damaged / name)
    for outcome in (run_cli(damaged, "--prompt", "x"), bundle_cli("inspect", damaged)):
        assert_one_sentence(outcome, name)


def test_a_link_to_a_bundle_is_followed(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.dymoe").symlink_to(tiny_path)
    assert run_cli(tmp_path / "link.dymoe", "--prompt", "x", "--max-tokens", 1).code == 0


@pytest.mark.parametrize("name", ["chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "notes.txt"])
def test_a_file_that_is_not_listed_changes_nothing_and_is_named(name: str, damaged: Path) -> None:
    before = run_cli(damaged, "--prompt", PROMPT, "--max-tokens", 8)
    (damaged / name).write_text('{"eos_token_id": [1, 2, 3], "do_sample": true}')
    assert run_cli(damaged, "--prompt", PROMPT, "--max-tokens", 8) == before
    assert_one_sentence(run_cli(damaged, "--prompt", "x", "--chat"), "no chat template")
    assert_one_sentence(bundle_cli("verify", damaged), name, "not a file of the bundle")


def digest_of(bundle: Path) -> str:
    outcome = bundle_cli("digest", bundle)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out.strip()


def test_a_digest_vouches_for_every_byte(damaged: Path) -> None:
    digest = digest_of(damaged)
    args = ("--prompt", "x", "--max-tokens", 1, "--expect")
    assert run_cli(damaged, *args, digest).code == 0 == bundle_cli("verify", damaged, "--expect", digest).code
    for outcome in (run_cli(damaged, *args, "0" * 64), bundle_cli("verify", damaged, "--expect", "0" * 64)):
        assert_one_sentence(outcome, digest, "not the expected one")
    assert_one_sentence(run_cli(damaged, *args, "nonsense"), "--expect", "64")
    for path in sorted(damaged.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for outcome in (run_cli(damaged, *args, digest), bundle_cli("verify", damaged)):
            assert outcome.code == 1 and len(outcome.err.splitlines()) == 1, path
        path.write_bytes(whole)


def test_a_header_that_cannot_be_read_is_said_once(damaged: Path) -> None:
    def cut(directory: Path, manifest: dict[str, Any]) -> None:
        path = directory / "dense.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:8] + data[8:].replace(b'"data_offsets":[0,', b'"data_offsets":["",', 1)[: len(data) - 8])

    forge(damaged, cut)
    assert_one_sentence(bundle_cli("verify", damaged), "dense.safetensors", "header", "copy the file again")


# A multiple of it, at any place, leaves a CRC-32 as it is.
GENERATOR = 0b100000100110000010001110110110111


def test_weights_with_the_same_checksums_are_no_longer_sound(damaged: Path) -> None:
    path = damaged / "experts-00000.safetensors"
    data = bytearray(path.read_bytes())
    for i, bit in enumerate(f"{GENERATOR:b}"):
        if bit == "1":
            data[4096 + 64 + i // 8] ^= 1 << i % 8
    path.write_bytes(data)
    assert run_cli(damaged, "--prompt", "x", "--max-tokens", 1).code == 0  # as its checksums are those of the manifest
    assert_one_sentence(bundle_cli("verify", damaged), path.name, "does not match the manifest")
    digest = digest_of(damaged)
    assert_one_sentence(run_cli(damaged, "--prompt", "x", "--expect", digest), path.name)


def test_an_older_bundle_runs_and_says_what_it_cannot_vouch_for(damaged: Path) -> None:
    def older(directory: Path, manifest: dict[str, Any]) -> None:
        manifest["version"] = 3
        for name, entry in manifest["files"].items():
            entry["sha256"] = "" if name.startswith(("dense", "experts")) else entry["sha256"]

    forge(damaged, older)
    assert run_cli(damaged, "--prompt", "x", "--max-tokens", 1).code == 0
    outcome = bundle_cli("verify", damaged)
    assert outcome.code == 0 and "does not vouch for its weights" in outcome.err
    digest = bundle_cli("digest", damaged)
    assert digest.code == 0 and "does not vouch" in digest.err
    assert_one_sentence(run_cli(damaged, "--prompt", "x", "--expect", digest.out.strip()), "does not vouch")


@pytest.mark.parametrize("change", ["swapped", "zeroed", "a bit"])
def test_what_changes_while_it_is_read_again_never_becomes_text(
    change: str, shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(shipped_path, tmp_path / "changing.dymoe"))
    arena = Bundle.open(copy).expert_bytes() // 4
    args = (copy, "--prompt", PROMPT, "--max-tokens", 48, "--ignore-eos", "--tiers", 4, "--arena", arena)
    whole, reads, real = run_cli(*args), [0], RecordReader.__call__

    def changed(self: RecordReader, *what: Any) -> Any:
        reads[0] += 1
        if reads[0] == 300:  # all experts have been read before
            for path in copy.glob("experts-*"):
                data = bytearray(path.read_bytes())
                record = (len(data) - 4096) // 16
                if change == "swapped":
                    data[4096:] = data[4096 + record :] + data[4096 : 4096 + record]
                elif change == "zeroed":
                    data[4096:] = bytes(len(data) - 4096)
                else:
                    for expert in range(16):
                        data[4096 + expert * record + 100] ^= 1
                with open(path, "r+b") as file:
                    file.write(data)
        return real(self, *what)

    monkeypatch.setattr(RecordReader, "__call__", changed)
    outcome = run_cli(*args)
    assert reads[0] >= 300
    assert_one_sentence(outcome, "experts-", "checksum mismatch")
    assert whole.out.startswith(outcome.out.rstrip("\n"))


# Characters that control a terminal, and one that turns text around.
CONTROLS = "\x1b]0;title\x07\x9b31m\u202e\x7f"


def test_control_characters_in_messages_are_escaped(damaged: Path, tmp_path: Path) -> None:
    forge(damaged, of_manifest(version=CONTROLS))
    outcomes = [
        run_cli(damaged, "--prompt", "x"),
        run_cli(tmp_path / CONTROLS.replace("/", ""), "--prompt", "x"),
        run_cli(damaged, f"--{CONTROLS}"),
        run_cli(damaged, "--max-tokens", CONTROLS),
        bundle_cli(CONTROLS),
    ]
    for outcome in outcomes:
        assert outcome.code in (1, 2) and not set(outcome.err) & set(CONTROLS) - set("0;title31m]"), outcome.err


def test_control_characters_in_tables_are_escaped(damaged: Path) -> None:
    forge(damaged, spec(model_type=CONTROLS))
    outcome = bundle_cli("inspect", damaged)
    assert outcome.code == 0 and "\\x1b]0;title\\x07" in outcome.out and "\x1b" not in outcome.out


COMMANDS = (
    *("dymoe_runtime.cli.__main__ run", "dymoe_runtime.cli.__main__ bundle"),
    *("dymoe_runtime.cli.lm_eval main", "dymoe_compile.__main__ main"),
)


def command(name: str, *args: object) -> list[str]:
    module, function = name.split()
    return [sys.executable, "-c", f"import sys; from {module} import {function}; {function}()", *map(str, args)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk")
@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_cannot_be_written_is_an_error(name: str, tiny_path: Path) -> None:
    if "lm_eval" in name:
        pytest.importorskip("lm_eval")
    for args in (("--help",), ("--version",)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command(name, *args), stdout=full, stderr=subprocess.PIPE, text=True)
        assert_one_sentence(Outcome(done.returncode, "", done.stderr), "No space left", "stdout")
        closed = subprocess.run(
            ["sh", "-c", '"$@" >&-', "sh", *command(name, *args)], stderr=subprocess.PIPE, text=True
        )
        assert_one_sentence(Outcome(closed.returncode, "", closed.stderr), "closed", "stdout")
        reader = ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", *command(name, *args)]
        ended = subprocess.run(reader, capture_output=True, text=True)
        assert ended.returncode in (0, 1) and not ended.stderr


def test_a_checkpoint_of_the_same_tensors_is_not_touched_by_a_predictor(tiny_path: Path) -> None:
    """What a bundle's own file holds is accepted."""
    assert all(tensor.shape == (6, 49) for tensor in load_file(tiny_path / "look_ahead.safetensors").values())
    assert bundle_cli("verify", tiny_path).code == 0
