r"""A bundle against llama.cpp with files of the same model: bits per weight, all in memory, and with memory capped.

    python benchmarks/models/make.py qwen3_5_moe /tmp/qwen35
    dymoe-compile /tmp/qwen35 -o /tmp/qwen35.dymoe
    python benchmarks/models/against_llama.py /tmp/qwen35.dymoe --llama-bench PATH --gguf Q4_0.gguf --gguf Q4_K_M.gguf

Prints what a weight takes on either side, then runs `benchmarks/kernels/against_llama.py` and, for each share,
`benchmarks/streaming/against_llama.py`. The memory of a process is that share of the experts in the first GGUF file,
and all else in that file or in the bundle, whichever is more, and `--program-mb`. Compare settings with about the same
bits. A GGUF file must end with a whole sector: `truncate -s %4096 FILE`.
"""

from __future__ import annotations

import argparse
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.tools.describe import describe

BENCHMARKS = Path(__file__).parents[1]
# Sizes of the types of values in a GGUF header; strings and lists have their own.
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
UINT32, STRING, LIST = 4, 8, 9
ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class Part:
    """Some tensors of a file."""

    weights: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.nbytes / 1e6:.0f} MB, {8 * self.nbytes / self.weights:.2f} bits per weight"


def main() -> None:
    """Print the bits of both sides, then run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, action="append", required=True)
    parser.add_argument("--tiers", default="4")
    parser.add_argument("--points", default="3")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--program-mb", type=float, default=100, help="10^6 bytes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-bits", action="store_true")
    parser.add_argument("--without-memory", action="store_true", help="leave out the runs with everything in memory")
    args = parser.parse_args()
    dense_bytes = print_bundle(args.bundle)
    parts = [parts_of(path) for path in args.gguf]
    for path, (experts, others) in zip(args.gguf, parts, strict=True):
        print(f"{path.stem}: experts {experts}; all else {others}")
    experts, others = parts[0]
    rest = max(others.nbytes, dense_bytes) + args.program_mb * 1e6
    limits = [f"{(rest + share * experts.nbytes) / 1e6:.0f}" for share in args.shares]
    for share, limit in zip(args.shares, limits, strict=True):
        print(f"{share:.0%} of the experts of {args.gguf[0].stem}, and all else: {limit} MB")
    sys.stdout.flush()
    if args.only_bits:
        return
    common = [args.bundle, "--llama-bench", args.llama_bench, "--tiers", args.tiers, "--points", args.points]
    common += ["--threads", args.threads, "--rounds", args.rounds]
    common += [word for path in args.gguf for word in ("--gguf", path)]
    if not args.without_memory:
        run("kernels", *common)
    if limits:
        run("streaming", *common, "--limit-mb", *limits)


def run(folder: str, *options: object) -> None:
    """Run the comparison in a folder of benchmarks.

    What `dymoe_runtime` sets for OpenMP in this process is kept from llama.cpp, which it would slow down.
    """
    command = [sys.executable, BENCHMARKS / folder / "against_llama.py", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    subprocess.run([str(word) for word in command], check=True, env=environment)


def print_bundle(path: Path) -> int:
    """Print what a weight of a bundle takes; return the bytes of all but experts."""
    found = describe(Bundle.open(path), load_kernels())
    kinds = ", ".join(f"{kind} {bits}" for kind, bits in found["dense_bits"].items())
    for tier in found["tiers"]:
        nbytes = found["expert_weights"] * tier["effective_bits"] / 8
        print(f"{path.stem}: experts at tier {tier['tier']} {Part(found['expert_weights'], int(nbytes))}")
    for point in found["points"]:
        print(f"{path.stem}: point {point['name']} {point['effective_bits']:.2f} bits per weight that a token uses")
    dense_bytes: int = found["dense_bytes"]
    print(f"{path.stem}: all else {dense_bytes / 1e6:.0f} MB, bits: {kinds}")
    return dense_bytes


def parts_of(path: Path) -> tuple[Part, Part]:
    """Return the matrices of routed experts in a GGUF file, and all other tensors."""
    with path.open("rb") as file:
        tensors, start = read_header(file)
    ends = [*(at for _, _, at in tensors[1:]), path.stat().st_size - start]
    sizes = [(name, weights, end - at) for (name, weights, at), end in zip(tensors, ends, strict=True)]
    experts = [size for size in sizes if size[0].endswith("_exps.weight")]
    return part_of(experts), part_of([size for size in sizes if size not in experts])


def part_of(sizes: Sequence[tuple[str, int, int]]) -> Part:
    """Return name, number of weights and bytes of tensors added up."""
    return Part(sum(weights for _, weights, _ in sizes), sum(nbytes for _, _, nbytes in sizes))


def read_header(file: BinaryIO) -> tuple[list[tuple[str, int, int]], int]:
    """Return name, number of weights and offset of each tensor of a GGUF file by offset, and where its data begin."""
    magic, _, tensors, values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF":
        raise SystemExit(f"{file.name}: not a GGUF file")
    alignment = 32
    for _ in range(values):
        name, kind = string(file), integer(file, "I")
        if name == ALIGNMENT and kind == UINT32:
            alignment = integer(file, "I")
        else:
            skip(file, kind)
    found = sorted(tensor_infos(file, tensors), key=lambda info: info[2])
    return found, math.ceil(file.tell() / alignment) * alignment


def tensor_infos(file: BinaryIO, count: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, number of weights and offset of the next `count` tensors."""
    for _ in range(count):
        name, dimensions = string(file), integer(file, "I")
        weights = math.prod(integer(file, "Q") for _ in range(dimensions))
        integer(file, "I")  # its type: bytes are told by offsets
        yield name, weights, integer(file, "Q")


def skip(file: BinaryIO, kind: int) -> None:
    """Go on behind a value of that type."""
    if kind == STRING:
        string(file)
    elif kind == LIST:
        kind, count = integer(file, "I"), integer(file, "Q")
        for _ in range(count):
            skip(file, kind)
    else:
        file.seek(SCALAR_BYTES[kind], 1)


def string(file: BinaryIO) -> str:
    """Read a string."""
    return file.read(integer(file, "Q")).decode(errors="replace")


def integer(file: BinaryIO, kind: str) -> int:
    """Read a whole number: I of 4 bytes, or Q of 8."""
    (value,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))
    return int(value)


if __name__ == "__main__":
    main()
