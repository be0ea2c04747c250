"""Copies of bundles: whole, resumed, checked, from a path and over HTTP."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from compile_kit import same_files
from helpers import assert_one_sentence, bundle_cli

from dymoe_runtime.bundle.bundle import read_manifest
from dymoe_runtime.tools.shipping import fetch as fetching
from dymoe_runtime.tools.shipping import remote
from dymoe_runtime.tools.shipping.remote import source_of


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_WAIT_S", 0.01)


Serving = Callable[..., AbstractContextManager[str]]


def same(one: Path, other: Path) -> bool:
    return same_files(one, other) if one.is_dir() else one.read_bytes() == other.read_bytes()


@pytest.fixture(params=["packed", "directory"])
def source(request: pytest.FixtureRequest, packed_path: Path, tiny_path: Path) -> Path:
    return packed_path if request.param == "packed" else tiny_path


def address(base: str, source: Path) -> str:
    return f"{base}/{source.name}"


def test_a_copy_from_a_path_is_the_same(source: Path, tmp_path: Path) -> None:
    assert bundle_cli("fetch", source, "-o", tmp_path / "copy").code == 0
    assert same(source, tmp_path / "copy") and os.listdir(tmp_path) == ["copy"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_copy_over_http_is_the_same(serving: Serving, source: Path, tmp_path: Path, ranges: bool) -> None:
    digest = read_manifest(source).digest
    with serving(source.parent, ranges) as base:
        outcome = bundle_cli("fetch", address(base, source), "-o", tmp_path / "copy", "--expect", digest)
    assert outcome.code == 0, outcome.err
    assert same(source, tmp_path / "copy") and os.listdir(tmp_path) == ["copy"]


@pytest.mark.parametrize("ranges", [True, False])
def test_connections_that_end_early_change_nothing(
    serving: Serving, source: Path, tmp_path: Path, ranges: bool
) -> None:
    with serving(source.parent, ranges, cuts=20 if ranges else 3, seed=1) as base:
        outcome = bundle_cli("fetch", address(base, source), "-o", tmp_path / "copy")
    assert outcome.code == 0, outcome.err
    assert same(source, tmp_path / "copy")


def test_a_copy_that_is_interrupted_twenty_times_goes_on(
    serving: Serving, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, came = random.Random(5), [0]
    total = source.stat().st_size if source.is_file() else sum(f.stat().st_size for f in source.iterdir())

    def interrupt_after(nbytes: int) -> Callable[[int], None]:
        left = [nbytes]

        def advance(count: int) -> None:
            came[0] += count
            left[0] -= count
            if left[0] < 0:
                raise KeyboardInterrupt

        return advance

    monkeypatch.setattr(remote, "PIECE_BYTES", 4096)
    with serving(source.parent) as base:
        for _ in range(20):
            advance = interrupt_after(rng.randrange(total // 40))
            with pytest.raises(KeyboardInterrupt):
                fetching.fetch(source_of(address(base, source)), tmp_path / "copy", None, advance)
        fetching.fetch(source_of(address(base, source)), tmp_path / "copy", None, lambda count: None)
    assert same(source, tmp_path / "copy") and os.listdir(tmp_path) == ["copy"]
    assert came[0] < 21 * total  # it did not begin anew each time


def test_what_an_older_version_left_is_replaced(source: Path, tmp_path: Path) -> None:
    work = tmp_path / ".copy.fetching"
    for name in [fetching.PACKED, *(f"{fetching.FILES}/{name}" for name in ("policy.json", "dense.safetensors", "x"))]:
        (work / name).parent.mkdir(exist_ok=True, parents=True)
        (work / name).write_bytes(b"other bytes")
    assert bundle_cli("fetch", source, "-o", tmp_path / "copy").code == 0
    assert same(source, tmp_path / "copy") and os.listdir(tmp_path) == ["copy"]


def test_another_digest_is_refused(source: Path, tmp_path: Path) -> None:
    for digest in ("0" * 64, "xyz"):
        outcome = bundle_cli("fetch", source, "-o", tmp_path / "copy", "--expect", digest)
        assert_one_sentence(outcome, "digest")
        assert os.listdir(tmp_path) == []


def test_a_damaged_source_is_refused(serving: Serving, source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "source" / source.name
    bad.parent.mkdir()
    assert bundle_cli("fetch", source, "-o", bad).code == 0
    harmed = bad if bad.is_file() else bad / "experts-00001.safetensors"
    data = bytearray(harmed.read_bytes())
    data[-3000] ^= 4
    harmed.write_bytes(data)
    with serving(bad.parent) as base:
        for where in (str(bad), address(base, bad)):
            assert_one_sentence(bundle_cli("fetch", where, "-o", tmp_path / "copy"), where)
            assert os.listdir(tmp_path) == ["source"]


def test_what_cannot_be_reached_gets_one_sentence(serving: Serving, tmp_path: Path) -> None:
    with serving(tmp_path) as base:
        wrong = f"{base}/nothing.dymoe"
        assert_one_sentence(bundle_cli("fetch", wrong, "-o", tmp_path / "copy"), "not there (404)")
    for gone in (f"{base}/x.dymoe", f"{base}/x/", "ftp://host/x", str(tmp_path / "no"), "http://", "http://[::1"):
        assert_one_sentence(bundle_cli("fetch", gone, "-o", tmp_path / "copy"), gone)
    assert not (tmp_path / "copy").exists()


def test_somebody_elses_link_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".copy.fetching").symlink_to("elsewhere")
    assert_one_sentence(bundle_cli("fetch", source, "-o", tmp_path / "copy"), "not a directory of yours")
    assert os.listdir(tmp_path / "elsewhere") == []
