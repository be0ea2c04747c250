"""What is at the output already, or comes there meanwhile, or is in the way of the work: none of it is ever lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compile_kit import same_files, without_stages
from helpers import assert_one_sentence, bundle_cli, compile_cli

from dymoe_compile.job import writer
from dymoe_compile.job.writer import BundleWriter
from dymoe_runtime import place
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.place import exchange, rename_new


@pytest.fixture(params=["renameat2", "without it"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "renameat2":
        monkeypatch.setattr(place, "_renameat2", lambda *args: False)


def directory(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.usefixtures("system")
def test_a_new_name_is_never_one_that_is_there(tmp_path: Path) -> None:
    source, full = directory(tmp_path / "source", "new"), directory(tmp_path / "full", "old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "plain").write_text("old")
    for there in ("full", "empty", "link", "plain"):
        with pytest.raises(FileExistsError):
            rename_new(source, tmp_path / there)
    assert (full / "file").read_text() == "old" and (source / "file").read_text() == "new"
    rename_new(source, tmp_path / "free")
    assert (tmp_path / "free" / "file").read_text() == "new" and not source.exists()


@pytest.mark.usefixtures("system")
def test_directories_change_places(tmp_path: Path) -> None:
    source, target = directory(tmp_path / "source", "new"), directory(tmp_path / "target", "old")
    before = exchange(source, target, tmp_path / "aside")
    assert (target / "file").read_text() == "new" and (before / "file").read_text() == "old"


def test_an_exchange_that_fails_puts_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_renameat2", lambda *args: False)
    target = directory(tmp_path / "target", "old")
    with pytest.raises(OSError):
        exchange(tmp_path / "missing", target, tmp_path / "aside")
    assert (target / "file").read_text() == "old"


def meanwhile(action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something when the bundle is complete, before it is put in its place."""
    flush = writer._flush

    def flushed(path: Path) -> None:
        if path.name == "bundle":
            action()
        flush(path)

    monkeypatch.setattr(writer, "_flush", flushed)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_comes_to_the_output_meanwhile_stays_and_the_next_run_goes_on(
    kind: str, tiny_checkpoint: Path, tiny_path: Path, calibration_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = tmp_path / "out.dymoe"

    def come() -> None:
        if kind == "directory":
            directory(output, "mine")
        elif kind == "file":
            output.write_text("mine")
        else:
            output.symlink_to("elsewhere")

    args = (tiny_checkpoint, "-o", output, "--calibration", calibration_text)
    with monkeypatch.context() as patch:
        meanwhile(come, patch)
        assert_one_sentence(without_stages(compile_cli(*args)), "out.dymoe", "move it away")
    if kind == "link":
        assert os.readlink(output) == "elsewhere"
    else:
        assert (output if kind == "file" else output / "file").read_text() == "mine"
    output.rename(tmp_path / "away")
    assert compile_cli(*args).code == 0
    assert same_files(tiny_path, output) and not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("system")
def test_a_file_that_comes_into_the_previous_bundle_stays(
    tiny_checkpoint: Path, damaged: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (tiny_checkpoint, "-o", damaged, "--calibration", calibration_text, "--seed", 3)
    with monkeypatch.context() as patch:
        meanwhile(lambda: (damaged / "notes.txt").write_text("mine"), patch)
        assert_one_sentence(without_stages(compile_cli(*args)), "damaged.dymoe", "other files")
    assert (damaged / "notes.txt").read_text() == "mine"
    assert Bundle.open(damaged).manifest.provenance["seed"] == 0
    (damaged / "notes.txt").unlink()
    assert compile_cli(*args).code == 0
    assert Bundle.open(damaged).manifest.provenance["seed"] == 3 and not list(damaged.parent.glob(".*"))


@pytest.mark.usefixtures("system")
def test_a_file_that_comes_in_the_last_moment_stays(
    tiny_checkpoint: Path, damaged: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last look, before the exchange."""
    real = writer.exchange

    def late(*paths: Path) -> Path:
        (damaged / "notes.txt").write_text("mine")
        monkeypatch.setattr(writer, "exchange", real)
        return real(*paths)

    monkeypatch.setattr(writer, "exchange", late)
    args = (tiny_checkpoint, "-o", damaged, "--calibration", calibration_text, "--seed", 3)
    assert_one_sentence(without_stages(compile_cli(*args)), "other files")
    assert (damaged / "notes.txt").read_text() == "mine"
    assert Bundle.open(damaged).manifest.provenance["seed"] == 0
    (damaged / "notes.txt").unlink()
    assert compile_cli(*args).code == 0 and not list(damaged.parent.glob(".*"))


def test_foreign_files_in_the_work_in_progress_stay(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    partial = tmp_path / ".out.dymoe.partial"
    (partial / "state").mkdir(parents=True)
    for path in (partial / "mine.txt", partial / "state" / "mine.txt"):
        path.write_text("mine")
    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    assert compile_cli(*args).code == 0
    assert sorted(path.name for path in partial.rglob("*")) == ["mine.txt", "mine.txt", "state"]


def test_links_in_the_work_in_progress_are_not_followed(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".a.dymoe.partial").symlink_to("elsewhere")
    args = ("--calibration", calibration_text)
    outcome = compile_cli(tiny_checkpoint, "-o", tmp_path / "a.dymoe", *args)
    assert_one_sentence(without_stages(outcome), ".a.dymoe.partial", "not a directory of yours")
    (tmp_path / ".b.dymoe.partial" / "bundle").mkdir(parents=True)
    (tmp_path / ".b.dymoe.partial" / "state").mkdir()
    for name in ("dense.safetensors.tmp", "report.html.tmp", "experts-00000.safetensors.tmp"):
        (tmp_path / ".b.dymoe.partial" / "bundle" / name).symlink_to(tmp_path / "victim")
    assert compile_cli(tiny_checkpoint, "-o", tmp_path / "b.dymoe", *args).code == 0
    assert (tmp_path / "victim").read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / ".c.dymoe.partial").mkdir()
    (tmp_path / ".c.dymoe.partial" / "lock").symlink_to(tmp_path / "victim")
    assert compile_cli(tiny_checkpoint, "-o", tmp_path / "c.dymoe", *args).code == 1


def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler that held it ended between this one's look at the file and its lock."""
    first = BundleWriter(tmp_path / "o.dymoe", {})
    flock, calls = writer.fcntl.flock, []

    def late(fd: int, how: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            first._remove_work()
            first.close()
        flock(fd, how)

    monkeypatch.setattr(writer.fcntl, "flock", late)
    second = BundleWriter(tmp_path / "o.dymoe", {})
    assert len(calls) == 2 and (tmp_path / ".o.dymoe.partial" / "lock").exists()
    second.close()


# A compile that is killed in the n-th of these calls, before or after it is done.
KILLED = """
import os, signal, sys
from dymoe_compile.job import writer
from dymoe_runtime import place
calls = 0
def killing(real):
    def called(*args, **kwargs):
        global calls
        calls += 1
        if calls == {number} and not {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real(*args, **kwargs)
        finally:
            if calls == {number} and {after}:
                os.kill(os.getpid(), signal.SIGKILL)
    return called
finish = writer.BundleWriter.finish
def last(self, manifest):
    place._renameat2, os.unlink, os.rmdir = killing(place._renameat2), killing(os.unlink), killing(os.rmdir)
    os.rename = killing(os.rename)
    finish(self, manifest)
    print("done")
writer.BundleWriter.finish = last
from dymoe_compile.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [1, 3, 9])  # `make faults` tries more
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_in_the_last_calls_leaves_the_old_or_the_new_bundle(
    number: int, after: bool, tiny_checkpoint: Path, damaged: Path, calibration_text: Path
) -> None:
    args = [tiny_checkpoint, "-o", damaged, "--calibration", calibration_text, "--seed", 3]
    script = KILLED.format(number=number, after=after)
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL and "done" not in done.stdout, done.stderr
    assert bundle_cli("verify", damaged).code == 0  # the old one or the new one, whole
    assert compile_cli(*args).code == 0
    assert Bundle.open(damaged).manifest.provenance["seed"] == 3
    assert bundle_cli("verify", damaged).code == 0 and not list(damaged.parent.glob(".*"))


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_a_rename_that_fails_is_one_sentence_and_loses_nothing(
    number: int, tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> bool:
        raise OSError(number, os.strerror(number), str(args[1]))

    args = (tiny_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    with monkeypatch.context() as patch:
        patch.setattr(place, "_renameat2", fail)
        assert_one_sentence(without_stages(compile_cli(*args)), "out.dymoe", os.strerror(number))
    assert compile_cli(*args).code == 0
