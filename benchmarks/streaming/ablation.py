"""What each mechanism gains where memory is smaller than the model, added one at a time.

    python benchmarks/streaming/ablation.py BUNDLE --limit-mb 1964 982

The first rows are what published expert streamers do: one precision, what was used last stays (LRU), no prefetch.
Each round runs every row once, with an empty page cache, in a cgroup with the limit, after a prompt to warm up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # where limited.py is

from limited import checked, run

ROWS = {
    "4 bits, LRU": ["--tiers", "4", "--decay", "2", "--no-prefetch", "--no-overlap"],
    "+ overlap": ["--tiers", "4", "--decay", "2", "--no-prefetch"],
    "+ LFU with decay": ["--tiers", "4", "--no-prefetch"],
    "+ prefetch": ["--tiers", "4"],
    "+ mixed precision": ["--point", "3"],
    "+ --latency": ["--point", "3", "--latency"],
}


def main() -> None:
    """Print a table for each limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit-mb", type=float, nargs="+", required=True, help="10^6 bytes, whole process")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    command = [Path(sys.executable).with_name("dymoe-run"), "bench", args.bundle, "--warm-up", "--json"]
    command += ["--prompt-tokens", str(args.prompt), "--new-tokens", str(args.new_tokens)]
    command += ["--threads", str(args.threads)]
    for limit in args.limit_mb:
        found = defaultdict(list)
        for number in range(args.rounds):
            print(f"limit {limit:.0f} MB, round {number + 1} of {args.rounds}", file=sys.stderr)
            for name, options in ROWS.items():
                outcome = checked(run([*command, *options], int(limit * 1e6)))
                found[name].append(json.loads(outcome.out.splitlines()[-1]))
        print(f"\n{limit:.0f} MB{'':<13}{'bits':>6}{'ms/token':>10}{'range':>16}{'MB/token':>10}{'hit rate':>10}")
        for name, results in found.items():
            times = sorted(1e3 * result["tpot_s"] for result in results)
            last = results[-1]
            print(
                f"{name:<20}{last['bits_mean']:>6.2f}{statistics.median(times):>10.1f}"
                f"{f'{times[0]:.1f}-{times[-1]:.1f}':>16}{last['decode_read_bytes_per_token'] / 1e6:>10.1f}"
                f"{last['hit_rate']:>10.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
