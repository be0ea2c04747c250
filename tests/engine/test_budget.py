"""How memory is divided, the one figure for the least that works, and that the process stays within --memory.

Runs whose memory is measured are processes of their own, as the kernel counts them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_one_sentence, run_cli

from dymoe_runtime import process
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.budget import CHUNK, Budget
from dymoe_runtime.engine.memory_plan import check_memory
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.process import machine_limit

PROMPT = "The river flows through the town of"
MIB = 1 << 20
RUN = ("-m", "dymoe_runtime")
# dymoe-bundle has no module of its own.
INSPECT = ("-c", "from dymoe_runtime.cli.__main__ import bundle; bundle()", "inspect")


def command(*args: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120)


def run(bundle: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return command(*RUN, bundle, "--prompt", PROMPT, "--max-tokens", 16, *args)


def last_json(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def named_floor(done: subprocess.CompletedProcess[str]) -> int:
    """The least memory that works, as the error for too little of it says."""
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    found = re.search(r"least that works is --memory (\d+)MiB", done.stderr)
    assert found is not None, done.stderr
    return int(found[1]) * MIB


@pytest.fixture(params=["tiny", "shipped"])
def bundle_path(request: pytest.FixtureRequest) -> Path:
    """Each of the bundles."""
    path: Path = request.getfixturevalue(f"{request.param}_path")
    return path


@pytest.mark.parametrize("isa", ["", "numpy"])
def test_the_least_memory_that_works_is_one_figure(
    bundle_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inspecting tells it, a run with less names it, a run with more reports it; it works, and a MiB less does not."""
    monkeypatch.setenv("DYMOE_ISA", isa)
    told = last_json(command(*INSPECT, bundle_path, "--json"))
    floor, context = told["floor_bytes"], told["floor_context"]
    assert named_floor(run(bundle_path, "--context", context, "--memory", "1MiB")) == floor
    assert named_floor(run(bundle_path, "--context", context, "--memory", floor - MIB)) == floor
    least = run(bundle_path, "--context", context, "--memory", floor, "--stats", "--json")
    found = last_json(least)
    assert (found["floor_bytes"], found["memory_bytes"]) == (floor, floor)
    assert f"least that works {floor // MIB}.0 MiB" in least.stderr
    assert found["peak_rss_bytes"] <= floor
    ample = last_json(run(bundle_path, "--context", context, "--memory", 2 * floor, "--json"))
    assert (ample["floor_bytes"], ample["text"]) == (floor, found["text"])


