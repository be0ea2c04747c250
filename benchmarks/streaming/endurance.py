"""Many minutes of prompts and answers in one process inside a memory limit: does anything grow, or get worse?

    python benchmarks/streaming/endurance.py BUNDLE --limit-mb 982 --minutes 30

Prompts have random lengths and random tokens; 64 tokens are decoded after each. Prints a line for each minute: resident
memory, the hit rate without prefetched experts, milliseconds per token and bytes read. Prefetched experts do not count
because prefetch is switched on and off as it pays. Exits with 1 where the most memory of the second half is 1% above
that of the first, or the last third of the time is more than 10% slower, or hits 2 points less, than the third before.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # where limited.py is

from limited import run

NEW_TOKENS = 64
PROMPTS = (16, 512)
MIN_MINUTES = 6


@dataclass
class Minute:
    """The figures of one minute."""

    resident: int
    hit_rate: float
    tpot_ms: float
    read_mb: float
    threads: int


def main() -> None:
    """Run this script inside the limit, and print what it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit-mb", type=float, required=True, help="10^6 bytes, whole process")
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--point", default="3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.minutes < MIN_MINUTES:
        parser.error(f"--minutes {args.minutes}: expected at least {MIN_MINUTES}")
    if args.inside:
        sys.exit(generate(args))
    command = [sys.executable, "-u", __file__, *sys.argv[1:], "--inside"]
    outcome = run(command, int(args.limit_mb * 1e6), timeout_s=120 * args.minutes)
    print(outcome.out, end="")
    print(f"peak by the kernel {outcome.peak_bytes / 1e6:.0f} MB, {outcome.oom_kills} kills")
    sys.exit(f"exit code {outcome.code}: {outcome.err[-800:]}" if outcome.code else 0)


def generate(args: argparse.Namespace) -> bool:
    """Print a line for each minute; return whether something grew or got worse."""
    from dymoe_runtime.bundle.bundle import Bundle
    from dymoe_runtime.engine.load import load_model
    from dymoe_runtime.engine.options import RunOptions
    from dymoe_runtime.process import resident_bytes

    bundle, rng = Bundle.open(args.bundle), random.Random(0)
    context = min(PROMPTS[1] + NEW_TOKENS, bundle.spec.max_context)
    longest = context - NEW_TOKENS
    options = RunOptions(context=context, point=args.point, threads=args.threads)
    minutes: list[Minute] = []
    print(f"{'minute':>6}{'resident MB':>13}{'hit rate':>10}{'ms/token':>10}{'MB read':>9}{'threads':>9}")
    with load_model(bundle, options) as model:
        for number in range(args.minutes):
            until, times = time.monotonic() + 60, []
            model.reset_stats()
            while time.monotonic() < until:
                model.reset()
                model.prefill([rng.randrange(bundle.spec.vocab_size) for _ in range(rng.randint(PROMPTS[0], longest))])
                for _ in range(NEW_TOKENS):
                    started = time.perf_counter()
                    model.decode(rng.randrange(bundle.spec.vocab_size))
                    times.append(time.perf_counter() - started)
            stats, tpot = model.store.stats, 1e3 * statistics.mean(times)
            hit_rate = (stats.hits - stats.prefetch_hits) / stats.requests
            now = Minute(resident_bytes(), hit_rate, tpot, stats.read_bytes / 1e6, len(os.listdir("/proc/self/task")))
            minutes.append(now)
            print(
                f"{number + 1:>6}{now.resident / 1e6:>13.1f}{now.hit_rate:>10.1%}{now.tpot_ms:>10.1f}"
                f"{now.read_mb:>9.0f}{now.threads:>9}"
            )
    return worsened(minutes)


def worsened(minutes: list[Minute]) -> bool:
    """Print how the figures changed; return whether by too much."""
    third = len(minutes) // 3
    last, before = minutes[-third:], minutes[-2 * third : -third]
    half = len(minutes) // 2  # each minute ends after another prompt, which the arena has lent memory to
    grown = max(m.resident for m in minutes[half:]) / max(m.resident for m in minutes[:half]) - 1
    slower = statistics.median(m.tpot_ms for m in last) / statistics.median(m.tpot_ms for m in before) - 1
    fewer = statistics.median(m.hit_rate for m in before) - statistics.median(m.hit_rate for m in last)
    print(f"memory grew by {grown:.2%}, tokens take {slower:+.1%}, hits fell by {fewer:.2%} of all")
    return grown > 0.01 or slower > 0.1 or fewer > 0.02


if __name__ == "__main__":
    main()
