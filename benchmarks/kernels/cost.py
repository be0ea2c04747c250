"""How well the cost model foretells what a layer's experts take: predicted over measured seconds.

    python benchmarks/kernels/cost.py BUNDLE

In each round the model is measured anew and then decoding and prompts are timed, for machines are not
equally fast all the time. Everything is in memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from in_memory import decode, load

from dymoe_runtime import kernels
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.console import spare_imports
from dymoe_runtime.cost import COUNTS, SWEEP_BYTES, CostModel, measure
from dymoe_runtime.memory import map_memory
from dymoe_runtime.model import Model
from dymoe_runtime.options import RunOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    spare_imports()
    bundle = Bundle.open(args.bundle)
    context = max(args.prompts) + args.new_tokens
    ids = np.random.default_rng(0).integers(bundle.spec.vocab_size, size=context).tolist()
    memory = np.frombuffer(map_memory(SWEEP_BYTES), np.uint8)
    print(f"{'':<12}{'work':<12}{'us/call':>9}{'predicted':>11}{'range':>13}")
    settings: list[dict[str, Any]] = [{"tier": tier} for tier in bundle.manifest.ladder] + [{}]
    for setting in settings:
        # Only a run that is traced asks for the experts of every layer here.
        with Model(
            bundle, RunOptions(threads=args.threads, context=context, trace=Path(os.devnull), **setting)
        ) as model:
            load(model)
            model.prefill(ids[: max(args.prompts)])
            model.reset()
            runs: dict[str, Callable[[], object]] = {"decode": lambda: decode(model, ids[: args.new_tokens])}
            runs |= {f"prompt {n}": lambda n=n: model.prefill(ids[:n]) for n in args.prompts}
            for name, run in runs.items():
                counts = (1,) if name == "decode" else COUNTS
                rounds = [one_round(model, memory, counts, run) for _ in range(args.rounds)]
                report(model.point, name, rounds)


def one_round(
    model: Model, memory: np.ndarray, counts: Sequence[int], run: Callable[[], object]
) -> tuple[float, float]:
    """Mean us of a call, and predicted over measured."""
    experts = len(model.bundle.manifest.layers) * model.spec.num_experts
    clock = Clock(measure(model.bundle.layout, model.spec.top_k, experts, memory, model.spec.activation, counts))
    moe, moe_token = kernels.moe, kernels.moe_token
    kernels.moe, kernels.moe_token = clock.of(moe), clock.of(moe_token)
    try:
        run()
    finally:
        kernels.moe, kernels.moe_token = moe, moe_token
        model.reset()
    return 1e6 * clock.measured / clock.calls, clock.predicted / clock.measured


class Clock:
    """Sums what calls take, and what the model says of them."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.calls, self.measured, self.predicted = 0, 0.0, 0.0

    def of(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(work: Sequence[Any], *args: Any) -> Any:
            started = time.perf_counter()
            result = call(work, *args)
            self.measured += time.perf_counter() - started
            self.calls += 1
            jobs = [(job.expert.tier, job.rows) if hasattr(job, "rows") else (job.tier, 1) for job in work]
            self.predicted += self._cost.layer(jobs)
            return result

        return timed


def report(point: str, name: str, rounds: Sequence[tuple[float, float]]) -> None:
    ratios = sorted(ratio for _, ratio in rounds)
    us = statistics.median(us for us, _ in rounds)
    print(
        f"{point:<12}{name:<12}{us:>9.0f}{statistics.median(ratios):>11.2f}{ratios[0]:>7.2f}-{ratios[-1]:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
