"""kernel_check.cpp and thread_check.cpp, programs without Python: under sanitizers, and emulated on ARM.

The first holds every instruction set against the scalar one, a decoded token through whole layers against the
operations one by one, and sees that threads read what they are asked to. The second runs threads at the same time.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from kernel_kit import COMPILED


def run(command: list[object]) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_compiled_code_is_right_under_sanitizers(sanitized_check: Path) -> None:
    """It reads and writes within what it says it needs, leaves no memory behind, and nothing is undefined."""
    output = run([sanitized_check])
    assert output.splitlines() == [*(f"{isa}: right" for isa in COMPILED or ["scalar"]), "rest: right"]


def test_what_comes_from_outside_is_refused_or_works(sanitized_check: Path) -> None:
    """Layouts, segments, tables and reads of random numbers; `make fuzz` runs more of them."""
    assert run([sanitized_check.with_name("fuzz_check"), 0, 10_000]) == "10000 inputs\n"


def test_threads_do_not_race(thread_check: Path) -> None:
    """In the pool, in the threads that read, and where tokens wait for reads, as the thread sanitizer sees it."""
    assert run([thread_check]) == "threads: right\n"


def test_compiled_code_is_right_on_emulated_arm(arm_check: Path) -> None:
    """Each instruction set once, on the least processor that has it; a better one that is asked for is not found."""
    asked = ("i8mm", "neon", "scalar", "rest")
    output = run(["qemu-aarch64", "-cpu", "max", arm_check, *asked[:1]])
    assert output.splitlines() == ["i8mm: right"]
    output = run(["qemu-aarch64", "-cpu", "cortex-a76", arm_check, *asked[:2]])  # without products of int8
    assert output.splitlines() == ["neon: right"]
    output = run(["qemu-aarch64", "-cpu", "cortex-a53", arm_check, *asked])  # which has no dot products
    assert output.splitlines() == ["scalar: right", "rest: right"]
