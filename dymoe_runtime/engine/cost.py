"""Compute time of a layer's experts, measured on this machine."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.tiers import RecordLayout, split_record
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.kernels.prepared import ExpertRows, PreparedExpert

# Tokens per expert that are measured; times in between are interpolated.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256)
# Bytes of records used in turn: more than CPU caches hold, so that weights come from memory as in a run.
SWEEP_BYTES = 256 << 20
# Sweep for a quick measurement at start-up, where a slightly too short time does no harm.
QUICK_SWEEP_BYTES = 64 << 20
# Byte that fills records; it makes every weight finite and of ordinary size.
FILLER = 0x3C
ROUNDS = 5
# Experts in a measured call of more than one token per expert.
PROMPT_EXPERTS = 8


@dataclass(frozen=True)
class CostModel:
    """Compute time of a layer's experts: a fixed time per call, and a time per expert by tier and tokens."""

    counts: tuple[int, ...]  # tokens per expert that were measured, rising
    call_s: float
    expert_s: Mapping[int, tuple[float, ...]]  # by tier, seconds for each of counts

    def expert(self, tier: int, tokens: int) -> float:
        """Return the seconds of one expert at `tier` for `tokens`, by linear inter- or extrapolation of `counts`."""
        times = self.expert_s[tier]
        if len(times) == 1:
            return times[0] * tokens / self.counts[0]
        right = min(max(bisect_left(self.counts, tokens), 1), len(times) - 1)
        (x0, x1), (y0, y1) = self.counts[right - 1 : right + 1], times[right - 1 : right + 1]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def layer(self, runs: Iterable[tuple[int, int]]) -> float:
        """Return the seconds of a call; `runs` has (tier, tokens) of each expert."""
        return self.call_s + sum(self.expert(tier, tokens) for tier, tokens in runs)

    def to_json(self) -> dict[str, Any]:
        """Return the measured counts, and times in us."""
        expert_us = {str(tier): [1e6 * s for s in times] for tier, times in self.expert_s.items()}
        return {"tokens": list(self.counts), "call_us": 1e6 * self.call_s, "expert_us": expert_us}


def measure_for(
    bundle: Bundle,
    kernels: Kernels,
    memory: np.ndarray,
    counts: Sequence[int] = COUNTS,
    sweep_bytes: int = SWEEP_BYTES,
) -> CostModel:
    """Measure the experts of a bundle; `memory` is overwritten, as in `measure`."""
    spec = bundle.spec
    shape = ExpertShape(bundle.layout, spec.top_k, spec.total_experts, spec.activation)
    return measure(kernels, shape, memory, counts, sweep_bytes)


@dataclass(frozen=True, eq=False)
class ExpertShape:
    """The properties of a model's experts on which their compute time depends."""

    layout: RecordLayout
    top_k: int  # experts of a token in a layer
    total: int  # experts in the whole model
    activation: str = "silu"


def measure(
    kernels: Kernels,
    shape: ExpertShape,
    memory: np.ndarray,
    counts: Sequence[int] = COUNTS,
    sweep_bytes: int = SWEEP_BYTES,
) -> CostModel:
    """Measure the compute time of experts with each of `counts` tokens; the first count must be 1.

    `memory`, uint8 [bytes], must hold at least one record. At least one record of it is overwritten, and at most
    about `sweep_bytes`.
    """
    layout, top_k = shape.layout, shape.top_k
    hidden = layout.matrices["gate"].cols
    records = _records(layout, memory, min(shape.total, max(1, sweep_bytes // layout.record_bytes)))
    x = np.sin(np.arange(max(counts) * hidden, dtype=np.float32)).reshape(-1, hidden)
    timer = _Timer(kernels, shape.activation, x)
    alone, groups = {}, {}
    for tier in layout.ladder:
        ready = [kernels.prepare(layout, tier, record[: layout.segments_of(tier)]) for record in records]
        alone[tier] = timer.seconds(ready, 1, 1)
        groups[tier] = [timer.seconds(ready, top_k if n == 1 else PROMPT_EXPERTS, n) for n in counts]
    sizes = [top_k if tokens == 1 else PROMPT_EXPERTS for tokens in counts]
    # One expert takes call + expert, top_k experts take call + top_k * expert; this is solved for call.
    call_s = max(0.0, float(np.median([(top_k * alone[t] - groups[t][0]) / max(top_k - 1, 1) for t in layout.ladder])))
    each = {t: tuple((s - call_s) / n for s, n in zip(groups[t], sizes, strict=True)) for t in layout.ladder}
    return CostModel(tuple(counts), call_s, each)


def _records(layout: RecordLayout, memory: np.ndarray, most: int) -> list[list[np.ndarray]]:
    """Overwrite `memory` with at most `most` records; return each as a list of segments."""
    size = layout.record_bytes
    count = min(most, len(memory) // size)
    memory[: count * size] = FILLER
    return [split_record(layout, memory[i * size : (i + 1) * size]) for i in range(count)]


class _Timer:
    """A timer of kernel calls, whose tokens are the first rows of x [T, H]."""

    def __init__(self, kernels: Kernels, activation: str, x: np.ndarray) -> None:
        self._kernels, self._activation, self._x = kernels, activation, x

    def seconds(self, experts: Sequence[PreparedExpert], group: int, tokens: int) -> float:
        """Return the median seconds of a call of `group` experts with `tokens` each; calls take experts in turn."""
        x = self._x[:tokens]
        y = np.empty((group * tokens, x.shape[1]), np.float32)
        rows = np.arange(group * tokens) % tokens
        weights = np.full((1, group), 1 / group, np.float32)
        times = []
        for turn in range(max(ROUNDS, -(-len(experts) // group)) if tokens == 1 else ROUNDS):
            chosen = [experts[(turn * group + i) % len(experts)] for i in range(group)]
            parts = [ExpertRows(expert, i * tokens, tokens) for i, expert in enumerate(chosen)]
            started = time.perf_counter()
            if tokens == 1:
                self._kernels.moe_token(chosen, x, weights, self._activation)
            else:
                self._kernels.moe(parts, x, rows, y, self._activation)
            times.append(time.perf_counter() - started)
        return float(np.median(times))
