"""Fuzz the compiled code that takes bytes and sizes from outside: with libFuzzer if clang++ has it, else seeded.

    python tests/kernels/fuzz/campaign.py --seed 0 --inputs 200000

Builds in a temporary folder; the exit code is that of the fuzzer.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parents[2] / "dymoe_runtime" / "kernels" / "src"
# What computes with one instruction set, the threads, and the records.
FOLDERS = ("decode", "ops", "record", "threads")
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=200_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "fuzz")
        if has_libfuzzer(folder):
            compile_with("clang++", program, "-O1", "-DDYMOE_LIBFUZZER", "-fsanitize=fuzzer")
            command = [program, f"-seed={args.seed + 1}", f"-runs={args.inputs}", "-max_len=600", "-timeout=20"]
        else:
            compile_with("c++", program, "-O0", "-fno-sanitize=object-size")
            command = [program, str(args.seed * args.inputs), str(args.inputs)]
        sys.exit(subprocess.run(command, cwd=folder).returncode)


def has_libfuzzer(folder: str) -> bool:
    """Return whether clang++ is there and links libFuzzer, which some systems have in a package of its own."""
    if shutil.which("clang++") is None:
        return False
    source = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    command = ["clang++", "-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", str(Path(folder) / "probe")]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def compile_with(compiler: str, program: str, *options: str) -> None:
    files = [file for name in FOLDERS for file in sorted((SOURCE / name).glob("*.cpp"))]
    files += [SOURCE / "isa" / "isa.cpp", SOURCE / "isa" / "scalar.cpp", HERE / "fuzz_check.cpp"]
    flags = ["-std=c++17", "-g", "-pthread", "-ffp-contract=off", f"-I{SOURCE}", *SANITIZERS, *options]
    subprocess.run([compiler, *flags, *map(str, files), "-o", program], check=True)


if __name__ == "__main__":
    main()
