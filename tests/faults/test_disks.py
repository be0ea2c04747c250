"""Disks that fill up or fail, and limits of the system: one sentence each, and what was there is there."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from faults.conftest import Inputs
from faults.kit import Place, contents, is_one_sentence, lines_of, mounted
from fuzz.campaign import Run

TEXT = ("--prompt", "The river", "--max-tokens", 6, "--ignore-eos", "--threads", 1, "--context", 64)
READ_AGAIN = (*TEXT, "--arena", 50000)


def check(run: Run, *words: str) -> None:
    assert is_one_sentence(run, *words), (run.code, run.out[-300:], run.err[-600:])


# A compilation


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("write 28 30000", "disk is full"),
        ("write 122 100000", "disk is full"),
        ("write 5 20", "Input/output error; check the disk"),
        ("sync 5 3", "Input/output error; check the disk"),
        ("rename 13 4", "Permission denied"),
        ("change 24 40", "ulimit -n"),
    ],
)
def test_a_disk_that_fails_gets_one_sentence_and_keeps_the_old_bundle(
    fault: str, words: str, inputs: Inputs, tmp_path: Path
) -> None:
    place = Place(tmp_path / "place", inputs.bundle)
    run = inputs.compile(place.output, "--seed", 5, faults=f"{fault} /place/")
    check(run, words)
    assert "/place/" in lines_of(run)[0]
    assert contents(place.output) == contents(inputs.bundle) and place.lost() is None


@pytest.mark.parametrize("after", [0, 20])
def test_a_checkpoint_that_cannot_be_read_is_named(after: int, inputs: Inputs, tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    run = inputs.compile(place.output, faults=f"read 5 {after} {inputs.model}")
    check(run, "Input/output error")
    assert str(inputs.model) in lines_of(run)[0] and place.lost() is None and not place.output.exists()


@pytest.mark.parametrize("after", [0, 5])
def test_work_in_progress_that_cannot_be_read_is_done_again_or_named(
    after: int, inputs: Inputs, tmp_path: Path
) -> None:
    place = Place(tmp_path / "place")
    assert inputs.compile(place.output, faults="change kill 80 /place/").code > 1000
    run = inputs.compile(place.output, faults=f"read 5 {after} /place/")
    assert run.code == 0 or is_one_sentence(run, "Input/output error"), run.err
    assert inputs.compile(place.output).code == 0 and contents(place.output) == contents(inputs.bundle)


def test_a_read_only_folder_is_named(inputs: Inputs, tmp_path: Path) -> None:
    with mounted(tmp_path / "ro", "ro") as allowed:
        if not allowed:
            pytest.skip("mounting is not permitted here")
        check(inputs.compile(tmp_path / "ro" / "out.dymoe"), "Read-only file system")
        check(inputs.compile(tmp_path / "ro" / "sub" / "out.dymoe"), "Read-only file system")
        for args in (("--trace", "t"), ("--session", "s"), ("--warm-set", "w")):
            run = inputs.server.run("dymoe-run", inputs.bundle, *TEXT, args[0], tmp_path / "ro" / args[1])
            check(run, "Read-only file system", "is not writable", "written")


@pytest.mark.parametrize("kib", [16, 300])
def test_a_small_file_system_loses_nothing(kib: int, inputs: Inputs, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", f"size={kib}k") as allowed:
        if not allowed:
            pytest.skip("mounting is not permitted here")
        check(inputs.compile(tmp_path / "small" / "out.dymoe"), "disk is full")


def test_the_output_may_be_on_another_file_system(inputs: Inputs, tmp_path: Path) -> None:
    with mounted(tmp_path / "other") as allowed:
        if not allowed:
            pytest.skip("mounting is not permitted here")
        (tmp_path / "link.dymoe").symlink_to(tmp_path / "other" / "out.dymoe")
        for output in (tmp_path / "link.dymoe", tmp_path / "other" / "out.dymoe"):
            run = inputs.compile(output)
            assert run.code == 0, run.err
        assert contents(tmp_path / "other" / "out.dymoe") == contents(inputs.bundle)
        check(inputs.compile(tmp_path / "other"), "choose another place")


REMOVED = ("work", "bundle of the work", "parent", "model")


@pytest.mark.parametrize("what", REMOVED)
def test_a_folder_that_is_removed_meanwhile_gets_one_sentence(what: str, inputs: Inputs, tmp_path: Path) -> None:
    model = Path(shutil.copytree(inputs.model, tmp_path / "model"))
    (tmp_path / "parent").mkdir()
    output = tmp_path / "parent" / "out.dymoe"
    partial = output.with_name(".out.dymoe.partial")
    gone = {"work": partial, "bundle of the work": partial / "bundle", "parent": output.parent, "model": model}[what]

    def remove() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (partial / "bundle" / "dense.safetensors").exists():
            time.sleep(0.0005)
        os.rename(gone, tmp_path / "gone")

    thread = threading.Thread(target=remove)
    thread.start()
    args = ("--calibration", inputs.compile.text, "--calibration-tokens", 512, "--jobs", 1)
    run = inputs.server.run("dymoe-compile", model, "-o", output, *args)
    thread.join()
    if what == "model" and run.code == 0:
        return  # all of it had been read
    check(run, "No such file or directory", "no such file")


# Limits of the process


@pytest.mark.parametrize(
    ("limits", "words"),
    [({"RLIMIT_FSIZE": 20000}, "ulimit -f"), ({"RLIMIT_NOFILE": 9}, "ulimit -n")],
)
def test_a_limit_of_the_process_is_named(limits: dict[str, int], words: str, inputs: Inputs, tmp_path: Path) -> None:
    place = Place(tmp_path / "place", inputs.bundle)
    run = inputs.compile(place.output, "--seed", 4, limits=limits)
    assert run.code == 0 or is_one_sentence(run, words, "open files"), run.err
    assert place.lost() is None
    if run.code:
        assert contents(place.output) == contents(inputs.bundle)
    run = inputs.server.run("dymoe-run", inputs.bundle, *TEXT, "--session", tmp_path / "s", limits=limits)
    assert run.code == 0 or is_one_sentence(run, words, "open files", "File too large"), (run.code, run.err)
    assert run.code == 0 or not (tmp_path / "s").exists()


def test_a_folder_for_temporary_files_that_is_missing_changes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path / "missing")}
    assert inputs.compile(tmp_path / "out.dymoe", env=env).code == 0
    assert inputs.server.run("dymoe-run", tmp_path / "out.dymoe", *TEXT, "--session", tmp_path / "s", env=env).code == 0


# What is at the output


NAMES = ("ö \n\x1b\udcff.dymoe", "x" * 240, "y" * 300)


@pytest.mark.parametrize("name", NAMES)
def test_strange_names_work_or_get_one_sentence(name: str, inputs: Inputs, tmp_path: Path) -> None:
    run = inputs.compile(tmp_path / name)
    if len(name) > 200 and run.code:
        check(run, "name")
        assert not list(tmp_path.iterdir())
        return
    assert run.code == 0, run.err
    assert contents(tmp_path / name) == contents(inputs.bundle)
    for command in (("dymoe-run", tmp_path / name, *TEXT), ("dymoe-bundle", "verify", tmp_path / name, "--json")):
        assert inputs.server.run(*command).code == 0
    run = inputs.server.run(
        "dymoe-bundle", "replay", tmp_path / name, inputs.trace, "--plot", tmp_path / f"{name}.html"
    )
    assert run.code == 0, run.err


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "dangling link", "loop"])
def test_what_is_at_the_output_stays(kind: str, inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    elif kind == "folder":
        output.mkdir()
        (output / "file").write_text("mine")
    elif kind == "pipe":
        os.mkfifo(output)
    else:
        output.symlink_to("target" if kind == "dangling link" else "out")
    run = inputs.compile(output)
    if kind == "dangling link":
        assert run.code == 0 and output.is_symlink() and (tmp_path / "target").is_dir()
        return
    check(run)
    assert kind != "file" or output.read_text() == "mine"
    assert kind != "folder" or (output / "file").read_text() == "mine"
    assert kind != "pipe" or output.is_fifo()


# A run


@pytest.mark.parametrize("after", [0, 4, 12, 30])
@pytest.mark.parametrize("name", ["experts-", "dense", "manifest", "policy", "tokenizer", "look_ahead"])
def test_a_bundle_that_cannot_be_read_is_named_and_never_becomes_other_text(
    name: str, after: int, inputs: Inputs
) -> None:
    whole = inputs.server.run("dymoe-run", inputs.bundle, *READ_AGAIN)
    run = inputs.server.run("dymoe-run", inputs.bundle, *READ_AGAIN, faults=f"read 5 {after} {inputs.bundle}/{name}")
    if run.code == 0:  # there were not so many reads
        assert run.out == whole.out and (after or run.calls == 0)
        return
    check(run, "Input/output error")
    assert whole.out.startswith(run.out.rstrip("\n"))


@pytest.mark.parametrize("command", [("bundle", "verify"), ("bundle", "inspect"), ("run", "probe"), ("run", "bench")])
@pytest.mark.parametrize("after", [0, 5])
def test_other_commands_name_what_cannot_be_read(command: tuple[str, str], after: int, inputs: Inputs) -> None:
    name, what = command
    args = ("--new-tokens", 4, "--prompt-tokens", 8) if what == "bench" else ()
    run = inputs.server.run(f"dymoe-{name}", what, inputs.bundle, *args, faults=f"read 5 {after} {inputs.bundle}/")
    lines = lines_of(run)
    assert run.code == 1 and "Traceback" not in run.err and lines and "Input/output error" in lines[-1], run.err
    assert what == "verify" or len(lines) == 1


WRITERS: dict[str, tuple[object, ...]] = {
    "session": ("dymoe-run", "BUNDLE", *TEXT, "--session", "FILE"),
    "trace": ("dymoe-run", "BUNDLE", *TEXT, "--trace", "FILE"),
    "warm set": ("dymoe-run", "BUNDLE", *READ_AGAIN, "--warm-set", "FILE"),
    "plot": ("dymoe-bundle", "replay", "BUNDLE", "TRACE", "--plot", "FILE"),
}


@pytest.mark.parametrize("fault", ["write 28 20", "sync 5 0", "rename 13 0", "change 30 0"])
@pytest.mark.parametrize("what", WRITERS)
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(
    what: str, fault: str, inputs: Inputs, tmp_path: Path
) -> None:
    places: dict[object, object] = {"BUNDLE": inputs.bundle, "TRACE": inputs.trace, "FILE": tmp_path / "w" / "file"}
    args = [places.get(arg, arg) for arg in WRITERS[what]]
    (tmp_path / "w").mkdir()
    assert inputs.server.run(*map(str, args)).code == 0
    before = (tmp_path / "w" / "file").read_bytes()
    run = inputs.server.run(*map(str, args), faults=f"{fault} {tmp_path}/w/")
    if what == "trace":  # it is written as the run goes on, and neither flushed to the disk nor renamed
        assert run.code == 0 or is_one_sentence(run, "file"), run.err
        return
    check(run, "file")
    assert (tmp_path / "w" / "file").read_bytes() == before and os.listdir(tmp_path / "w") == ["file"]


FULL_OUTPUTS: dict[str, tuple[object, ...]] = {
    "text": ("dymoe-run", "BUNDLE", *TEXT),
    "json": ("dymoe-run", "BUNDLE", *TEXT, "--json"),
    "chat": ("dymoe-run", "chat", "BUNDLE", *TEXT, "--session", "FILE"),
    "bench": ("dymoe-run", "bench", "BUNDLE", "--new-tokens", 2, "--prompt-tokens", 4),
    "inspect": ("dymoe-bundle", "inspect", "BUNDLE"),
    "digest": ("dymoe-bundle", "digest", "BUNDLE"),
    "verify": ("dymoe-bundle", "verify", "BUNDLE", "--json"),
    "replay": ("dymoe-bundle", "replay", "BUNDLE", "TRACE"),
    "supported": ("dymoe-compile", "--supported"),
    "help": ("dymoe-run", "--help"),
}


@pytest.mark.parametrize("what", FULL_OUTPUTS)
def test_output_that_no_disk_takes_is_an_error(what: str, inputs: Inputs, tmp_path: Path) -> None:
    places: dict[object, object] = {"BUNDLE": inputs.bundle, "TRACE": inputs.trace, "FILE": tmp_path / "file"}
    args = [str(places.get(arg, arg)) for arg in FULL_OUTPUTS[what]]
    check(inputs.server.run(*args, stdout="/dev/full"), "No space left")
    if what == "chat":
        assert (tmp_path / "file").exists()  # what was said is kept


def test_errors_of_any_number_end_a_run_in_one_sentence(inputs: Inputs) -> None:
    for number in (errno.EIO, errno.EACCES, errno.ESTALE, errno.ENODEV):
        fault: Any = f"read {number} 2 {inputs.bundle}/experts-"
        check(inputs.server.run("dymoe-run", inputs.bundle, *READ_AGAIN, faults=fault), os.strerror(number))
