"""Speed, reads and peak memory from the least memory that works to the whole model, and whether texts agree.

    python benchmarks/streaming/budgets.py BUNDLE --shares 0 0.1 0.25 0.5 0.75 1

A budget is the least memory that works plus a share of the experts. Each run is in a cgroup with the budget and the
margin that the runtime leaves, with an empty page cache, in interleaved rounds. Exits with 1 where the kernel killed
a process, the peak exceeds the budget, a budget is slower than a smaller one by more than 5%, or texts differ.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from dymoe_runtime.process import MARGIN

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # where limited.py is

from limited import Outcome, run

WORSE = 0.05
PROMPT = "The river flows through the town of"


def main() -> None:
    """Print a row for each budget; exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--options", default="--tiers 4", help="for dymoe-run")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    dymoe, options = Path(sys.executable).with_name("dymoe-run"), args.options.split()
    bench = [dymoe, "bench", args.bundle, *options, "--warm-up", "--json", "--threads", str(args.threads)]
    bench += ["--prompt-tokens", str(args.prompt), "--new-tokens", str(args.new_tokens)]
    answer = [dymoe, args.bundle, *options, "--prompt", PROMPT, "--max-tokens", "32", "--ignore-eos", "--json"]
    # A prompt needs the tokenizer too.
    floor = max(min_memory([*command, "--memory", "1MiB"]) for command in (bench, answer))
    experts = sum(path.stat().st_size for path in args.bundle.glob("experts-*"))
    budgets = [floor + int(share * experts) for share in sorted(args.shares)]
    found: dict[int, list[tuple[Outcome, dict[str, Any]]]] = defaultdict(list)
    texts = defaultdict(set)
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        for place, budget in enumerate(budgets):
            limit = limit_for(budget)
            found[budget].append(result(run(bench, limit)))
            flags = ([], ["--no-prefetch"], ["--threads", "1"])[(number + place) % 3]
            texts[budget].add(result(run([*answer, *flags], limit))[1]["text"])
    sys.exit(report(found, texts))


def report(found: dict[int, list[tuple[Outcome, dict[str, Any]]]], texts: dict[int, set[str]]) -> bool:
    """Print the table; return whether something is wrong."""
    wrong = False
    names = ("budget MB", "peak MB", "arena MB", "hit rate", "MB/token", f"{'tokens/s':>24}", "prompt/s")
    print("".join(f"{name:>10}" for name in names))
    best = 0.0
    for budget, runs in found.items():
        rates = sorted(result["tokens_per_s"] for _, result in runs)
        rate, (_, last) = statistics.median(rates), runs[-1]
        peak = max(result["peak_rss_bytes"] for _, result in runs)
        notes = [
            *(["killed"] if any(outcome.oom_kills for outcome, _ in runs) else []),
            *(["peak above the budget"] if peak > budget else []),
            *([f"{1 - rate / best:.0%} slower than with less memory"] if rate < (1 - WORSE) * best else []),
        ]
        best = max(best, rate)
        wrong |= bool(notes)
        prompt = statistics.median(result["prompt_tokens_per_s"] for _, result in runs)
        print(
            f"{budget / 1e6:>10.0f}{peak / 1e6:>10.0f}{last['arena_bytes'] / 1e6:>10.0f}{last['hit_rate']:>10.1%}"
            f"{last['decode_read_bytes_per_token'] / 1e6:>10.1f}"
            f"{f'{rate:.1f} ({rates[0]:.1f}-{rates[-1]:.1f})':>24}{prompt:>10.0f}  {', '.join(notes)}"
        )
    same = len(set().union(*texts.values())) == 1
    print(f"one text at every budget, with and without prefetch, with 1 thread and 2: {'yes' if same else 'NO'}")
    return wrong or not same


def limit_for(budget: int) -> int:
    """Return the limit in bytes that leaves a process `budget`, in whole pages, to which the kernel rounds it down."""
    return math.ceil(budget / (1 - MARGIN) / mmap.PAGESIZE) * mmap.PAGESIZE


def min_memory(command: list[str | Path]) -> int:
    """Return the bytes that the error for too small a budget names."""
    refused = run(command)
    named = re.search(r"--memory (\d+)MiB", refused.err)
    if named is None:
        raise SystemExit(refused.err)
    return int(named[1]) << 20


def result(outcome: Outcome) -> tuple[Outcome, dict[str, Any]]:
    """Return an outcome with the JSON that it printed last; exit where it failed."""
    if outcome.code:
        raise SystemExit(f"exit code {outcome.code}, {outcome.oom_kills} kills: {outcome.err[-500:]}")
    return outcome, json.loads(outcome.out.splitlines()[-1])


if __name__ == "__main__":
    main()
