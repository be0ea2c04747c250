"""What is at the output already, or comes there meanwhile, or is in the way of the work: none of it is ever lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compile_kit import same_files, without_stages
from helpers import EIGHT_BITS, assert_one_sentence, bundle_cli, compile_cli, compiled, save_tiny

from dymoe_compile.job import writer
from dymoe_compile.job.writer import BundleWriter
from dymoe_runtime import place
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.place import exchange, rename_new


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that compiles in a third of a second: what the weights are does not matter here. Read only."""
    sizes = dict(num_hidden_layers=1, num_experts=2, num_experts_per_tok=1, hidden_size=16, moe_intermediate_size=8)
    return save_tiny(tmp_path_factory.mktemp("small"), "qwen3_moe", head_dim=8, **sizes)


@pytest.fixture(scope="module")
def small_path(small_checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint, compiled. Read only."""
    return compiled(small_checkpoint, tmp_path_factory.mktemp("small-bundle") / "small.dymoe", calibration_text)


@pytest.fixture
def previous(small_path: Path, tmp_path: Path) -> Path:
    """A copy of it that a test compiles anew."""
    return Path(shutil.copytree(small_path, tmp_path / "previous.dymoe"))


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
    kind: str, small_checkpoint: Path, small_path: Path, calibration_text: Path, tmp_path: Path,
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

    args = (small_checkpoint, "-o", output, "--calibration", calibration_text, *EIGHT_BITS)
    with monkeypatch.context() as patch:
        meanwhile(come, patch)
        assert_one_sentence(without_stages(compile_cli(*args)), "out.dymoe", "move it away")
    if kind == "link":
        assert os.readlink(output) == "elsewhere"
    else:
        assert (output if kind == "file" else output / "file").read_text() == "mine"
    output.rename(tmp_path / "away")
    assert compile_cli(*args).code == 0
    assert same_files(small_path, output) and not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("system")
def test_a_file_that_comes_into_the_previous_bundle_stays(
    small_checkpoint: Path, previous: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (small_checkpoint, "-o", previous, "--calibration", calibration_text, "--seed", 3)
    with monkeypatch.context() as patch:
        meanwhile(lambda: (previous / "notes.txt").write_text("mine"), patch)
        assert_one_sentence(without_stages(compile_cli(*args)), "previous.dymoe", "other files")
    assert (previous / "notes.txt").read_text() == "mine"
    assert Bundle.open(previous).manifest.provenance["seed"] == 0
    (previous / "notes.txt").unlink()
    assert compile_cli(*args).code == 0
    assert Bundle.open(previous).manifest.provenance["seed"] == 3 and not list(previous.parent.glob(".*"))


@pytest.mark.usefixtures("system")
def test_a_file_that_comes_in_the_last_moment_stays(
    small_checkpoint: Path, previous: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last look, before the exchange."""
    real = writer.exchange

    def late(*paths: Path) -> Path:
        (previous / "notes.txt").write_text("mine")
        monkeypatch.setattr(writer, "exchange", real)
        return real(*paths)

    monkeypatch.setattr(writer, "exchange", late)
    args = (small_checkpoint, "-o", previous, "--calibration", calibration_text, "--seed", 3)
    assert_one_sentence(without_stages(compile_cli(*args)), "other files")
    assert (previous / "notes.txt").read_text() == "mine"
    assert Bundle.open(previous).manifest.provenance["seed"] == 0
    (previous / "notes.txt").unlink()
    assert compile_cli(*args).code == 0 and not list(previous.parent.glob(".*"))


def test_foreign_files_in_the_work_in_progress_stay(
    small_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    partial = tmp_path / ".out.dymoe.partial"
    (partial / "state").mkdir(parents=True)
    for path in (partial / "mine.txt", partial / "state" / "mine.txt"):
        path.write_text("mine")
    args = (small_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    assert compile_cli(*args).code == 0
    assert sorted(path.name for path in partial.rglob("*")) == ["mine.txt", "mine.txt", "state"]


def test_links_in_the_work_in_progress_are_not_followed(
    small_checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".a.dymoe.partial").symlink_to("elsewhere")
    args = ("--calibration", calibration_text)
    outcome = compile_cli(small_checkpoint, "-o", tmp_path / "a.dymoe", *args)
    assert_one_sentence(without_stages(outcome), ".a.dymoe.partial", "not a directory of yours")
    (tmp_path / ".b.dymoe.partial" / "bundle").mkdir(parents=True)
    (tmp_path / ".b.dymoe.partial" / "state").mkdir()
    for name in ("dense.safetensors.tmp", "report.html.tmp", "experts-00000.safetensors.tmp"):
        (tmp_path / ".b.dymoe.partial" / "bundle" / name).symlink_to(tmp_path / "victim")
    assert compile_cli(small_checkpoint, "-o", tmp_path / "b.dymoe", *args).code == 0
    assert (tmp_path / "victim").read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / ".c.dymoe.partial").mkdir()
    (tmp_path / ".c.dymoe.partial" / "lock").symlink_to(tmp_path / "victim")
    assert compile_cli(small_checkpoint, "-o", tmp_path / "c.dymoe", *args).code == 1


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


# Compiles, each killed in the n-th of these calls, before or after it is done. They are forks of a process that has
# imported everything and runs nothing, because the imports take ten times as long as such a compile.
KILLED = """
import json, os, signal, sys
from dymoe_compile.__main__ import main
from dymoe_compile.job import writer
from dymoe_runtime import place
import dymoe_compile.cli
calls = 0
def killing(real, number, after):
    def called(*args, **kwargs):
        global calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real(*args, **kwargs)
        finally:
            if calls == number and after:
                os.kill(os.getpid(), signal.SIGKILL)
    return called
def compile(number, after, args):
    finish = writer.BundleWriter.finish
    def last(self, manifest):
        for module, name in ((place, "_renameat2"), (os, "unlink"), (os, "rmdir"), (os, "rename")):
            setattr(module, name, killing(getattr(module, name), number, after))
        finish(self, manifest)
    writer.BundleWriter.finish = last
    sys.argv = ["dymoe-compile", *args]
    main()
statuses = []
for case in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        compile(*case)
    statuses.append(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""
KILLS = [(number, after) for number in (1, 3, 9) for after in (False, True)]  # `make faults` tries more


@pytest.fixture(scope="module")
def killed(
    small_checkpoint: Path, small_path: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, bool], tuple[int, Path]]:
    """Of each kill: how the compile ended, and its output, which had a bundle before."""
    folder = tmp_path_factory.mktemp("killed")
    outputs = [folder / f"{number}-{after}" / "out.dymoe" for number, after in KILLS]
    cases = []
    for (number, after), output in zip(KILLS, outputs, strict=True):
        shutil.copytree(small_path, output)
        args = (small_checkpoint, "-o", output, "--calibration", calibration_text, "--seed", 3)
        cases.append((number, after, [str(arg) for arg in args]))
    command = [sys.executable, "-c", KILLED, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(KILLS, zip(json.loads(done.stdout.splitlines()[-1]), outputs, strict=True), strict=True))


@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_in_the_last_calls_leaves_the_old_or_the_new_bundle(
    kill: tuple[int, bool], killed: dict[tuple[int, bool], tuple[int, Path]], small_checkpoint: Path,
    calibration_text: Path,
) -> None:  # fmt: skip
    status, output = killed[kill]
    assert status == signal.SIGKILL
    assert bundle_cli("verify", output).code == 0  # the old one or the new one, whole
    assert compile_cli(small_checkpoint, "-o", output, "--calibration", calibration_text, "--seed", 3).code == 0
    assert Bundle.open(output).manifest.provenance["seed"] == 3
    assert bundle_cli("verify", output).code == 0 and not list(output.parent.glob(".*"))


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_a_rename_that_fails_is_one_sentence_and_loses_nothing(
    number: int, small_checkpoint: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> bool:
        raise OSError(number, os.strerror(number), str(args[1]))

    args = (small_checkpoint, "-o", tmp_path / "out.dymoe", "--calibration", calibration_text)
    with monkeypatch.context() as patch:
        patch.setattr(place, "_renameat2", fail)
        assert_one_sentence(without_stages(compile_cli(*args)), "out.dymoe", os.strerror(number))
    assert compile_cli(*args).code == 0
