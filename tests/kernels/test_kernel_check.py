"""kernel_check.cpp, a program without Python: under sanitizers, and emulated on ARM.

It holds every instruction set against the scalar one, a decoded token through whole layers against the operations one
by one, and sees that threads read what they are asked to.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_kit import COMPILED

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
# Without object-size: what it finds the address sanitizer finds too, and it takes a tenth of the time to compile.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=object-size -fno-sanitize-recover=all"
ARM = "aarch64-linux-gnu-g++"
OF_X86 = ("avx2", "avxvnni", "avx512")


def tool(name: str) -> str | None:
    """A program of this environment, or of the system."""
    return shutil.which(name, path=str(BIN)) or shutil.which(name)


def build(directory: Path, *options: str) -> Path:
    """Build kernel_check and return it. -O1: unoptimized, emulated kernels take minutes, and -O3 as long to compile."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None or ninja is None:
        pytest.skip("cmake or ninja is missing")
    configure = [cmake, "-S", ROOT, "-B", directory, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run([*configure, "-DDYMOE_KERNEL_CHECK=ON", "-DDYMOE_OPTIMIZE=-O1", *options])
    run([cmake, "--build", directory, "--parallel", "2"])
    return directory / "kernel_check"


def run(command: list[object]) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_code_is_right_under_sanitizers(tmp_path: Path) -> None:
    """It reads and writes within what it says it needs, leaves no memory behind, and nothing is undefined."""
    # What cannot run here would only take time to compile.
    others = [f"-DDYMOE_HAS_{isa}=OFF" for isa in OF_X86 if isa not in COMPILED]
    output = run([build(tmp_path, f"-DCMAKE_CXX_FLAGS={SANITIZERS}", *others)])
    assert output.splitlines() == [*(f"{isa}: right" for isa in COMPILED or ["scalar"]), "rest: right"]


@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"{ARM} is missing")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 is missing")
def test_compiled_code_is_right_on_emulated_arm(tmp_path: Path) -> None:
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={ARM}"]
    program = build(tmp_path, *system, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    output = run(["qemu-aarch64", "-cpu", "max", program])
    assert output.splitlines() == ["i8mm: right", "neon: right", "scalar: right", "rest: right"]
    output = run(["qemu-aarch64", "-cpu", "cortex-a76", program])  # which has no products of int8 matrices
    assert output.splitlines() == ["neon: right", "scalar: right", "rest: right"]
    output = run(["qemu-aarch64", "-cpu", "cortex-a53", program])  # which has no dot products
    assert output.splitlines() == ["scalar: right", "rest: right"]
