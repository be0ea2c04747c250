"""A packed bundle does all that the directory does, and comes from it and back without a changed byte."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from compile_kit import same_files
from helpers import assert_one_sentence, bundle_cli, run_cli

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.tiers import PAGE
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.storage import Archive
from dymoe_runtime.store.record_reader import RecordReader

RUN = ("--prompt", "The river", "--greedy", "--max-tokens", 12)


def test_a_packed_bundle_comes_back_unchanged(packed_path: Path, tiny_path: Path, tmp_path: Path) -> None:
    assert bundle_cli("unpack", packed_path, "-o", tmp_path / "again").code == 0
    assert same_files(tiny_path, tmp_path / "again")
    again = tmp_path / "packed.dymoe"
    assert bundle_cli("pack", tmp_path / "again", "-o", again).code == 0
    assert again.read_bytes() == packed_path.read_bytes()


def test_its_members_start_at_pages_and_other_programs_read_it(packed_path: Path, tiny_path: Path) -> None:
    starts = [Archive(packed_path).open(name, "").start for name in os.listdir(tiny_path)]
    assert {start % PAGE for start in starts} == {0}
    with zipfile.ZipFile(packed_path) as archive:
        assert archive.testzip() is None and archive.namelist()[0] == "manifest.json"
        assert archive.read("policy.json") == (tiny_path / "policy.json").read_bytes()


def test_a_packed_bundle_says_and_answers_the_same(packed_path: Path, tiny_path: Path) -> None:
    for command in (["digest"], ["verify", "--json"]):
        one, other = bundle_cli(*command, packed_path), bundle_cli(*command, tiny_path)
        assert one.code == 0 and one.out == other.out
    answers = [run_cli(path, *RUN) for path in (packed_path, tiny_path)]
    assert answers[0].code == 0 and answers[0].out == answers[1].out != ""


def test_a_packed_bundle_decodes_the_same_where_experts_are_read_again(packed_path: Path, tiny_path: Path) -> None:
    def logits(path: Path) -> list[np.ndarray]:
        bundle = Bundle.open(path)
        options = RunOptions(arena_bytes=bundle.expert_bytes() // 3, context=64)
        with load_model(bundle, options) as model:
            model.prefill([5, 6, 7])
            return [model.decode(token).copy() for token in range(1, 20)]

    for one, other in zip(logits(packed_path), logits(tiny_path), strict=True):
        np.testing.assert_array_equal(one, other)


def test_records_of_a_packed_bundle_are_read_as_directly_as_of_a_directory(packed_path: Path, tiny_path: Path) -> None:
    readers = [RecordReader(Bundle.open(path)) for path in (packed_path, tiny_path)]
    assert readers[0].direct == readers[1].direct
    for reader in readers:
        reader.close()


def test_what_is_there_is_not_replaced(packed_path: Path, tiny_path: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    for command, source in (("pack", tiny_path), ("unpack", packed_path)):
        assert_one_sentence(bundle_cli(command, source, "-o", there), "is there already")
    assert there.read_text() == "mine" and os.listdir(tmp_path) == ["there"]


def test_a_damaged_bundle_is_not_packed(damaged: Path, tmp_path: Path) -> None:
    path = damaged / "experts-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    assert_one_sentence(bundle_cli("pack", damaged, "-o", tmp_path / "x"), "does not match the manifest")
    assert sorted(os.listdir(tmp_path)) == ["damaged.dymoe"]


def compressed(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def outside(source: Path, target: Path) -> None:
    shutil.copy(source, target)
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("../outside", b"x")


def twice(source: Path, target: Path) -> None:
    shutil.copy(source, target)
    with pytest.warns(UserWarning), zipfile.ZipFile(target, "a") as archive:
        archive.writestr("policy.json", b"{}")


def cut(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:-100])


def huge_index(source: Path, target: Path) -> None:
    data = bytearray(source.read_bytes())
    with open(target, "wb") as file:
        file.write(data)
        file.truncate(1 << 30)
        file.seek(-22, os.SEEK_END)
        file.write(data[-22:-10] + (900 << 20).to_bytes(4, "little") + (1000).to_bytes(4, "little") + b"\0\0")


@pytest.mark.parametrize("harm", [compressed, outside, twice, cut, huge_index])
def test_an_archive_that_is_no_packed_bundle_gets_one_sentence(
    packed_path: Path, tmp_path: Path, harm: Callable[[Path, Path], None]
) -> None:
    bad = tmp_path / "bad.dymoe"
    harm(packed_path, bad)
    for outcome in (run_cli(bad, *RUN), bundle_cli("verify", bad), bundle_cli("unpack", bad, "-o", tmp_path / "out")):
        assert_one_sentence(outcome, "not a packed bundle")
    assert os.listdir(tmp_path) == ["bad.dymoe"]


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    assert_one_sentence(run_cli(tmp_path / "text", *RUN), "not a packed bundle")


def test_any_changed_byte_of_a_packed_bundle_is_found_or_changes_nothing(packed_path: Path, tmp_path: Path) -> None:
    data, rng, path = packed_path.read_bytes(), random.Random(3), tmp_path / "p.dymoe"
    answer = run_cli(packed_path, *RUN).out
    for _ in range(40):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        outcome = run_cli(path, *RUN)
        if outcome.code:
            assert_one_sentence(outcome, str(tmp_path))
        else:
            assert outcome.out == answer


def test_unlisted_members_are_named_by_verify_and_change_nothing(packed_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.dymoe"
    shutil.copy(packed_path, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("chat_template.jinja", b"evil")
    assert_one_sentence(bundle_cli("verify", path), "chat_template.jinja: not a file of the bundle")
    assert run_cli(path, *RUN).out == run_cli(packed_path, *RUN).out


@pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
def test_unzip_reads_it(packed_path: Path) -> None:
    subprocess.run(["unzip", "-tqq", packed_path], check=True)
