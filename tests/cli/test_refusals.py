"""Bad bundles, bad arguments and too little memory: one sentence each, and nothing half-done."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import PROMPT, answer, assert_one_sentence, bundle_cli, compile_cli, run_cli, save_tiny

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine import load as load_module
from dymoe_runtime.engine import memory_plan


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))


def newer(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


FILES = (
    "policy.json",
    "compile.json",
    "report.html",
    "tokenizer.json",
    "dense.safetensors",
    "experts-00001.safetensors",
    "manifest.json",
)
BAD_BUNDLES: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    ("newer version", newer, ("manifest.json", "version 99", "upgrade")),
    ("flipped byte in the policy", lambda d: flip(d / "policy.json", 200), ("policy.json",)),
    ("flipped byte in the manifest", lambda d: flip(d / "manifest.json", 900), ("manifest.json",)),
    ("flipped first byte of the manifest", lambda d: flip(d / "manifest.json", 0), ("manifest.json",)),
    ("flipped byte in the findings", lambda d: flip(d / "compile.json", 300), ("compile.json",)),
    ("flipped byte in the report", lambda d: flip(d / "report.html", 5000), ("report.html",)),
    ("cut report", lambda d: (d / "report.html").write_bytes((d / "report.html").read_bytes()[:-1]), ("report.html",)),
    ("flipped byte in the tokenizer", lambda d: flip(d / "tokenizer.json", 50), ("tokenizer.json",)),
    ("short records", lambda d: (d / "experts-00001.safetensors").write_bytes(b"x" * 5000), ("experts-00001",)),
    ("empty manifest", lambda d: (d / "manifest.json").write_bytes(b""), ("manifest.json",)),
    ("binary manifest", lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\x00"), ("manifest.json",)),
    *((f"no {name}", lambda d, name=name: (d / name).unlink(), (name,)) for name in FILES),
]


def sign(directory: Path, change: Callable[[dict, dict], object]) -> None:
    """Change manifest and policy, and make their digests right again."""
    manifest, policy = (json.loads((directory / name).read_text()) for name in ("manifest.json", "policy.json"))
    change(manifest, policy)
    text = json.dumps(policy)
    (directory / "policy.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest["files"]["policy.json"] = {"nbytes": len(text.encode()), "sha256": digest}
    manifest.pop("sha256")
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    (directory / "manifest.json").write_text(json.dumps({**manifest, "sha256": hashlib.sha256(body).hexdigest()}))


MISFITS: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "a layer without checksums": (lambda m, p: m["layers"]["0"].update(crc32=[]), "manifest.json"),
    "a layer less": (lambda m, p: m["layers"].pop("1"), "manifest.json"),
    "more experts": (lambda m, p: m["spec"].update(num_experts=m["spec"]["num_experts"] + 1), "manifest.json"),
    "another ladder": (lambda m, p: p.update(ladder=[2, 4]), "policy.json"),
    "thresholds of too few layers": (lambda m, p: p["points"][0]["decode"].pop(), "policy.json"),
    "a threshold too many": (lambda m, p: p["points"][0]["prefill"][0].append(0.5), "policy.json"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_manifest_and_policy_that_do_not_fit_each_other_get_one_sentence(case: str, damaged: Path) -> None:
    change, named = MISFITS[case]
    sign(damaged, change)
    for outcome in (run_cli(damaged, "--prompt", "x"), bundle_cli("inspect", damaged)):
        assert_one_sentence(outcome, named)


def test_a_signed_bundle_that_fits_runs(damaged: Path) -> None:
    sign(damaged, lambda manifest, policy: None)
    assert run_cli(damaged, "--prompt", "x", "--max-tokens", 2).code == 0


@pytest.mark.parametrize(("harm", "words"), [case[1:] for case in BAD_BUNDLES], ids=[case[0] for case in BAD_BUNDLES])
def test_a_bad_bundle_gets_one_sentence(harm: Callable[[Path], object], words: tuple[str, ...], damaged: Path) -> None:
    harm(damaged)
    for outcome in (run_cli(damaged, "--prompt", "x"), bundle_cli("verify", damaged), bundle_cli("inspect", damaged)):
        assert_one_sentence(outcome, *words)


def test_every_flipped_byte_of_the_manifest_is_noticed(damaged: Path) -> None:
    path = damaged / "manifest.json"
    whole = path.read_bytes()
    for offset in range(0, len(whole), max(1, len(whole) // 60)):
        flip(path, offset)
        assert_one_sentence(bundle_cli("inspect", damaged), "manifest.json")
        path.write_bytes(whole)


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_a_flipped_byte_in_a_record_is_named_and_never_becomes_text(damaged: Path, segment: int) -> None:
    bundle = Bundle.open(damaged)
    for layer in bundle.manifest.layers.values():
        for expert in range(bundle.spec.num_experts):
            start = layer.data_start + expert * bundle.layout.record_bytes
            flip(damaged / layer.file, start + sum(bundle.layout.segment_spans[:segment]) + 5)
    outcome = run_cli(damaged, "--prompt", "Hello", "--tiers", 4)
    assert_one_sentence(outcome, "experts-0000", "checksum", "expert 0.")
    outcome = bundle_cli("verify", damaged, "--json")
    assert outcome.code == 1 and len(outcome.json["problems"]) == 3 * 6


def test_a_flipped_byte_in_the_dense_weights_is_named(damaged: Path) -> None:
    flip(damaged / "dense.safetensors", (damaged / "dense.safetensors").stat().st_size - 100)
    for outcome in (run_cli(damaged, "--prompt", "x"), bundle_cli("verify", damaged)):
        assert_one_sentence(outcome, "dense.safetensors", "checksum")


def test_verify_names_the_records_that_are_wrong(damaged: Path) -> None:
    bundle = Bundle.open(damaged)
    entry = bundle.manifest.layers[1]
    flip(damaged / entry.file, entry.data_start + 3 * bundle.layout.record_bytes)
    outcome = bundle_cli("verify", damaged)
    assert_one_sentence(outcome, entry.file, "expert 1.3", "tier 2")


def test_verify_checks_the_index(damaged: Path) -> None:
    path = damaged / "experts-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"experts.2.0", b"experts.9.0", 1))
    assert_one_sentence(bundle_cli("verify", damaged), "experts-00002", "index")


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_sentence(run_cli(tmp_path / "nowhere", "--prompt", "x"), "nowhere", "dymoe-compile")
    assert_one_sentence(run_cli(tmp_path / "empty", "--prompt", "x"), "manifest.json", "not a bundle")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prompt", ""), ("prompt",)),
        (("--prompt", "x" * 600), ("600", "256")),
        (("--prompt", "x", "--tiers", "5"), ("--tiers", "2, 3, 4")),
        (("--prompt", "x", "--temperature", "nan"), ("temperature",)),
        (("--prompt", "x", "--top-p", "1.5"), ("top", "p")),
        (("--prompt-file", "/no/such/file"), ("/no/such/file",)),
        (("--eval", "/no/such/file"), ("/no/such/file",)),
        (("--eval", "/tmp"), ("/tmp", "directory", "--eval")),
        (("--bench", "--prompt-tokens", 250, "--new-tokens", 40), ("290", "256")),
        (("--prompt", "x", "--chat"), ("chat template",)),
    ],
)
def test_bad_arguments_get_one_sentence(args: tuple, words: tuple, tiny_path: Path) -> None:
    assert_one_sentence(run_cli(tiny_path, *args), *words)


@pytest.mark.parametrize(
    "args",
    [
        ("--frobnicate",),
        ("--prompt", "x", "--memory", "lots"),
        ("--prompt", "x", "--point", "high"),
        ("--prompt", "x", "--tiers", "4", "--point", "3"),
        ("--prompt", "x", "--prompt-file", "y"),
        ("--bench", "--chat"),
        ("--prompt", "x", "--reference", "y"),
        ("--prompt", "x", "--eval", "y"),
        ("--eval", "y", "y"),
        ("--prompt", "x", "--tiers", "\u00b2"),
        ("--prompt", "x", "--threads", 10**12),
        ("--prompt", "x", "--seed", 10**30),
    ],
)
def test_wrong_usage_exits_with_2(args: tuple, tiny_path: Path) -> None:
    assert run_cli(tiny_path, *args).code == 2


@pytest.mark.parametrize(
    "args",
    [
        ("--bench", "--prompt-file", "x.txt"),
        ("--probe", "--prompt-file", "x.txt"),
        ("--prompt", "a", "--system", "b"),
        ("--probe", "--latency"),
        ("--probe", "--no-preload"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(args: tuple, tiny_path: Path) -> None:
    assert run_cli(tiny_path, *args).code == 2


def test_numbers_beyond_all_bounds_are_wrong_usage(shipped_path: Path, tmp_path: Path) -> None:
    for flag, value in (("--memory", "9" * 400), ("--tiers", "9" * 5000), ("--arena", "9" * 400 + "GiB")):
        outcome = run_cli(shipped_path, "--prompt", "a", flag, value)
        assert outcome.code == 2 and not outcome.out and "Traceback" not in outcome.err


def test_too_small_a_budget_names_the_least_that_works(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--prompt", PROMPT, "--max-tokens", 4, "--memory", "10MiB")
    assert_one_sentence(outcome, "10.0 MiB", "least that works", "--memory")


def test_more_than_the_cgroup_allows_is_refused(shipped_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than this process takes, which has run other tests.
    monkeypatch.setattr(memory_plan, "machine_limit", lambda: 8 << 30)
    outcome = run_cli(shipped_path, "--prompt", PROMPT, "--max-tokens", 4, "--memory", "8193MiB")
    assert_one_sentence(outcome, "8.0 GiB", "cgroup", "--memory")
    assert answer(shipped_path, "--memory", "8GiB", tokens=4)["memory_bytes"] == 8 << 30


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()])
def test_memory_that_is_not_to_be_had_is_one_sentence(
    error: Exception, shipped_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(load_module, "SequenceState", fail)
    before = threading.active_count()
    assert_one_sentence(run_cli(shipped_path, "--prompt", PROMPT), "out of memory", "--memory")
    assert threading.active_count() == before


def test_out_of_memory_is_one_sentence(shipped_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: object, **kwargs: object) -> object:
        return np.empty(1 << 58)

    monkeypatch.setattr(load_module, "SequenceState", allocate)
    assert_one_sentence(run_cli(shipped_path, "--prompt", PROMPT), "out of memory", "--memory")


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path, calibration_text: Path) -> None:
    """The byte tokenizer has 256 tokens, the model 222; plain ASCII text does not show it."""
    text = tmp_path / "ascii.txt"
    text.write_text(calibration_text.read_text(encoding="utf-8").encode("ascii", "ignore").decode())
    model = save_tiny(tmp_path / "model", "mixtral", vocab_size=222)
    assert compile_cli(model, "-o", tmp_path / "b.dymoe", "--calibration", text).code == 0
    assert_one_sentence(run_cli(tmp_path / "b.dymoe", "--prompt", "\u00c0\u00ff"), "tokenizer.json", "222")
