"""How fast the expert and dense kernels run: bytes per second against memory, and operations per second.

    python benchmarks/kernels/products.py --hidden 2048 --width 1024

The weights of a layer of `--experts` are random. Each decoding call runs `--top-k` of them for one token, in turn, so
that what it reads has left the caches. The bandwidth of memory is measured between the calls, with the same threads.
All figures are medians. The environment variable DYMOE_ISA names another instruction set than the best. `/scalar` is
the time over that of the scalar grid, measured in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

import dymoe_runtime
from dymoe_runtime.bundle.tiers import RecordLayout, grid_for, make_layout, split_record
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.kernels.native import read_memory
from dymoe_runtime.kernels.prepared import ExpertRows
from dymoe_runtime.memory import map_memory
from dymoe_runtime.spec import mlp_shapes

SWEEP_BYTES = 256 << 20  # more than any cache
SMALL = 0x38D2  # about 1e-4 in bf16
ACTIVATION = "silu"


@dataclass(frozen=True)
class Experts:
    """The records of a layer, as lists of segments, and the tier at which they run."""

    layout: RecordLayout
    tier: int
    records: Sequence[list[np.ndarray]]


def main() -> None:
    """Print the rates of decoding and of prompts at each tier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    kernels = load_kernels(threads=args.threads)
    print(f"dymoe {dymoe_runtime.__version__}, {kernels.name}, {kernels.threads()} threads")
    shapes = mlp_shapes(args.hidden, args.width)
    sweep = np.frombuffer(map_memory(SWEEP_BYTES), np.uint8)
    sweep[:] = 1  # pages that nobody has written to are one and the same
    print(f"{'experts':<16}{'bits':>6}{'us/token':>10}{'GB/s':>8}{'of memory':>11}{'/scalar':>9}")
    for ladder, tier in (((2, 3, 4), 2), ((2, 3, 4), 3), ((2, 3, 4), 4), ((8,), 8)):
        decode(kernels, on_grids(shapes, ladder, tier, args.experts), sweep, args)
    print(f"{'prompt':<16}{'bits':>6}{'tokens':>10}{'GOP/s':>8}{'/scalar':>9}")
    for ladder, tier in (((2, 3, 4), 2), ((2, 3, 4), 4), ((8,), 8)):
        experts = on_grids(shapes, ladder, tier, args.experts)
        for tokens in (128, 512):
            prompt(kernels, experts, tokens, args)


def on_grids(shapes: dict[str, tuple[int, int]], ladder: tuple[int, ...], tier: int, count: int) -> list[Experts]:
    """Return experts on the grid of new bundles, and the like on the scalar grid if that is another one."""
    grids = dict.fromkeys((grid_for(ladder), ""))
    return [random_experts(shapes, ladder, tier, count, grid) for grid in grids]


def random_experts(
    shapes: dict[str, tuple[int, int]], ladder: tuple[int, ...], tier: int, count: int, grid: str
) -> Experts:
    """Return experts side by side in memory: any bytes are codes and scales; the multipliers are small numbers."""
    layout = make_layout(shapes, ladder, grid=grid)
    memory = np.frombuffer(map_memory(count * layout.record_bytes), np.uint8)
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.size, np.uint8)
    records = [split_record(layout, record) for record in memory.reshape(count, -1)]
    for where in layout.matrices.values():
        part = where.multiplier
        for segments in records:
            segments[part.segment][part.offset : part.offset + part.nbytes].view(np.uint16)[:] = SMALL
    return Experts(layout, tier, records)


def random_rows(rows: int, cols: int) -> np.ndarray:
    """Return normal random numbers, float32 [rows, cols]."""
    return np.random.default_rng(0).standard_normal((rows, cols), np.float32)


def decode(kernels: Kernels, grids: Sequence[Experts], sweep: np.ndarray, args: argparse.Namespace) -> None:
    """Print what `--top-k` experts take for one token, and how much of memory's bandwidth they use."""
    runs = [decoding(kernels, experts, args) for experts in grids]
    *seconds, memory = interleaved([*runs, lambda: read_memory(sweep)], args.rounds)
    layout, tier = grids[0].layout, grids[0].tier
    nbytes = args.top_k * sum(layout.segment_bytes[: layout.segments_of(tier)])
    groups = len(grids[0].records) // args.top_k
    rate, bandwidth = nbytes * groups / seconds[0] / 1e9, SWEEP_BYTES / memory / 1e9
    print(
        f"{'':<16}{tier:>6}{1e6 * seconds[0] / groups:>10.0f}{rate:>8.1f}{rate / bandwidth:>11.0%}", compared(seconds)
    )


def decoding(kernels: Kernels, experts: Experts, args: argparse.Namespace) -> Callable[[], None]:
    """Return what runs all experts for one token each, `--top-k` at a time."""
    layout, tier, records = experts.layout, experts.tier, experts.records
    hidden = layout.matrices["gate"].cols
    x, y = random_rows(1, hidden), np.empty((args.top_k, hidden), np.float32)
    tokens = np.zeros(args.top_k, np.int64)
    prepared = [kernels.prepare(layout, tier, record[: layout.segments_of(tier)]) for record in records]
    groups = [
        [ExpertRows(expert, row, 1) for row, expert in enumerate(prepared[first : first + args.top_k])]
        for first in range(0, len(records) - args.top_k + 1, args.top_k)
    ]

    def all_groups() -> None:
        for parts in groups:
            kernels.moe(parts, x, tokens, y, ACTIVATION)

    return all_groups


def prompt(kernels: Kernels, grids: Sequence[Experts], tokens: int, args: argparse.Namespace) -> None:
    """Print how many operations per second a layer does for a prompt, whose tokens all experts share alike."""
    tier, records = grids[0].tier, grids[0].records
    hidden, width = grids[0].layout.matrices["gate"].cols, grids[0].layout.matrices["gate"].rows
    each = max(1, tokens * args.top_k // len(records))  # tokens of an expert
    x, y = random_rows(tokens, hidden), np.empty((each * len(records), hidden), np.float32)
    where = np.arange(each * len(records)) % tokens

    def reading(experts: Experts) -> Callable[[], None]:
        prepared = [kernels.prepare(experts.layout, tier, record) for record in experts.records]
        parts = [ExpertRows(expert, each * row, each) for row, expert in enumerate(prepared)]
        return lambda: kernels.moe(parts, x, where, y, ACTIVATION)

    seconds = interleaved([reading(experts) for experts in grids], args.rounds)
    print(f"{'':<16}{tier:>6}{tokens:>10}{2 * len(y) * 3 * hidden * width / seconds[0] / 1e9:>8.0f}", compared(seconds))


def compared(seconds: Sequence[float]) -> str:
    """Return the first time over the second, or nothing if there is no second."""
    return f"{seconds[0] / seconds[1]:>8.2f}" if len(seconds) > 1 else ""


def interleaved(work: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each piece of work; they take turns, after one round to warm up."""
    times: list[list[float]] = [[] for _ in work]
    for _ in range(rounds + 1):
        for each, run in zip(times, work, strict=True):
            started = time.perf_counter()
            run()
            each.append(time.perf_counter() - started)
    return [statistics.median(each[1:]) for each in times]


if __name__ == "__main__":
    main()
