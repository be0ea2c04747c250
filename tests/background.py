"""Commands that take long and that few tests need.

They begin with the first test, in processes of their own, and run beside the tests that need none of them. All test
workers share them. What they make of the same sources is kept in build/tests/ for the next run.
"""

from __future__ import annotations

import hashlib
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

import numpy as np
import pytest
import torch
from helpers import MODEL
from kernel_kit import COMPILED

import dymoe_compile
import dymoe_runtime
from dymoe_runtime.kernels import load_kernels

ROOT = Path(__file__).parent.parent
BUNDLE, CHECK, THREADS = "demo.dymoe", "kernel_check", "thread_check"
KEPT = ROOT / "build" / "tests"
# Without object-size: what it finds the address sanitizer finds too, and it takes a tenth of the time to compile.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=object-size -fno-sanitize-recover=all"
ARM = "aarch64-linux-gnu-g++"
KERNELS = "-DDYMOE_KERNEL_CHECK=ON"
OF_X86 = ("avx2", "avxvnni", "avx512", "avx512vbmi", "amx")


# Takes the bundle that is kept, or compiles one and keeps it in place of older ones; a copy that is not whole has
# another name.
COMPILE = """
kept=$1; shift
cp -a "$kept/demo.dymoe" . 2> /dev/null && exit
rm -rf demo.dymoe; "$@" || exit
rm -rf "${kept%-*}"-*
mkdir -p "$kept.$$" && cp -a demo.dymoe "$kept.$$/" && mv "$kept.$$" "$kept"
"""
# One build at a time in a folder that is kept; the program is copied, so that the next build may replace it.
BUILD = """
cmake=$1 folder=$2; shift 2
mkdir -p "$folder" && exec 9> "$folder.lock" && flock 9
"$@" && "$cmake" --build "$folder" --parallel 1 && cp "$folder"/*_check .
"""
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
    compile_shipped = (sys.executable, "-m", "dymoe_compile", MODEL, "-o", BUNDLE)
    found: dict[str, Sequence[str | Path]] = {
        "shipped_path": ("sh", "-c", COMPILE, "sh", KEPT / f"bundle-{digest_of_sources()}", *compile_shipped)
    }
    if shutil.which("c++"):
        # What cannot run here would only take time to compile. -O1 would take longer to compile than it saves.
        others = [f"-DDYMOE_HAS_{isa}=OFF" for isa in OF_X86 if isa not in COMPILED]
        found["sanitized_check"] = build_check(
            "sanitized", KERNELS, f"-DCMAKE_CXX_FLAGS={SANITIZERS}", "-DDYMOE_OPTIMIZE=-O0", *others
        )
        # How threads meet does not depend on the instruction set.
        scalar = [f"-DDYMOE_HAS_{isa}=OFF" for isa in OF_X86]
        races = ("-DCMAKE_CXX_FLAGS=-fsanitize=thread -g", "-DDYMOE_OPTIMIZE=-O1", "-DDYMOE_THREAD_CHECK=ON")
        found["thread_check"] = build_check("threads", *races, *scalar)
    if shutil.which(ARM) and shutil.which("qemu-aarch64"):
        system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={ARM}"]
        # -O1, because unoptimized, emulated kernels take minutes.
        found["arm_check"] = build_check(
            "arm", KERNELS, *system, "-DCMAKE_EXE_LINKER_FLAGS=-static", "-DDYMOE_OPTIMIZE=-O1"
        )
    return {name: command for name, command in found.items() if command}


def digest_of_sources() -> str:
    """Return a digest of all that the shipped bundle depends on: the packages, the model and the libraries."""
    packages = [Path(module.__file__ or "").parent for module in (dymoe_compile, dymoe_runtime)]
    native = [Path(module.__file__ or "") for name, module in sys.modules.items() if name.endswith("._native")]
    files = [
        path
        for folder in (*packages, MODEL)
        for path in sorted(folder.rglob("*"))
        if not {"__pycache__", "serving"} & set(path.relative_to(folder).parts)  # no bundle depends on the server
    ]
    digest = hashlib.sha256(f"{sys.version} {load_kernels().name} {torch.__version__} {np.__version__}".encode())
    for path in (*files, *native):
        if path.is_file():
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_check(name: str, *options: str) -> Sequence[str | Path]:
    """Return the command that builds what the options say in what time others leave; nothing if a tool is missing."""
    cmake, ninja, folder = tool("cmake"), tool("ninja"), KEPT / name
    if cmake is None or ninja is None or tool("flock") is None:
        return ()
    configure = (cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    return ("nice", "-n", "19", "sh", "-c", BUILD, "sh", cmake, folder, *configure, *options)


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
