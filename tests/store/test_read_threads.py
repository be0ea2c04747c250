"""Threads that read: the compiled ones and Python's do the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.reads import ReadThreads
from dymoe_runtime.memory import Place
from dymoe_runtime.store.read_threads import URGENCIES, Outcome, PythonThreads

COMPILED = load_kernels().reads
KINDS = {"python": PythonThreads} | ({} if COMPILED is None else {"compiled": COMPILED})
# What should come at once has not come.
TIMEOUT_S = 5.0
SIZES = (4096, 8192, 100)

Make = Callable[..., ReadThreads]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[ReadThreads] = []

    def build(count: int = 2) -> ReadThreads:
        made.append(KINDS[request.param](count))
        return made[-1]

    yield build
    for threads in made:
        threads.close(TIMEOUT_S)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """A file and what is in it."""
    content = np.random.default_rng(0).integers(0, 256, 50_000, np.uint8)
    content.tofile(tmp_path / "file")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd, content
    os.close(fd)


def places(*buffers: np.ndarray) -> list[Place]:
    return [(buffer.ctypes.data, buffer.size) for buffer in buffers]


def buffers(sizes: tuple[int, ...] = SIZES) -> list[np.ndarray]:
    return [np.full(size, 0xEE, np.uint8) for size in sizes]


class Gate:
    """Work that goes on once it is let."""

    def __init__(self, threads: ReadThreads, urgency: int = 0) -> None:
        self.entered, self.let = threading.Event(), threading.Event()
        self.ticket = threads.submit(-1, 0, [], urgency, self._work)

    def _work(self) -> None:
        self.entered.set()
        self.let.wait(10 * TIMEOUT_S)


def outcome_of(threads: ReadThreads, ticket: int) -> Outcome:
    threads.wait(ticket)
    (outcome,) = (Outcome(*found) for found in threads.finished() if found[0] == ticket)
    assert outcome.seconds >= 0 and not threads.finished()
    return outcome


@pytest.mark.parametrize("offset", [0, 1, 777, 50_000 - sum(SIZES)])
def test_consecutive_bytes_fill_places_in_their_order(offset: int, make: Make, file: tuple[int, np.ndarray]) -> None:
    threads, (fd, content), into, full = make(), file, buffers(), []
    outcome = outcome_of(threads, threads.submit(fd, offset, places(*into), 0, lambda: full.append(into[0][0])))
    assert (outcome.error, outcome.done) == (0, sum(SIZES))
    assert np.array_equal(np.concatenate(into), content[offset : offset + sum(SIZES)])
    assert full == [content[offset]]  # what comes then came after the bytes


@pytest.mark.parametrize("missing", [1, sum(SIZES), sum(SIZES) + 5])
def test_the_end_of_the_file_keeps_what_is_missing(missing: int, make: Make, file: tuple[int, np.ndarray]) -> None:
    threads, (fd, content), into, called = make(), file, buffers(), []
    offset = len(content) + missing - sum(SIZES)
    outcome = outcome_of(threads, threads.submit(fd, offset, places(*into), 0, lambda: called.append(1)))
    done = max(0, sum(SIZES) - missing)
    assert (outcome.error, outcome.done, called) == (0, done, [])
    assert np.array_equal(np.concatenate(into)[:done], content[offset : offset + done])


def test_an_error_is_told_by_its_number(make: Make, tmp_path: Path) -> None:
    threads, called = make(), []
    fd = os.open(tmp_path, os.O_RDONLY)
    outcome = outcome_of(threads, threads.submit(fd, 0, places(*buffers()), 0, lambda: called.append(1)))
    os.close(fd)
    assert (outcome.error, outcome.done, called) == (errno.EISDIR, 0, [])


@pytest.mark.parametrize("wrong", [None, 0, 2])
def test_the_place_whose_checksum_is_wrong_is_told(wrong: int | None, make: Make, file: tuple[int, np.ndarray]) -> None:
    threads, (fd, content), into = make(), file, buffers()
    parts = np.split(content[7 : 7 + sum(SIZES)], np.cumsum(SIZES)[:-1])
    checksums = [zlib.crc32(part) ^ (index == wrong) for index, part in enumerate(parts)]
    outcome = outcome_of(threads, threads.submit(fd, 7, places(*into), 0, None, checksums))
    assert (outcome.error, outcome.done) == (0 if wrong is None else -1 - wrong, sum(SIZES))


def test_nothing_at_all_can_be_read(make: Make, file: tuple[int, np.ndarray]) -> None:
    threads, called = make(), []
    assert outcome_of(threads, threads.submit(file[0], 0, [], 0, lambda: called.append(1)))[1:3] == (0, 0)
    assert called == [1]


def test_the_most_urgent_goes_first_and_of_these_the_oldest(make: Make) -> None:
    threads, order = make(1), []
    gate = Gate(threads)
    assert gate.entered.wait(TIMEOUT_S)
    tickets = [threads.submit(-1, 0, [], u, lambda u=u, i=i: order.append((u, i))) for i in range(2) for u in (2, 0, 1)]
    gate.let.set()
    for ticket in tickets:
        threads.wait(ticket)
    assert order == [(u, i) for u in range(URGENCIES) for i in range(2)]
    assert [found[0] for found in threads.finished()] == threads.started()


def test_only_reads_that_wait_are_reprioritized_and_cancelled(make: Make) -> None:
    threads, order = make(1), []
    gate = Gate(threads, urgency=1)
    assert gate.entered.wait(TIMEOUT_S)
    first, second, third, fourth = (threads.submit(-1, 0, [], 2, lambda i=i: order.append(i)) for i in range(1, 5))
    assert threads.reprioritize(third, 2, 0) and not threads.reprioritize(third, 2, 0)
    assert threads.cancel(second, 2) and not threads.cancel(second, 2) and not threads.cancel(third, 2)
    assert not threads.reprioritize(gate.ticket, 1, 0) and not threads.cancel(gate.ticket, 1)
    gate.let.set()
    for ticket in (first, third, fourth):
        threads.wait(ticket)
    assert not threads.cancel(first, 2)
    assert order == [3, 1, 4]
    assert {found[0] for found in threads.finished()} == {gate.ticket, first, third, fourth}
    assert threads.finished() == []


def test_threads_read_beside_each_other_and_beside_python(make: Make) -> None:
    threads = make(2)
    gates = [Gate(threads) for _ in range(3)]
    assert gates[0].entered.wait(TIMEOUT_S) and gates[1].entered.wait(TIMEOUT_S)
    assert not gates[2].entered.wait(0.05)
    gates[1].let.set()
    threads.wait(gates[1].ticket)  # the others go on meanwhile
    assert gates[2].entered.wait(TIMEOUT_S)
    for gate in gates:
        gate.let.set()


def test_closing_leaves_behind_only_what_does_not_end(make: Make) -> None:
    threads, called = make(2), []
    gate = Gate(threads)
    assert gate.entered.wait(TIMEOUT_S)
    begun = time.monotonic()
    assert not threads.close(0.1) and time.monotonic() - begun < TIMEOUT_S
    gate.let.set()
    other = make(1)
    last = Gate(other)
    other.submit(-1, 0, [], 0, lambda: called.append(1))
    assert last.entered.wait(TIMEOUT_S)
    threading.Timer(0.05, last.let.set).start()
    assert other.close(TIMEOUT_S) and other.close(0)
    assert called == []  # it had not begun


@pytest.mark.skipif(COMPILED is None, reason="there are no compiled threads")
@pytest.mark.parametrize(("urgency", "count"), [(-1, 1), (URGENCIES, 1), (0, 0), (0, -1)])
def test_what_compiled_threads_cannot_do_is_refused(urgency: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        threads = COMPILED(count)
        threads.submit(-1, 0, [], 0, None)
        threads.cancel(0, urgency)
    with pytest.raises(ValueError, match="expected"):
        COMPILED(count).reprioritize(0, 0, urgency)
    with pytest.raises(ValueError, match="expected"):
        COMPILED(count).submit(-1, 0, [(0, -1)], urgency, None)


# A child's threads are not there, and may have held a lock: closing neither waits for them nor touches it.
FORKED = """
import os, sys, threading
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.store.request import Read, Source
from dymoe_runtime.store.read_queue import ReadQueue
from dymoe_runtime.store.read_threads import start_threads
gate = threading.Event()
threads = start_threads(load_kernels().reads, 2)
queue = ReadQueue(lambda *what: Source(-1, None, 0, lambda buffers: gate.wait()), None, threads)
queue.submit(Read(None, 0, []))
while not queue.started():
    pass
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    gate.set()
print(queue.close(), flush=True)
sys.exit(os.waitstatus_to_exitcode(status) if child else 0)
"""

# Python ends while a thread reads, and lets others run meanwhile.
LEFT_BEHIND = """
import ctypes, time
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.store.request import Read, Source
from dymoe_runtime.store.read_queue import ReadQueue
from dymoe_runtime.store.read_threads import start_threads
class Last:
    def __del__(self, sleep=time.sleep):
        sleep(1.5)
memory = (ctypes.c_uint8 * (256 << 20))()
noise = open("/dev/urandom", "rb")  # of which even a piece of a read takes milliseconds
queue = ReadQueue(lambda *what: Source(noise.fileno(), None, 0, print), memory, start_threads(load_kernels().reads, 2))
queue.submit(Read(None, 0, [(ctypes.addressof(memory), len(memory))]))
last = Last()
while not queue.started():
    pass
print(queue.close(patience_s=0.0), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
@pytest.mark.parametrize("isa", ["", "numpy"])
def test_a_forked_process_ends_without_the_threads(isa: str) -> None:
    assert run(FORKED, isa) == (0, "True\nTrue\n", "")


@pytest.mark.skipif(not os.access("/dev/urandom", os.R_OK), reason="there is nothing that takes long to read")
@pytest.mark.parametrize("isa", ["", "numpy"])
def test_a_read_that_outlives_the_program_does_it_no_harm(isa: str) -> None:
    assert run(LEFT_BEHIND, isa) == (0, "False\n", "")


def run(script: str, isa: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, "DYMOE_ISA": isa}
    )
    return done.returncode, done.stdout, done.stderr
