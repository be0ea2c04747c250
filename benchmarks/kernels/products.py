"""How fast the expert and dense kernels run: bytes per second against memory, and operations per second.

    python benchmarks/kernels/products.py --hidden 2048 --width 1024

Random weights of a layer of `--experts`; each decoding call runs `--top-k` of them for one token, in
turn, so that what it reads has left the caches. The bandwidth of memory is measured between the
calls, with the same threads. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

import dymoe_runtime
from dymoe_runtime import kernels
from dymoe_runtime.kernels.job import Job
from dymoe_runtime.kernels.native import read_memory
from dymoe_runtime.memory import map_memory
from dymoe_runtime.tiers import RecordLayout, make_layout, split_record

SWEEP_BYTES = 256 << 20  # more than any cache
SMALL = 0x38D2  # about 1e-4 in bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    kernels.set_threads(args.threads)
    print(f"dymoe {dymoe_runtime.__version__}, {kernels.isa()}, {args.threads} threads")
    shapes = {"gate": (args.width, args.hidden), "up": (args.width, args.hidden), "down": (args.hidden, args.width)}
    sweep = np.frombuffer(map_memory(SWEEP_BYTES), np.uint8)
    sweep[:] = 1  # pages that nobody has written to are one and the same
    print(f"{'experts':<16}{'bits':>6}{'us/token':>10}{'GB/s':>8}{'of memory':>11}")
    for ladder, tier in (((2, 3, 4), 2), ((2, 3, 4), 3), ((2, 3, 4), 4), ((8,), 8)):
        layout = make_layout(shapes, ladder)
        records = random_records(layout, args.experts)
        decode(layout, tier, records, sweep, args)
    print(f"{'prompt':<16}{'bits':>6}{'tokens':>10}{'GOP/s':>8}")
    for ladder, tier in (((2, 3, 4), 2), ((2, 3, 4), 4), ((8,), 8)):
        layout = make_layout(shapes, ladder)
        records = random_records(layout, args.experts)
        for tokens in (128, 512):
            prompt(layout, tier, records, tokens, args)


def random_records(layout: RecordLayout, count: int) -> list[list[np.ndarray]]:
    """Segments of each, side by side: any bytes are codes and steps; the multipliers are small numbers."""
    memory = np.frombuffer(map_memory(count * layout.record_bytes), np.uint8)
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.size, np.uint8)
    records = [split_record(layout, record) for record in memory.reshape(count, -1)]
    for where in layout.matrices.values():
        part = where.multiplier
        for segments in records:
            segments[part.segment][part.offset : part.offset + part.nbytes].view(np.uint16)[:] = SMALL
    return records


def random_rows(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, cols), np.float32)


def decode(
    layout: RecordLayout,
    tier: int,
    records: Sequence[list[np.ndarray]],
    sweep: np.ndarray,
    args: argparse.Namespace,
) -> None:
    hidden = layout.matrices["gate"].cols
    x, y = random_rows(1, hidden), np.empty((args.top_k, hidden), np.float32)
    tokens = np.zeros(args.top_k, np.int64)
    needed = layout.segments_of(tier)
    experts = [kernels.prepare(layout, tier, record[:needed]) for record in records]
    groups = [
        [Job(expert, row, 1) for row, expert in enumerate(experts[first : first + args.top_k])]
        for first in range(0, len(records) - args.top_k + 1, args.top_k)
    ]

    def all_groups() -> None:
        for jobs in groups:
            kernels.moe(jobs, x, tokens, y)

    ours, memory = interleaved([all_groups, lambda: read_memory(sweep)], args.rounds)
    nbytes = args.top_k * sum(layout.segment_bytes[:needed])
    rate, bandwidth = nbytes * len(groups) / ours / 1e9, SWEEP_BYTES / memory / 1e9
    print(f"{'':<16}{tier:>6}{1e6 * ours / len(groups):>10.0f}{rate:>8.1f}{rate / bandwidth:>11.0%}")


def prompt(
    layout: RecordLayout, tier: int, records: Sequence[list[np.ndarray]], tokens: int, args: argparse.Namespace
) -> None:
    hidden, width = layout.matrices["gate"].cols, layout.matrices["gate"].rows
    each = max(1, tokens * args.top_k // len(records))  # tokens of an expert
    x, y = random_rows(tokens, hidden), np.empty((each * len(records), hidden), np.float32)
    where = np.arange(each * len(records)) % tokens
    jobs = [Job(kernels.prepare(layout, tier, record), each * row, each) for row, record in enumerate(records)]
    (seconds,) = interleaved([lambda: kernels.moe(jobs, x, where, y)], args.rounds)
    print(f"{'':<16}{tier:>6}{tokens:>10}{2 * len(y) * 3 * hidden * width / seconds / 1e9:>8.0f}")


def interleaved(work: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, taken in turn after one round to warm up."""
    times: list[list[float]] = [[] for _ in work]
    for _ in range(rounds + 1):
        for each, run in zip(times, work, strict=True):
            started = time.perf_counter()
            run()
            each.append(time.perf_counter() - started)
    return [statistics.median(each[1:]) for each in times]


if __name__ == "__main__":
    main()
