"""Decoding and prompts with everything in memory, against llama.cpp on the same machine.

    python benchmarks/kernels/against_llama.py BUNDLE --llama-bench PATH --gguf Q4_K_M.gguf --gguf Q2_K.gguf

Each round runs every setting once, in a fresh process: this bundle uniformly at `--tiers` and at
`--points`, and each GGUF file with and without weights repacked at load. Prompts of 128 and 512
random tokens, 64 random tokens decoded. Prints medians, ranges, and the ratio to llama.cpp's best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

PROMPTS = (128, 512)
NEW = 64

# test -> tokens per second of each round
Rates = dict[str, list[float]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, action="append", required=True)
    parser.add_argument("--tiers", default="4,2")
    parser.add_argument("--points", default="3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ours = [("--tiers", tier) for tier in args.tiers.split(",")] + [("--point", p) for p in args.points.split(",")]
    results: dict[str, Rates] = defaultdict(lambda: defaultdict(list))
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        for option in ours:
            for test, rate in run_ours(args, option).items():
                results["dymoe " + " ".join(option)][test].append(rate)
        for path in args.gguf:
            for repack in (0, 1):
                for test, rate in run_llama(args, path, repack).items():
                    results[f"{path.stem} repack {repack}"][test].append(rate)
    print_table(results)


def run_ours(args: argparse.Namespace, option: tuple[str, str]) -> dict[str, float]:
    """Return the tokens per second of each test, by `in_memory.py`."""
    command = [sys.executable, str(Path(__file__).with_name("in_memory.py")), str(args.bundle), *option]
    command += ["--threads", str(args.threads), "--new-tokens", str(NEW), *map(str, PROMPTS)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_llama(args: argparse.Namespace, path: Path, repack: int) -> dict[str, float]:
    """Return the tokens per second of each test that llama-bench survives, each in a process of its own."""
    rates = {}
    for test, sizes in {f"tg{NEW}": (0, NEW), **{f"pp{tokens}": (tokens, 0) for tokens in PROMPTS}}.items():
        command = [str(args.llama_bench), "-m", str(path), "-t", str(args.threads)]
        command += ["-p", str(sizes[0]), "-n", str(sizes[1]), "-r", "1", "--repack", str(repack), "-o", "json"]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            print(f"{path.stem} repack {repack}, {test}: llama-bench ends with {ended.returncode}", file=sys.stderr)
        else:
            rates[test] = json.loads(ended.stdout)[0]["avg_ts"]
    return rates


def print_table(results: dict[str, Rates]) -> None:
    """Print median, range and ratio of each setting and test."""
    tests = [f"tg{NEW}", *(f"pp{tokens}" for tokens in PROMPTS)]
    peers = [rates for name, rates in results.items() if not name.startswith("dymoe")]
    best = {test: max(statistics.median(rates[test]) for rates in peers if rates[test]) for test in tests}
    print(f"{'tokens per second':<28}" + "".join(f"{test:>24}{'ratio':>7}" for test in tests))
    for name, rates in results.items():
        print(f"{name:<28}" + "".join(cell(rates[test], best[test]) for test in tests))


def cell(rates: Sequence[float], best: float) -> str:
    """Return median, range and ratio to the best median of the peers; there are no rates of what has crashed."""
    if not rates:
        return f"{'crashed':>24}{'':>7}"
    middle = statistics.median(rates)
    shown = f"{middle:.1f} ({min(rates):.1f}-{max(rates):.1f})"
    return f"{shown:>24}{middle / best:>7.2f}"


if __name__ == "__main__":
    main()
