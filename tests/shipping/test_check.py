"""dymoe-bundle check: each gate passes up to its limit and fails beyond it, and says so in every form."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
from helpers import EXAMPLES, RATES, assert_one_sentence, bundle_cli

from dymoe_runtime.bundle.bundle import Bundle

SCHEMA = json.loads((EXAMPLES.parent / "docs" / "schemas" / "check.schema.json").read_text(encoding="utf-8"))
WATCH = f'name = "watch"\nladder = [2, 4]\ndense_bits = 8\nmemory = "64MiB"\n{RATES}'


def gates_of(*args: object, code: int) -> dict[str, dict]:
    """The gates of a check by name; what it prints is as the schema says."""
    outcome = bundle_cli("check", *args, "--json")
    assert outcome.code == code, outcome.err
    jsonschema.validate(outcome.json, SCHEMA)
    assert outcome.json["passed"] is (code == 0)
    return {gate["gate"]: gate for gate in outcome.json["gates"]}


def kl_of(path: Path) -> float:
    policy = Bundle.open(path).policy
    return policy.point(policy.default_point).kl


def test_quality_passes_up_to_its_limit_and_fails_beyond(tiny_path: Path) -> None:
    kl = kl_of(tiny_path)
    assert gates_of(tiny_path, "--max-kl", repr(kl), code=0)["quality"]["status"] == "passed"
    failed = gates_of(tiny_path, "--max-kl", repr(kl * 0.999), code=3)["quality"]
    assert (failed["status"], failed["measured"]) == ("failed", kl)


def test_quality_has_the_interval_that_the_compiler_found(tiny_path: Path) -> None:
    low, high = gates_of(tiny_path, "--max-kl", 10, code=0)["quality"]["interval"]
    assert 0 <= low < kl_of(tiny_path) < high


def test_size_is_that_of_what_is_shipped(tiny_path: Path, packed_path: Path) -> None:
    for path, nbytes in ((tiny_path, Bundle.open(tiny_path).total_bytes()), (packed_path, packed_path.stat().st_size)):
        assert gates_of(path, "--max-bytes", nbytes, code=0)["size"]["measured"] == nbytes
        assert gates_of(path, "--max-bytes", nbytes - 1, code=3)["size"]["status"] == "failed"


def test_speed_is_measured(tiny_path: Path) -> None:
    assert gates_of(tiny_path, "--min-tokens-per-s", 0.001, code=0)["speed"]["measured"] > 0.001
    assert gates_of(tiny_path, "--min-tokens-per-s", 1e12, code=3)["speed"]["status"] == "failed"


def test_what_is_known_without_measuring_fails_before_it(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "watch.toml").write_text(WATCH)
    found = gates_of(tiny_path, "--profile", tmp_path / "watch.toml", "--min-tokens-per-s", 1, code=3)
    assert found["memory"]["status"] == "failed" and found["memory"]["measured"] > 64 << 20
    assert (found["speed"]["status"], found["speed"]["measured"]) == ("skipped", None)
    assert "memory" in found["speed"]["detail"]


def test_a_profile_chooses_the_best_point_that_fits(tiny_path: Path) -> None:
    outcome = bundle_cli("check", tiny_path, "--profile", "laptop-8gb", "--max-kl", 10, "--json")
    points = Bundle.open(tiny_path).policy.points
    assert outcome.json["point"] == min(points, key=lambda point: point.kl).name


def test_the_digest_is_compared_with_every_byte(tiny_path: Path, damaged: Path) -> None:
    digest = Bundle.open(tiny_path).manifest.digest
    assert gates_of(tiny_path, "--expect", digest, code=0)["digest"]["status"] == "passed"
    assert gates_of(tiny_path, "--expect", "0" * 64, code=3)["digest"]["status"] == "failed"
    path = damaged / "experts-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    assert "does not match" in gates_of(damaged, "--expect", digest, code=3)["digest"]["detail"]


def test_texts_are_measured_against_a_reference(tiny_path: Path, tiny_checkpoint: Path, calibration_text: Path) -> None:
    text = calibration_text.parent / "some.txt"
    text.write_text(calibration_text.read_text(encoding="utf-8")[:400], encoding="utf-8")
    asked = ("--reference", tiny_checkpoint, "--text", text, "--max-kl")
    name = f"quality: {text}"
    passed = gates_of(tiny_path, *asked, 10, code=0)[name]
    assert 0 < passed["interval"][0] < passed["measured"] < passed["interval"][1]
    assert gates_of(tiny_path, *asked, repr(passed["measured"] / 2), code=3)[name]["status"] == "failed"
    assert gates_of(tiny_path, *asked, 1, "--max-bytes", 1, code=3)["quality"]["status"] == "skipped"


def test_a_table_and_junit_say_which_gate_failed(tiny_path: Path, tmp_path: Path) -> None:
    junit = tmp_path / "check.xml"
    outcome = bundle_cli(
        "check", tiny_path, "--max-kl", 10, "--max-bytes", 1, "--min-tokens-per-s", 1, "--junit", junit
    )
    assert_one_sentence(outcome, "failed at size", code=3)
    rows = {line.split()[0]: line.split()[1] for line in outcome.out.splitlines()[1:]}
    assert rows == {"size": "failed", "quality": "passed", "speed": "skipped"}
    suite = ElementTree.parse(junit).getroot()
    counts = [suite.get(key) for key in ("tests", "failures", "skipped")]
    assert counts == ["3", "1", "1"]
    assert [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None] == ["size"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ("nothing to check", "--max-kl")),
        (("--max-kl", "1", "--text", "x"), ("--reference", "--text", "both")),
        (("--max-bytes", "1", "--reference", "x", "--text", "x"), ("--max-kl",)),
        (("--expect", "abc"), ("--expect abc", "64 hexadecimal")),
        (("--max-kl", "1", "--point", "nine"), ("--point nine", "uniform-2")),
        (("--profile", "toaster"), ("toaster", "no such profile")),
        (("--max-kl", "1", "--junit", "no/such/place.xml"), ("no/such",)),
    ],
)
def test_wrong_flags_get_one_sentence(tiny_path: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_sentence(bundle_cli("check", tiny_path, *flags), *words)


@pytest.mark.parametrize("flag", ["--max-kl", "--min-tokens-per-s"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_limits_are_numbers_above_0(tiny_path: Path, flag: str, value: str) -> None:
    assert bundle_cli("check", tiny_path, flag, value).code == 2
