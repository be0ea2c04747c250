"""Commands that take long and that few tests need.

They begin with the first test, in processes of their own, and run beside the tests that need none of them. All test
workers share them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers import MODEL
from kernel_kit import COMPILED

ROOT = Path(__file__).parent.parent
BUNDLE, CHECK, THREADS = "demo.dymoe", "build/kernel_check", "build/thread_check"
# Without object-size: what it finds the address sanitizer finds too, and it takes a tenth of the time to compile.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=object-size -fno-sanitize-recover=all"
ARM = "aarch64-linux-gnu-g++"
KERNELS = "-DDYMOE_KERNEL_CHECK=ON"
OF_X86 = ("avx2", "avxvnni", "avx512")


# The folder of all jobs of a run; test workers inherit it.
FOLDER = "DYMOE_TEST_JOBS"
# Runs the command of a job, and keeps its exit status where every worker can see it.
WRAPPER = '"$@" > log.txt 2>&1 < /dev/null; echo $? > status.new; mv status.new status'


@contextmanager
def folder() -> Iterator[None]:
    """Make the folder of all jobs; end them when the run ends."""
    with tempfile.TemporaryDirectory(prefix="dymoe-test-") as path:
        os.environ[FOLDER] = path
        try:
            yield
        finally:
            del os.environ[FOLDER]
            for pid in Path(path).glob("*/pid"):
                with suppress(ProcessLookupError):
                    os.killpg(int(pid.read_text()), signal.SIGKILL)


def start(name: str, command: Sequence[str | Path]) -> None:
    """Start a command in a folder of its own, unless another worker has done so."""
    place = Path(os.environ[FOLDER]) / name
    try:
        place.mkdir()
    except FileExistsError:
        return
    process = subprocess.Popen(["sh", "-c", WRAPPER, "sh", *command], cwd=place, start_new_session=True)
    (place / "pid").write_text(str(process.pid))


def commands() -> Mapping[str, Sequence[str | Path]]:
    """Return the command of each fixture that waits for one, without those whose tools are missing."""
    found: dict[str, Sequence[str | Path]] = {
        "shipped_path": (sys.executable, "-m", "dymoe_compile", MODEL, "-o", BUNDLE)
    }
    if shutil.which("c++"):
        # What cannot run here would only take time to compile. -O1 would take longer to compile than it saves.
        others = [f"-DDYMOE_HAS_{isa}=OFF" for isa in OF_X86 if isa not in COMPILED]
        found["sanitized_check"] = build_check(
            KERNELS, f"-DCMAKE_CXX_FLAGS={SANITIZERS}", "-DDYMOE_OPTIMIZE=-O0", *others
        )
        # How threads meet does not depend on the instruction set.
        scalar = [f"-DDYMOE_HAS_{isa}=OFF" for isa in OF_X86]
        races = ("-DCMAKE_CXX_FLAGS=-fsanitize=thread -g", "-DDYMOE_OPTIMIZE=-O1", "-DDYMOE_THREAD_CHECK=ON")
        found["thread_check"] = build_check(*races, *scalar)
    if shutil.which(ARM) and shutil.which("qemu-aarch64"):
        system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={ARM}"]
        # -O1, because unoptimized, emulated kernels take minutes.
        found["arm_check"] = build_check(KERNELS, *system, "-DCMAKE_EXE_LINKER_FLAGS=-static", "-DDYMOE_OPTIMIZE=-O1")
    return {name: command for name, command in found.items() if command}


def build_check(*options: str) -> Sequence[str | Path]:
    """Return the command that builds what the options say in what time others leave; nothing if a tool is missing."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None or ninja is None:
        return ()
    configure = (cmake, "-S", ROOT, "-B", "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    script = 'cmake=$1; shift; "$@" && exec "$cmake" --build build --parallel 1'
    return ("nice", "-n", "19", "sh", "-c", script, "sh", cmake, *configure, *options)


def tool(name: str) -> str | None:
    """Return the path of a program of this environment or of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def needed(item: pytest.Item) -> list[str]:
    """Return the fixtures of a test that wait for a command."""
    names = getattr(item, "fixturenames", ())
    return [name for name in ("shipped_path", "sanitized_check", "thread_check", "arm_check") if name in names]


def finish(name: str) -> Path:
    """Wait for the command of a fixture and return its folder; skip the test if its tools are missing."""
    place = Path(os.environ[FOLDER]) / name
    if not place.exists():
        pytest.skip("a tool is missing")
    while not (place / "status").exists():
        time.sleep(0.05)
    assert int((place / "status").read_text()) == 0, (place / "log.txt").read_text(encoding="utf-8", errors="replace")
    return place
