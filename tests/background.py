"""Commands that take long and that few tests need.

They begin with the first test, in processes of their own, and run beside the tests that need none of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import MODEL
from kernel_kit import COMPILED

ROOT = Path(__file__).parent.parent
BUNDLE, CHECK = "demo.dymoe", "build/kernel_check"
# Without object-size: what it finds the address sanitizer finds too, and it takes a tenth of the time to compile.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=object-size -fno-sanitize-recover=all"
ARM = "aarch64-linux-gnu-g++"
OF_X86 = ("avx2", "avxvnni", "avx512")


@dataclass
class Job:
    """A command that runs in a folder of its own."""

    folder: tempfile.TemporaryDirectory[str]
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, command: Sequence[str | Path]) -> Job:
        folder = tempfile.TemporaryDirectory(prefix="dymoe-test-")
        with (Path(folder.name) / "log.txt").open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, cwd=folder.name, start_new_session=True, **streams)
        return cls(folder, process)

    def finish(self) -> Path:
        """Wait until the command has ended; return its folder."""
        path = Path(self.folder.name)
        assert self.process.wait() == 0, (path / "log.txt").read_text(encoding="utf-8", errors="replace")
        return path

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


JOBS = pytest.StashKey[dict[str, Job]]()


def commands() -> Mapping[str, Sequence[str | Path]]:
    """Return the command of each fixture that waits for one, without those whose tools are missing."""
    found: dict[str, Sequence[str | Path]] = {
        "shipped_path": (sys.executable, "-m", "dymoe_compile", MODEL, "-o", BUNDLE)
    }
    if shutil.which("c++"):
        # What cannot run here would only take time to compile. -O1 would take longer to compile than it saves.
        others = [f"-DDYMOE_HAS_{isa}=OFF" for isa in OF_X86 if isa not in COMPILED]
        found["sanitized_check"] = build_check(f"-DCMAKE_CXX_FLAGS={SANITIZERS}", "-DDYMOE_OPTIMIZE=-O0", *others)
    if shutil.which(ARM) and shutil.which("qemu-aarch64"):
        system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={ARM}"]
        # -O1, because unoptimized, emulated kernels take minutes.
        found["arm_check"] = build_check(*system, "-DCMAKE_EXE_LINKER_FLAGS=-static", "-DDYMOE_OPTIMIZE=-O1")
    return {name: command for name, command in found.items() if command}


def build_check(*options: str) -> Sequence[str | Path]:
    """Return the command that builds kernel_check in what time others leave; nothing if a tool is missing."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None or ninja is None:
        return ()
    configure = (cmake, "-S", ROOT, "-B", "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    script = 'cmake=$1; shift; "$@" && exec "$cmake" --build build --parallel 1'
    return ("nice", "-n", "19", "sh", "-c", script, "sh", cmake, *configure, "-DDYMOE_KERNEL_CHECK=ON", *options)


def tool(name: str) -> str | None:
    """Return the path of a program of this environment or of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def needed(item: pytest.Item) -> list[str]:
    """Return the fixtures of a test that wait for a command."""
    names = getattr(item, "fixturenames", ())
    return [name for name in ("shipped_path", "sanitized_check", "arm_check") if name in names]


def finish(request: pytest.FixtureRequest, name: str) -> Path:
    """Wait for the command of a fixture and return its folder; skip the test if its tools are missing."""
    jobs = request.config.stash[JOBS]
    if name not in jobs:
        pytest.skip("a tool is missing")
    return jobs[name].finish()
