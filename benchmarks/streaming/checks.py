"""What it costs to check every expert that is read: decoding with checksums and without, in a memory limit.

    python benchmarks/models/make.py olmoe /tmp/olmoe --layers 4
    dymoe-compile /tmp/olmoe -o /tmp/olmoe.dymoe --dense-bits 4 --calibration-tokens 8192
    python benchmarks/streaming/checks.py /tmp/olmoe.dymoe --limit-mb 460

Each round runs the benchmark of dymoe-run once with the checks and once without, in turns first, each in a process of
its own with an empty page cache. Both give the same tokens. Prints medians and ranges of tokens/s, and the *cost*: by
how much a token takes longer with the checks, of the medians and as the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # where limited.py is

from limited import checked, run

from dymoe_runtime.cli.__main__ import run as dymoe_run
from dymoe_runtime.store.record_reader import RecordReader

UNCHECKED = "--unchecked"


def main() -> None:
    """Print the figures."""
    if sys.argv[1:2] == [UNCHECKED]:
        run_unchecked(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit-mb", type=float, required=True, help="10^6 bytes, whole process")
    parser.add_argument("--tiers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rounds = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        first = bool(number % 2)
        results = {checks: measure(args, checks) for checks in (first, not first)}
        rounds.append((results[True], results[False]))
    print_table(rounds)


def run_unchecked(arguments: Sequence[str]) -> None:
    """Run dymoe-run with a reader that knows no checksums."""
    read = RecordReader.__call__
    RecordReader.__call__ = lambda *what: read(*what)._replace(checksums=())  # type: ignore[method-assign]
    sys.argv[1:] = arguments
    dymoe_run()


def measure(args: argparse.Namespace, checks: bool) -> dict[str, Any]:
    """Return what one process says of itself."""
    start = ["-m", "dymoe_runtime"] if checks else [__file__, UNCHECKED]
    command = [sys.executable, *start, "bench", str(args.bundle), "--json", "--tiers", str(args.tiers)]
    command += ["--prompt-tokens", str(args.prompt), "--new-tokens", str(args.new_tokens)]
    command += ["--threads", str(args.threads)]
    outcome = checked(run(command, int(args.limit_mb * 1e6)))
    result: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    return result


def print_table(rounds: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Print tokens/s with checks and without, and what the checks cost."""
    times = [[result["tpot_s"] for result in results] for results in zip(*rounds, strict=True)]
    for name, seconds in zip(("checked", "unchecked"), times, strict=True):
        rates = sorted(1 / s for s in seconds)
        print(f"{name:<10}{1 / statistics.median(seconds):>7.1f} tokens/s ({rates[0]:.1f}-{rates[-1]:.1f})")
    of_medians = statistics.median(times[0]) / statistics.median(times[1]) - 1
    of_rounds = statistics.median(checked / unchecked - 1 for checked, unchecked in zip(*times, strict=True))
    read = statistics.median(result["decode_read_bytes_per_token"] for result, _ in rounds)
    print(f"cost {of_medians:+.1%} of the medians, {of_rounds:+.1%} by round; {read / 1e6:.1f} MB read a token")
    print(f"{len(rounds)} rounds; {processor()}")


def processor() -> str:
    """Return the name of this machine's processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


if __name__ == "__main__":
    main()
