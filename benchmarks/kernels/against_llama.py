"""Decoding and prompts with everything in memory, against llama.cpp and ik_llama.cpp on the same machine.

    python benchmarks/kernels/against_llama.py BUNDLE --llama-bench PATH --gguf Q4_K_M.gguf --gguf Q2_K.gguf

`--llama-bench` is that of llama.cpp or of ik_llama.cpp, and may be given for both. Each round runs every setting once,
in a fresh process: this bundle uniformly at `--tiers` and at `--points`, and each GGUF file by each program that reads
its type, with and without weights repacked at load. Prompts of 128 and 512 random tokens, 64 random tokens decoded.
Prints medians, ranges, and the ratio to the peers' best. `--isa avx2` restricts this side to an instruction set; build
the peers for the same one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PROMPTS = (128, 512)
NEW = 64

# test -> tokens per second of each round
Rates = dict[str, list[float]]


@dataclass(frozen=True)
class Peer:
    """A llama-bench, and its option for weights that are repacked at load."""

    path: Path
    name: str
    repack: str

    @staticmethod
    def of(path: Path) -> Peer:
        """Return the peer whose bench this is, by the options that it names."""
        usage = subprocess.run([str(path), "--help"], capture_output=True, text=True)
        if "-rtr" in usage.stdout + usage.stderr:
            return Peer(path, "ik_llama.cpp", "-rtr")
        return Peer(path, "llama.cpp", "--repack")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--llama-bench", type=Path, action="append", required=True)
    parser.add_argument("--gguf", type=Path, action="append", required=True)
    parser.add_argument("--tiers", default="4,2")
    parser.add_argument("--points", default="3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--isa", default="", help="instruction set of this side, as in DYMOE_ISA")
    args = parser.parse_args()
    ours = [("--tiers", tier) for tier in args.tiers.split(",")] + [("--point", p) for p in args.points.split(",")]
    peers = [Peer.of(path) for path in args.llama_bench]
    results: dict[str, Rates] = defaultdict(lambda: defaultdict(list))
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        for option in ours:
            for test, rate in run_ours(args, option).items():
                results["dymoe " + " ".join(option)][test].append(rate)
        for peer, path, repack in itertools.product(peers, args.gguf, (0, 1)):
            for test, rate in run_llama(args, peer, path, repack).items():
                results[f"{peer.name} {path.stem} repack {repack}"][test].append(rate)
    print_table(results)


def run_ours(args: argparse.Namespace, option: tuple[str, str]) -> dict[str, float]:
    """Return the tokens per second of each test, by `in_memory.py`."""
    command = [sys.executable, str(Path(__file__).with_name("in_memory.py")), str(args.bundle), *option]
    command += ["--threads", str(args.threads), "--new-tokens", str(NEW), *map(str, PROMPTS)]
    environment = os.environ | ({"DYMOE_ISA": args.isa} if args.isa else {})
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def run_llama(args: argparse.Namespace, peer: Peer, path: Path, repack: int) -> dict[str, float]:
    """Return the tokens per second of each test that llama-bench survives, each in a process of its own."""
    rates = {}
    for test, sizes in {f"tg{NEW}": (0, NEW), **{f"pp{tokens}": (tokens, 0) for tokens in PROMPTS}}.items():
        command = [str(peer.path), "-m", str(path), "-t", str(args.threads)]
        command += ["-p", str(sizes[0]), "-n", str(sizes[1]), "-r", "1", peer.repack, str(repack), "-o", "json"]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            print(f"{peer.name}, {path.stem}, {test}: llama-bench ends with {ended.returncode}", file=sys.stderr)
        else:
            rates[test] = json.loads(ended.stdout)[0]["avg_ts"]
    return rates


def print_table(results: dict[str, Rates]) -> None:
    """Print median, range and ratio of each setting and test."""
    tests = [f"tg{NEW}", *(f"pp{tokens}" for tokens in PROMPTS)]
    peers = [rates for name, rates in results.items() if not name.startswith("dymoe")]
    best = {test: max((median(rates[test]) for rates in peers if rates[test]), default=math.nan) for test in tests}
    print(f"{'tokens per second':<40}" + "".join(f"{test:>24}{'ratio':>7}" for test in tests))
    for name, rates in results.items():
        print(f"{name:<40}" + "".join(cell(rates[test], best[test]) for test in tests))


def cell(rates: Sequence[float], best: float) -> str:
    """Return median, range and ratio to the best median of the peers; there are no rates of what has crashed."""
    if not rates:
        return f"{'crashed':>24}{'':>7}"
    middle = median(rates)
    shown = f"{middle:.1f} ({min(rates):.1f}-{max(rates):.1f})"
    return f"{shown:>24}{middle / best:>7.2f}"


if __name__ == "__main__":
    main()
