"""What the experts of a layer cost to compute, measured on this machine."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dymoe_runtime import kernels
from dymoe_runtime.kernels.job import Expert, Job
from dymoe_runtime.tiers import RecordLayout, split_record

# Tokens of an expert that are measured; what lies between is interpolated.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256)
# Records in turn, so that what is measured comes from memory as it will: more than the caches hold.
SWEEP_BYTES = 256 << 20
# The same where a moment counts, and a little too short a time does no harm.
QUICK_SWEEP_BYTES = 64 << 20
# Finite weights of ordinary sizes in every byte of a record.
FILLER = 0x3C
ROUNDS = 5
# Experts of a call that is measured for more than one token.
PROMPT_EXPERTS = 8


@dataclass(frozen=True)
class CostModel:
    """Seconds of a layer's experts: of a call, and by tier what an expert adds with each of `counts` tokens."""

    counts: tuple[int, ...]
    call_s: float
    expert_s: Mapping[int, tuple[float, ...]]

    def expert(self, tier: int, tokens: int) -> float:
        """Seconds of one expert at `tier` for so many tokens."""
        times = self.expert_s[tier]
        if len(times) == 1:
            return times[0] * tokens / self.counts[0]
        right = min(max(bisect_left(self.counts, tokens), 1), len(times) - 1)
        (x0, x1), (y0, y1) = self.counts[right - 1 : right + 1], times[right - 1 : right + 1]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def layer(self, runs: Iterable[tuple[int, int]]) -> float:
        """Seconds of a call of (tier, tokens), one for each expert."""
        return self.call_s + sum(self.expert(tier, tokens) for tier, tokens in runs)

    def to_json(self) -> dict[str, Any]:
        expert_us = {str(tier): [1e6 * s for s in times] for tier, times in self.expert_s.items()}
        return {"tokens": list(self.counts), "call_us": 1e6 * self.call_s, "expert_us": expert_us}


def measure(
    layout: RecordLayout,
    top_k: int,
    experts: int,
    memory: np.ndarray,
    activation: str = "silu",
    counts: Sequence[int] = COUNTS,
    sweep_bytes: int = SWEEP_BYTES,
) -> CostModel:
    """The costs of records of `layout`, `top_k` of `experts` in the whole model to a token.

    `memory`, uint8 [bytes] that holds at least one record, is overwritten with records to measure: about `sweep_bytes`.
    """
    hidden = layout.matrices["gate"].cols
    records = _records(layout, memory, min(experts, max(1, sweep_bytes // sum(layout.segment_spans))))
    x = np.sin(np.arange(max(counts) * hidden, dtype=np.float32)).reshape(-1, hidden)
    alone, groups = {}, {}
    for tier in layout.ladder:
        ready = [kernels.prepare(layout, tier, record[: layout.segments_of(tier)]) for record in records]
        alone[tier] = _seconds(ready, 1, 1, x, activation)
        groups[tier] = [_seconds(ready, top_k if n == 1 else PROMPT_EXPERTS, n, x, activation) for n in counts]
    sizes = [top_k if tokens == 1 else PROMPT_EXPERTS for tokens in counts]
    # One expert alone is a call and an expert, `top_k` are a call and so many.
    call_s = max(0.0, statistics.median((top_k * alone[t] - groups[t][0]) / max(top_k - 1, 1) for t in layout.ladder))
    each = {t: tuple((s - call_s) / n for s, n in zip(groups[t], sizes, strict=True)) for t in layout.ladder}
    return CostModel(tuple(counts), call_s, each)


def _records(layout: RecordLayout, memory: np.ndarray, most: int) -> list[list[np.ndarray]]:
    """As many records as fit, or as the model has: a list of segments each."""
    size = sum(layout.segment_spans)
    count = min(most, len(memory) // size)
    memory[: count * size] = FILLER
    return [split_record(layout, memory[i * size : (i + 1) * size]) for i in range(count)]


def _seconds(experts: Sequence[Expert], group: int, tokens: int, x: np.ndarray, activation: str) -> float:
    """Median seconds of a call of `group` experts with `tokens` each; groups take turns."""
    y = np.empty((group * tokens, x.shape[1]), np.float32)
    rows = np.arange(group * tokens) % tokens
    gates = np.full((1, group), 1 / group, np.float32)
    times = []
    for turn in range(max(ROUNDS, -(-len(experts) // group)) if tokens == 1 else ROUNDS):
        chosen = [experts[(turn * group + i) % len(experts)] for i in range(group)]
        jobs = [Job(expert, i * tokens, tokens) for i, expert in enumerate(chosen)]
        started = time.perf_counter()
        if tokens == 1:
            kernels.moe_token(chosen, x[:1], gates, activation)
        else:
            kernels.moe(jobs, x[:tokens], rows, y, activation)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
