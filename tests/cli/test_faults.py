"""What goes wrong while a bundle runs: a clear outcome each, in bounded time, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import limited
import pytest
from helpers import Outcome, assert_one_sentence, reader_threads, run_cli

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli import measure as measure_module
from dymoe_runtime.engine.load import load_model, load_scorer
from dymoe_runtime.engine.model import Scorer
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.process import MARGIN, resident_bytes
from dymoe_runtime.store.arena import min_arena_bytes
from dymoe_runtime.store.read_queue import PATIENCE_S
from dymoe_runtime.store.record_reader import RecordReader
from dymoe_runtime.store.request import Source
from dymoe_runtime.tools import evaluate as evaluate_module

PROMPT = "The river flows through the town of"
# Reads of experts after which something happens: in the prompt, and among the tokens after it.
EARLY, LATE = 5, 330


def short_of_memory(bundle: Path, *args: object) -> Outcome:
    """An answer for which experts are read all the time."""
    arena = Bundle.open(bundle).expert_bytes() // 3
    return run_cli(bundle, "--prompt", PROMPT, "--max-tokens", 48, "--ignore-eos", "--arena", arena, *args)


def after_reads(count: int, action: Callable[[Source], Source], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from what `action` says instead, from the read of experts with that number on."""
    real, done = RecordReader.__call__, [0]

    def changed(self: RecordReader, *what: Any) -> Source:
        done[0] += 1
        source = real(self, *what)
        return action(source) if done[0] >= count else source

    monkeypatch.setattr(RecordReader, "__call__", changed)