@pytest.mark.parametrize("isa", ["", "numpy"])
def test_a_run_with_the_least_memory_keeps_to_it(isa: str, shipped_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the context that the prompt needs; the reference turns weights to float a few rows at a time."""
    monkeypatch.setenv("DYMOE_ISA", isa)
    least = named_floor(run(shipped_path, "--memory", "1MiB"))
    assert last_json(run(shipped_path, "--memory", least, "--json"))["peak_rss_bytes"] <= least


# A long prompt and a full context, with so many bytes more than what is needed once the libraries are loaded: loading
# them takes more than a small model. The peak counts from there.
TIGHT = """
import sys
from dataclasses import replace
from pathlib import Path
from dymoe_runtime.console import print_json
from dymoe_runtime.engine import load as module
from dymoe_runtime.engine.options import RunOptions

def tight(*args, **kwargs):
    budget = plan(*args, **kwargs)
    Path("/proc/self/clear_refs").write_text("5")
    memory = budget.need_bytes + int(sys.argv[2])
    return replace(budget, floor_process_bytes=budget.process_bytes, memory_bytes=memory)

plan, module.plan_budget = module.plan_budget, tight
with module.load_model(sys.argv[1], RunOptions(tier=4, context=512, threads=2)) as model:
    model.prefill([i * i % 1000 for i in range(412)])
    for i in range(100):
        model.decode(i)
    print_json(model.statistics() | {"full_arena_bytes": model.budget.full_arena_bytes})
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be set back here")
@pytest.mark.parametrize("isa", ["", "numpy"])
def test_peak_memory_stays_within_the_budget(isa: str, shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYMOE_ISA", isa)
    found = last_json(command("-c", TIGHT, shipped.path, shipped.expert_bytes() // 10))
    assert found["resident_bytes"] <= found["arena_bytes"] < found["full_arena_bytes"] and found["evictions"] > 0
    assert found["memory_bytes"] - 64 * MIB < found["peak_rss_bytes"] <= found["memory_bytes"]


@pytest.mark.parametrize(("library", "least"), [("numpy", 4 * MIB), ("torch", 10 * MIB)])  # torch: a checkpoint's
def test_code_that_only_loading_used_is_let_go(library: str, least: int) -> None:
    script = f"""
import dymoe_runtime.cli.answer, tokenizers
import {library} as library
from dymoe_runtime.process import release_code, resident_bytes
before = resident_bytes()
release_code()
print(before - resident_bytes(), float((library.ones((64, 64)) @ library.ones((64, 64))).sum()))
"""
    done = command("-c", script)
    assert done.returncode == 0, done.stderr
    saved, total = done.stdout.split()
    assert float(total) == 64**3
    assert int(saved) > least or sys.platform != "linux"


def made_up_budget(memory_bytes: int, full_arena_bytes: int = 900_000) -> Budget:
    """A budget of which 4 MiB are needed, the least arena of 500_000 bytes included."""
    return Budget(
        memory_bytes=memory_bytes,
        process_bytes=0,
        floor_process_bytes=0,
        dense_bytes=4 * MIB - 500_000,
        state_bytes=0,
        workspace_bytes=0,
        min_arena_bytes=500_000,
        full_arena_bytes=full_arena_bytes,
        chunk_bytes=60_000,
        spare_bytes=128_000,
    )


def borrowed(budget: Budget, *tokens: int) -> Sequence[int]:
    return [budget.borrowed_bytes(count) for count in tokens]


def test_a_prompt_borrows_what_the_arena_has_only_between_prompts() -> None:
    need, least, spare = 4 * MIB, 500_000, 128_000
    tight = made_up_budget(need + 1000)
    assert tight.need_bytes == tight.floor_bytes == need
    assert tight.arena_bytes == least + spare + 1000
    assert borrowed(tight, 1, 2, CHUNK, 3 * CHUNK) == [0, spare // 255, spare, spare + 120_000]
    nearly = replace(tight, memory_bytes=need + 350_000)  # all fit, except while a prompt runs
    assert nearly.arena_bytes == 900_000
    assert borrowed(nearly, 2, CHUNK, 2 * CHUNK) == [0, 50_000, 110_000]
    ample = replace(tight, memory_bytes=2 * need)
    assert ample.arena_bytes == 900_000 and borrowed(ample, 2 * CHUNK) == [0]
    given = tight.with_arena(600_000)
    assert given.arena_bytes == 600_000 and borrowed(given, CHUNK, 2 * CHUNK) == [0, 60_000]


def test_the_floor_counts_what_any_process_takes_and_the_need_what_this_one_does() -> None:
    budget = replace(made_up_budget(8 * MIB), process_bytes=MIB + 1, floor_process_bytes=3 * MIB)
    assert (budget.need_bytes, budget.floor_bytes) == (6 * MIB, 7 * MIB)
    budget.check()
    replace(budget, memory_bytes=7 * MIB).check()
    with pytest.raises(DymoeError, match=r"6\.5 MiB is too small .* least that works is --memory 7MiB"):
        replace(budget, memory_bytes=7 * MIB - MIB // 2).check()


def test_more_memory_than_the_machine_can_ever_give_is_refused(tiny_path: Path) -> None:
    tail = ("--prompt", "a", "--max-tokens", 2, "--memory")
    assert_one_sentence(run_cli(tiny_path, *tail, machine_limit() + MIB), "--memory", "machine", "give less")
    assert run_cli(tiny_path, *tail, machine_limit()).code == 0


def test_more_memory_than_the_cgroup_can_ever_give_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_path: Path) -> None:
    monkeypatch.setattr(process, "cgroup_limits", lambda: iter([900 * MIB, 300 * MIB]))
    tail = ("--prompt", "a", "--max-tokens", 2, "--memory")
    assert_one_sentence(run_cli(tiny_path, *tail, "301MiB"), "--memory 301.0 MiB", "300.0 MiB", "cgroup", "give less")
    check_memory(300 * MIB)
    with pytest.raises(DymoeError, match="raise the limit"):
        check_memory(300 * MIB + 1)
