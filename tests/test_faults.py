"""What goes wrong while a bundle runs: a clear outcome each, in bounded time, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import limited
import pytest
from conftest import Outcome, assert_one_sentence, run_cli

from dymoe_runtime import model as model_module
from dymoe_runtime import room as room_module
from dymoe_runtime.budget import plan_budget
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.device import MARGIN
from dymoe_runtime.model import Model
from dymoe_runtime.options import RunOptions
from dymoe_runtime.read_queue import PATIENCE_S
from dymoe_runtime.store import least_arena_bytes

PROMPT = "The river flows through the town of"
# Reads of experts after which something happens: in the prompt, and among the tokens after it.
EARLY, LATE = 5, 330


def short_of_memory(bundle: Path, *args: object) -> Outcome:
    """An answer for which experts are read all the time."""
    arena = Bundle.open(bundle).expert_bytes() // 3
    return run_cli(bundle, "--prompt", PROMPT, "--max-tokens", 48, "--ignore-eos", "--arena", arena, *args)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]


def after_reads(count: int, action: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do `action(fd)` before each read of experts from the one with that number on."""
    real, done = os.preadv, [0]
    lock = threading.Lock()

    def preadv(fd: int, *args: object) -> int:
        if threading.current_thread() in readers():
            with lock:
                done[0] += 1
                if done[0] >= count:
                    action(fd)
        return real(fd, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("count", [EARLY, LATE])
def test_a_read_error_is_named_and_ends_the_run(
    count: int, shipped_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    whole = short_of_memory(shipped_path)
    after_reads(count, fail, monkeypatch)
    outcome = short_of_memory(shipped_path)
    assert_one_sentence(outcome, "experts-", "read error at offset", "Input/output error")
    assert len(outcome.out) < len(whole.out) and whole.out.startswith(outcome.out.rstrip("\n"))
    assert not readers()


@pytest.mark.parametrize("count", [EARLY, LATE])
@pytest.mark.parametrize("left", [0, 4096, 5000])
def test_a_file_that_is_cut_while_it_is_read_is_named(
    left: int, count: int, shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(shipped_path, tmp_path / "cut.dymoe"))
    whole = short_of_memory(copy)

    def cut(fd: int) -> None:
        for path in copy.glob("experts-*"):
            os.truncate(path, left)

    after_reads(count, cut, monkeypatch)
    outcome = short_of_memory(copy)
    assert_one_sentence(outcome, "experts-", "ends at offset", "missing")
    assert whole.out.startswith(outcome.out.rstrip("\n"))
    assert not readers()


# A run whose expert reads stall: for how long, and after how many of them.
STALLED = """
import itertools, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
real, reads = os.preadv, itertools.count(1)
def preadv(*args):
    number = next(reads) if threading.current_thread().name.startswith("reader-") else 0
    if number == {count}:
        print("stalled", file=sys.stderr, flush=True)
    if number >= {count}:
        time.sleep({seconds})
    return real(*args)
os.preadv = preadv
from dymoe_runtime.__main__ import run
run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("count", "seconds"), [(EARLY, 0.2), (LATE, 0.2), (LATE, 3600)])
def test_a_run_can_be_ended_in_mid_read(number: signal.Signals, count: int, seconds: float, shipped_path: Path) -> None:
    script = STALLED.format(count=count, seconds=seconds)
    arena = Bundle.open(shipped_path).expert_bytes() // 3
    command = [sys.executable, "-c", script, shipped_path, "--prompt", PROMPT, "--arena", arena, "--ignore-eos"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(arg) for arg in command], **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stderr.readline() == "stalled\n"
            time.sleep(0.1)
            process.send_signal(number)
            _, err = process.communicate(timeout=PATIENCE_S + 20)
        finally:
            process.kill()
    word, code = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}[number]
    assert (process.returncode, err.splitlines()[-1].split()[-1]) == (code, word) and "Traceback" not in err


def test_a_limit_that_is_lowered_is_heeded(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [[], []]
    monkeypatch.setattr(room_module, "LOOK_S", 0.0)
    # What a prompt takes of the arena is more than half of this small model's.
    monkeypatch.setattr(
        model_module, "plan_budget", lambda *args, **kwargs: replace(plan_budget(*args, **kwargs), spare=0)
    )
    for lowered, decoded in zip((False, True), tokens, strict=True):
        with Model(shipped, RunOptions(tier=4, context=256)) as model:
            logits = model.prefill(list(range(40)))
            before = model.store.arena_bytes
            for number in range(24):
                if lowered and number == 8:
                    assert model.store.arena_bytes == before
                    limit = model.budget.need + shipped.expert_bytes() // 4
                    for name in ("imposed_limit", "memory_limit"):
                        monkeypatch.setattr(room_module, name, lambda: limit)  # noqa: B023
                decoded.append(int(logits.argmax()))
                logits = model.decode(decoded[-1])
            assert (model.store.arena_bytes < before // 2) == lowered
            assert model.store.resident_bytes() <= model.store.arena_bytes
            if lowered:
                for name in ("imposed_limit", "memory_limit"):
                    monkeypatch.setattr(room_module, name, lambda: 1 << 20)
                with pytest.raises(Exception, match=r"limit has been lowered to 1\.0 MiB"):
                    model.decode(1)
    assert tokens[0] == tokens[1]
    assert not readers()


def test_a_limit_that_was_as_low_from_the_start_changes_nothing(
    shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for more memory than the limit leaves without its margin gets it."""
    monkeypatch.setattr(room_module, "LOOK_S", 0.0)
    monkeypatch.setattr(room_module, "imposed_limit", lambda: 1 << 20)
    monkeypatch.setattr(model_module, "cgroup_limits", lambda: iter(()))
    with Model(shipped, RunOptions(tier=4, context=256, memory_bytes=4 << 30)) as model:
        before = model.store.arena_bytes
        model.prefill([1, 2, 3])
        assert model.store.arena_bytes == before


# A run that says the least memory that it needs, looks at its limit often, takes its time, and lends a prompt nothing.
SLOWLY = """
import dataclasses, sys, time
from dymoe_runtime import model, room
room.LOOK_S, decode, plan = 0.02, model.Model.decode, model.plan_budget
model.plan_budget = lambda *args, **kwargs: dataclasses.replace(plan(*args, **kwargs), spare=0)
def slowly(self, token_id):
    if not self.stats.decode.tokens:
        print(self.budget.need, file=sys.stderr, flush=True)
    time.sleep(0.005)
    return decode(self, token_id)
model.Model.decode = slowly
from dymoe_runtime.__main__ import run
run()
"""


@contextmanager
def inside(limit: AbstractContextManager[Path | None], *args: object) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The SLOWLY run in a cgroup of the kernel's, once it has begun to answer; skips where there is none to be had."""
    try:
        group = limit.__enter__()
    except (OSError, SystemExit) as error:
        pytest.skip(f"no cgroup may be made here: {error}")
    assert group is not None
    command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-u", "-c", SLOWLY]
    command += [str(arg) for arg in ("--prompt", PROMPT, "--ignore-eos", "--json", *args)]
    process = subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.read(1)
        yield process, group
    finally:
        process.kill()
        process.wait()
        limit.__exit__(None, None, None)


@pytest.mark.parametrize("spare", [6 << 20, -(20 << 20)])
def test_a_limit_of_the_kernel_that_is_lowered_is_heeded(spare: int, shipped: Bundle) -> None:
    """Version 1 lets nobody lower it below what is in use; with version 2 memory.high does."""
    options = (shipped.path, "--tiers", 4, "--max-tokens", 400)
    with inside(limited.memory_limit(1 << 30), *options) as (process, _):
        whole = json.loads(process.communicate(timeout=60)[0].splitlines()[-1])
    with inside(limited.memory_limit(1 << 30), *options) as (process, group):
        assert process.stderr is not None
        lowered = int((int(process.stderr.readline()) + spare) / (1 - MARGIN))
        try:
            if (group / "memory.high").exists():
                (group / "memory.high").write_text(str(lowered))
            else:
                limited.set_memory_limit(group, lowered)
        except OSError as error:
            pytest.skip(f"the kernel does not lower it: {error}")
        out, err = (text.decode() for text in process.communicate(timeout=60))
    assert err.count("\n") <= 1
    if spare < 0:
        assert process.returncode == 1 and "has been lowered" in err, err
        return
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["text"] == whole["text"]
    assert least_arena_bytes(shipped.layout) <= result["arena_bytes"] < whole["arena_bytes"]


def test_a_slow_disk_slows_down_and_changes_nothing_else(shipped: Bundle) -> None:
    options = (shipped.path, "--tiers", 4, "--max-tokens", 24, "--arena", shipped.expert_bytes() // 3)
    whole = run_cli(*options, "--prompt", PROMPT, "--ignore-eos", "--json").json
    with inside(limited.disk_limit(whole["read_bytes"] // 8, shipped.path), *options) as (process, _):
        out, err = (text.decode() for text in process.communicate(timeout=90))
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["text"] == whole["text"]
    assert result["wait_s"] > max(1.0, whole["wait_s"])  # of eight seconds of reading


def test_an_interrupt_ends_a_run_on_a_slow_disk(shipped: Bundle) -> None:
    options = (shipped.path, "--tiers", 4, "--max-tokens", 400, "--arena", shipped.expert_bytes() // 3)
    with inside(limited.disk_limit(4 << 20, shipped.path), *options) as (process, _):
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S + 20)
    assert process.returncode == 143 and b"Traceback" not in err


def test_a_model_that_cannot_be_loaded_leaves_no_threads(damaged: Path) -> None:
    data = bytearray((damaged / "dense.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "dense.safetensors").write_bytes(data)
    outcome = run_cli(damaged, "--prompt", "a")
    assert outcome.code == 1
    assert not readers()


def test_a_bundle_compared_with_itself_hardly_differs_and_leaves_no_threads(shipped_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(PROMPT)
    outcome = run_cli(shipped_path, "--eval", text, "--reference", shipped_path, "--tiers", 4, "--json")
    assert outcome.code == 0, outcome.err
    assert abs(outcome.json["files"][0]["kl"]) < 0.005  # of the KV cache, which the reference has none of
    assert not readers()


UNCLOSED = """
import time
from dymoe_runtime.read_queue import Read, ReadQueue

def read(*args):
    begun.append(args)
    time.sleep(0.5)
    print("ended")

begun = []
queue = ReadQueue(read)
queue.submit(Read(None, 0, []))
while not begun:
    time.sleep(0.01)
"""


def test_a_program_that_leaves_a_model_open_ends_after_its_reads() -> None:
    done = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, timeout=PATIENCE_S + 20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
