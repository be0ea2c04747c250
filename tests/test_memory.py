"""The process stays within --memory, as the kernel counts it. Each run is a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dymoe_runtime import model as model_module
from dymoe_runtime import room as room_module
from dymoe_runtime.budget import CHUNK, SPREAD_BYTES, Budget, plan_budget
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.decoder import Decoder
from dymoe_runtime.model import Model
from dymoe_runtime.options import RunOptions
from dymoe_runtime.room import Room

PROMPT = "The river flows through the town of"


def run(bundle: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dymoe_runtime", bundle, "--prompt", PROMPT, "--max-tokens", 16, *args]
    return subprocess.run([str(arg) for arg in command], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def floor(shipped_path: Path) -> int:
    return least_memory(shipped_path)


def least_memory(bundle: Path) -> int:
    """The least memory that works, as the error for too little of it says."""
    refused = run(bundle, "--memory", "1MiB")
    assert refused.returncode == 1 and len(refused.stderr.strip().splitlines()) == 1
    found = re.search(r"--memory (\d+)MiB", refused.stderr)
    assert found is not None
    return int(found[1]) << 20


@pytest.mark.parametrize("isa", ["", "torch"])
def test_a_run_with_the_least_memory_keeps_to_it(isa: str, shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled kernels weights are turned to float a few rows at a time."""
    monkeypatch.setenv("DYMOE_ISA", isa)
    least = least_memory(shipped.path)
    result = run(shipped.path, "--memory", least, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.strip().splitlines()[-1])["peak_rss_bytes"] <= least


# A long prompt and a full context, with so many bytes more than what is needed once the libraries are loaded: loading
# them takes more than a small model. The peak counts from there.
TIGHT = """
import sys
from dataclasses import replace
from pathlib import Path
from dymoe_runtime import model as module
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.console import print_json
from dymoe_runtime.options import RunOptions

def tight(*args, **kwargs):
    budget = plan(*args, **kwargs)
    Path("/proc/self/clear_refs").write_text("5")
    return replace(budget, begun=0, memory=budget.need + int(sys.argv[2]))

plan, module.plan_budget = module.plan_budget, tight
with module.Model(Bundle.open(Path(sys.argv[1])), RunOptions(tier=4, context=512, threads=2)) as model:
    model.prefill([i * i % 1000 for i in range(412)])
    for i in range(100):
        model.decode(i)
    print_json(model.statistics() | {"full_arena_bytes": model.budget.full_arena})
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be set back here")
@pytest.mark.parametrize("isa", ["", "torch"])
def test_peak_memory_stays_within_the_budget(isa: str, shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYMOE_ISA", isa)
    command = [sys.executable, "-c", TIGHT, str(shipped.path), str(shipped.expert_bytes() // 10)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["resident_bytes"] <= found["arena_bytes"] < found["full_arena_bytes"] and found["evictions"] > 0
    assert found["memory_bytes"] - (64 << 20) < found["peak_rss_bytes"] <= found["memory_bytes"]


def test_a_prompt_borrows_what_the_arena_has_only_between_prompts() -> None:
    need, least, spare = 4 << 20, 500_000, 128_000
    tight = Budget(need + 1000, 0, need - least, 0, 0, 0, least, 900_000, 60_000, spare)
    assert tight.need == tight.floor == need
    assert tight.arena == least + spare + 1000
    assert [tight.lent(tokens) for tokens in (1, 2, CHUNK, 3 * CHUNK)] == [0, spare // 255, spare, spare + 120_000]
    nearly = replace(tight, memory=need + 350_000)  # all fit, but while a prompt runs
    assert nearly.arena == 900_000
    assert [nearly.lent(tokens) for tokens in (2, CHUNK, 2 * CHUNK)] == [0, 50_000, 110_000]
    ample = replace(tight, memory=2 * need)
    assert ample.arena == 900_000 and ample.lent(2 * CHUNK) == 0
    given = tight.with_arena(600_000)
    assert given.arena == 600_000 and [given.lent(tokens) for tokens in (CHUNK, 2 * CHUNK)] == [0, 60_000]


def test_a_limit_that_is_lowered_while_memory_is_lent_leaves_it_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    need, least, spare = 4 << 20, 500_000, 128_000
    budget = Budget(need + 300_000, 0, need - least, 0, 0, 0, least, 2_000_000, 60_000, spare)
    asked: list[int] = []
    room = Room(budget, SimpleNamespace(resize=asked.append), heeds_limit=True)  # type: ignore[arg-type]
    monkeypatch.setattr(room_module, "LOOK_S", 0.0)
    assert room.make_for_pass(CHUNK, 0) == CHUNK
    lower = replace(budget, memory=need + 50_000)
    for name in ("imposed_limit", "memory_limit"):
        monkeypatch.setattr(room_module, name, lambda: lower.memory)
    room.heed_limit()
    room.take_back()
    assert asked == [budget.arena - spare, lower.arena - spare, lower.arena] and room.budget == lower


def test_the_arena_is_smaller_while_a_prompt_runs(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the activations of so many tokens take; the tokens are what they are with memory for all."""
    quarter, found, arenas = shipped.expert_bytes() // 4, [], []
    forward = Decoder.forward

    def plan(*args: object, **kwargs: object) -> Budget:
        budget = plan_budget(*args, **kwargs)  # type: ignore[arg-type]
        return replace(budget, begun=0, memory=budget.need + quarter, spare=2 << 20)

    def observed(decoder: Decoder, ids: np.ndarray, *args: object) -> np.ndarray:
        arenas.append((len(ids), model.store.arena_bytes))
        return forward(decoder, ids, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "forward", observed)
    for short in (False, True):
        if short:
            monkeypatch.setattr(model_module, "plan_budget", plan)
        with Model(shipped, RunOptions(tier=4, context=256)) as model:
            whole = model.store.arena_bytes
            found.append([model.prefill(list(range(200))), model.decode(1), model.prefill([2, 3]), model.decode(4)])
            assert model.store.arena_bytes == whole
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert [tokens for tokens, _ in arenas] == [200, 1, 2, 1] * 2
    assert len({arena for _, arena in arenas[:4]}) == 1  # nothing is lent where there is room
    of_200, of_1, of_2, again = (arena for _, arena in arenas[4:])
    assert of_1 == again == whole
    assert whole - of_200 > 1 << 20 > whole - of_2 >= 0  # in whole chunks of the arena


@pytest.mark.parametrize(("library", "least"), [("numpy", 4 << 20), ("torch", 10 << 20)])  # torch: the reference
def test_code_that_only_loading_used_is_let_go(library: str, least: int) -> None:
    script = f"""
import dymoe_runtime.commands, tokenizers
import {library} as library
from dymoe_runtime.device import release_code, resident_bytes
before = resident_bytes()
release_code()
print(before - resident_bytes(), float((library.ones((64, 64)) @ library.ones((64, 64))).sum()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    saved, total = done.stdout.split()
    assert float(total) == 64**3
    assert int(saved) > least or sys.platform != "linux"


def test_less_than_the_floor_is_refused(shipped: Bundle, floor: int) -> None:
    result = run(shipped.path, "--memory", floor - 2 * SPREAD_BYTES)  # one of them is in the floor that is named
    assert result.returncode == 1 and "least that works" in result.stderr
    assert "Traceback" not in result.stderr