@pytest.mark.skipif(not os.access("/proc/self/mem", os.R_OK), reason="there is no file that cannot be read")
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("count", [EARLY, LATE])
def test_a_read_error_is_named_and_ends_the_run(
    count: int, compiled: bool, shipped_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = short_of_memory(shipped_path)
    with open("/proc/self/mem", "rb") as unreadable:  # nothing is mapped where it begins
        after_reads(count, lambda source: source._replace(fd=unreadable.fileno(), offset=0), monkeypatch)
        if not compiled:  # then the store reads with threads of Python's
            monkeypatch.setattr(type(load_kernels()), "reads", None)
        outcome = short_of_memory(shipped_path)
    assert_one_sentence(outcome, "experts-", "read error at offset", "Input/output error")
    assert len(outcome.out) < len(whole.out) and whole.out.startswith(outcome.out.rstrip("\n"))
    assert not reader_threads()


@pytest.mark.parametrize("count", [EARLY, LATE])
@pytest.mark.parametrize("left", [0, 4096, 5000])
def test_a_file_that_is_cut_while_it_is_read_is_named(
    left: int, count: int, shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(shipped_path, tmp_path / "cut.dymoe"))
    whole = short_of_memory(copy)

    def cut(source: Source) -> Source:
        for path in copy.glob("experts-*"):
            os.truncate(path, left)
        return source

    after_reads(count, cut, monkeypatch)
    outcome = short_of_memory(copy)
    assert_one_sentence(outcome, "experts-", "ends at offset", "missing")
    assert whole.out.startswith(outcome.out.rstrip("\n"))
    assert not reader_threads()


# A run whose expert reads stall: for how long, and after how many of them.
STALLED = """
import itertools, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
from dymoe_runtime.store.record_reader import RecordReader
real, reads = RecordReader.__call__, itertools.count(1)
def called(self, *what):
    source, number = real(self, *what), next(reads)
    def stall(buffers):
        if number == {count}:
            print("stalled", file=sys.stderr, flush=True)
        time.sleep({seconds})
        if source.then:
            source.then(buffers)
    return source if number < {count} else source._replace(then=stall)
RecordReader.__call__ = called
from dymoe_runtime.cli.__main__ import run
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


# A run that says the least memory that it needs, looks at its limit often, takes its time, and lends a prompt nothing.
SLOWLY = """
import dataclasses, functools, sys, time
from dymoe_runtime.engine import load, model
decode, plan = model.Model.decode, load.plan_budget
load.ArenaSizer = functools.partial(load.ArenaSizer, interval_s=0.02)
load.plan_budget = lambda *args, **kwargs: dataclasses.replace(plan(*args, **kwargs), spare_bytes=0)
def slowly(self, token_id):
    if not self.stats.decode.tokens:
        print(self.budget.need_bytes, file=sys.stderr, flush=True)
    time.sleep(0.005)
    return decode(self, token_id)
model.Model.decode = slowly
from dymoe_runtime.cli.__main__ import run
run()
"""


@contextmanager
def inside(limit: AbstractContextManager[Path | None], *args: object) -> Iterator[tuple[subprocess.Popen, Path, int]]:
    """The SLOWLY run in a cgroup of the kernel's, once it decodes, and the memory that it needs.

    Skips the test where no cgroup can be made.
    """
    try:
        group = limit.__enter__()
    except (OSError, SystemExit) as error:
        pytest.skip(f"no cgroup may be made here: {error}")
    assert group is not None
    command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-u", "-c", SLOWLY]
    command += [str(arg) for arg in ("--prompt", PROMPT, "--ignore-eos", "--json", *args)]
    process = subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        yield process, group, int(process.stderr.readline())
    finally:
        process.kill()
        process.wait()
        limit.__exit__(None, None, None)


@pytest.mark.parametrize("spare", [6 << 20, -(20 << 20)])
def test_a_limit_of_the_kernel_that_is_lowered_is_heeded(spare: int, shipped: Bundle) -> None:
    """Version 1 lets nobody lower it below what is in use; with version 2 memory.high does."""
    options = (shipped.path, "--tiers", 4, "--max-tokens", 400)
    with inside(limited.memory_limit(1 << 30), *options) as (process, *_):
        whole = json.loads(process.communicate(timeout=60)[0].splitlines()[-1])
    with inside(limited.memory_limit(1 << 30), *options) as (process, group, need_bytes):
        lowered = int((need_bytes + spare) / (1 - MARGIN))
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
    assert min_arena_bytes(shipped.layout) <= result["arena_bytes"] < whole["arena_bytes"]


def test_a_slow_disk_slows_down_and_changes_nothing_else(shipped: Bundle) -> None:
    options = (shipped.path, "--tiers", 4, "--max-tokens", 24, "--arena", shipped.expert_bytes() // 3)
    whole = run_cli(*options, "--prompt", PROMPT, "--ignore-eos", "--json").json
    with inside(limited.disk_limit(whole["read_bytes"] // 8, shipped.path), *options) as (process, *_):
        out, err = (text.decode() for text in process.communicate(timeout=90))
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["text"] == whole["text"]
    assert result["wait_s"] > max(1.0, whole["wait_s"])  # of eight seconds of reading


def test_an_interrupt_ends_a_run_on_a_slow_disk(shipped: Bundle) -> None:
    options = (shipped.path, "--tiers", 4, "--max-tokens", 400, "--arena", shipped.expert_bytes() // 3)
    with inside(limited.disk_limit(4 << 20, shipped.path), *options) as (process, *_):
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S + 20)
    assert process.returncode == 143 and b"Traceback" not in err


def test_a_model_that_cannot_be_loaded_leaves_no_threads(damaged: Path) -> None:
    data = bytearray((damaged / "dense.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "dense.safetensors").write_bytes(data)
    outcome = run_cli(damaged, "--prompt", "a")
    assert outcome.code == 1
    assert not reader_threads()


def test_a_bundle_compared_with_itself_hardly_differs_and_leaves_no_threads(shipped_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(PROMPT)
    outcome = run_cli(shipped_path, "--eval", text, "--reference", shipped_path, "--tiers", 4, "--json")
    assert outcome.code == 0, outcome.err
    assert abs(outcome.json["files"][0]["kl"]) < 0.005  # of the KV cache, which the reference has none of
    assert not reader_threads()


UNCLOSED = """
import time
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.store.request import Read, Source
from dymoe_runtime.store.read_queue import ReadQueue
from dymoe_runtime.store.read_threads import start_threads

def read(buffers):
    begun.append(buffers)
    time.sleep(0.5)
    print("ended")

begun = []
queue = ReadQueue(lambda *what: Source(-1, None, 0, read), None, start_threads(load_kernels().reads, 2))
queue.submit(Read(None, 0, []))
while not begun:
    time.sleep(0.01)
"""


def test_a_program_that_leaves_a_model_open_ends_after_its_reads() -> None:
    done = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, timeout=PATIENCE_S + 20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


ALONE = """
import numpy as np
from dymoe_runtime.kernels import load_kernels
kernels = load_kernels(threads=8)
assert (kernels.matmul(np.ones((64, 2048), np.float32), np.ones((512, 2048), np.float32)) == 2048).all()
print(kernels.threads())
from dymoe_runtime.cli.__main__ import run
run()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how large the stacks of threads are")
@pytest.mark.skipif(load_kernels().compiled_isa is None, reason="the reference has no threads of its own")
def test_where_no_thread_can_be_had_kernels_do_without_and_reads_say_so(tiny_path: Path) -> None:
    size, most = 1 << 46, resource.getrlimit(resource.RLIMIT_STACK)[1]
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1" or -1 < most < size:
        pytest.skip("stacks may be of any size here, or of none that is too large")

    def no_room_for_another_stack() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (size, most))

    done = subprocess.run(
        [sys.executable, "-c", ALONE, tiny_path, "--prompt", "a"],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=no_room_for_another_stack,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "1\n"
    assert_one_sentence(Outcome(done.returncode, done.stdout, done.stderr), "no more threads", "ulimit")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk")
def test_a_trace_on_a_full_disk_is_named_and_costs_no_result(shipped_path: Path) -> None:
    args = ("--prompt", PROMPT, "--ignore-eos", "--trace", "/dev/full", "--json", "--max-tokens")
    short = run_cli(shipped_path, *args, 2)
    assert short.json["text"]  # what was traced is written at the end
    assert_one_sentence(short, "/dev/full", "No space left", "--trace")
    assert_one_sentence(run_cli(shipped_path, *args, 200), "/dev/full", "No space left", "--trace")
    assert not reader_threads()


def test_a_warm_set_on_a_disk_that_is_full_is_named_and_costs_no_result(
    shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    outcome = short_of_memory(shipped_path, "--warm-set", tmp_path / "warm.json", "--json")
    assert outcome.json["text"] and not (tmp_path / "warm.json").exists()
    assert_one_sentence(outcome, "warm.json", "No space left", "--warm-set")


@pytest.mark.skipif(sys.platform != "linux", reason="how many files are open")
@pytest.mark.parametrize("what", ["arena", "warm set", "trace", "decisions"])
def test_a_model_that_cannot_be_had_leaves_no_files_open(what: str, shipped: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("{}")
    options = {
        "arena": RunOptions(arena_bytes=1),
        "warm set": RunOptions(warm_set=file),
        "trace": RunOptions(trace=tmp_path),
        "decisions": RunOptions(decisions=file),
    }[what]
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((DymoeError, OSError)):
        load_model(shipped, options)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not reader_threads()


@pytest.mark.parametrize("memory", [None, 300 << 20])
def test_a_reference_and_the_model_share_the_memory_that_there_is(
    memory: int | None, shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, models = resident_bytes() + (500 << 20), []

    def noted(*args: Any) -> Scorer:
        scorer = load_scorer(*args)
        models.append((scorer.budget.memory_bytes, resident_bytes()))
        return scorer

    for module in (evaluate_module, measure_module):
        monkeypatch.setattr(module, "load_scorer", noted)
    monkeypatch.setattr(evaluate_module, "memory_limit", lambda: limit)
    text = tmp_path / "text.txt"
    text.write_text(PROMPT)
    began = resident_bytes()
    args = () if memory is None else ("--memory", began + memory)
    assert run_cli(shipped_path, "--eval", text, "--tiers", 4, "--reference", shipped_path, *args).code == 0
    (reference, taken), (model, _) = models
    assert model + (taken - began) + max(0, reference - taken) <= limit + (8 << 20)
    too_much = run_cli(shipped_path, "--eval", text, "--reference", shipped_path, "--memory", limit)
    assert_one_sentence(too_much, "as the reference it needs", "--memory")
    monkeypatch.setattr(evaluate_module, "memory_limit", lambda: 100 << 20)
    assert_one_sentence(run_cli(shipped_path, "--eval", text, "--reference", shipped_path), "it needs", "100.0 MiB")
