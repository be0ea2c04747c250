"""The process stays within --memory, as the kernel counts it. Each run is a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dymoe_runtime.bundle import Bundle
from dymoe_runtime.store import least_arena_bytes

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


@pytest.mark.parametrize("share", [0, 0.25, 0.4, 0.6])
def test_peak_memory_stays_within_the_budget(shipped: Bundle, floor: int, share: float) -> None:
    memory = floor + int(shipped.expert_bytes() * share)
    result = run(shipped.path, "--memory", memory, "--json")
    assert result.returncode == 0, result.stderr
    statistics = json.loads(result.stdout.strip().splitlines()[-1])
    assert statistics["peak_rss_bytes"] <= memory
    spare = memory - statistics["floor_bytes"] + least_arena_bytes(shipped.layout)
    assert statistics["resident_bytes"] <= statistics["arena_bytes"] <= spare


def test_the_reference_kernels_keep_to_the_budget_too(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where no compiler was found turns weights to float a few rows at a time."""
    monkeypatch.setenv("DYMOE_ISA", "torch")
    least = least_memory(shipped.path)
    result = run(shipped.path, "--memory", least, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.strip().splitlines()[-1])["peak_rss_bytes"] <= least


def test_less_than_the_floor_is_refused(shipped: Bundle, floor: int) -> None:
    result = run(shipped.path, "--memory", int(floor * 0.9))
    assert result.returncode == 1 and "least that works" in result.stderr
    assert "Traceback" not in result.stderr
