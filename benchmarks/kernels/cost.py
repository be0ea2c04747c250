"""How well the cost model predicts what a layer's experts take: predicted over measured seconds.

    python benchmarks/kernels/cost.py BUNDLE

Each round measures the cost model anew and then times decoding and prompts, because the speed of a machine varies.
Everything is in memory.
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

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.console import spare_imports
from dymoe_runtime.engine.cost import COUNTS, SWEEP_BYTES, CostModel, measure_for
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.kernels.prepared import ExpertRows, PreparedExpert
from dymoe_runtime.memory import map_memory


def main() -> None:
    """Print a row for each tier, and for the default point, and each length of a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    spare_imports()
    bundle, kernels = Bundle.open(args.bundle), load_kernels(threads=args.threads)
    context = min(max(args.prompts) + args.new_tokens, bundle.spec.max_context)
    ids = np.random.default_rng(0).integers(bundle.spec.vocab_size, size=context).tolist()
    memory = np.frombuffer(map_memory(SWEEP_BYTES), np.uint8)
    print(f"{'':<12}{'work':<12}{'us/call':>9}{'predicted':>11}{'range':>13}")
    settings: list[dict[str, Any]] = [{"tier": tier} for tier in bundle.manifest.ladder] + [{}]
    for setting in settings:
        # Only a run that is traced asks for the experts of every layer here.
        options = RunOptions(context=context, preload=False, trace=Path(os.devnull), **setting)
        timed = TimedKernels(kernels)
        with load_model(bundle, options, timed) as model:
            load(model)
            model.prefill(ids[: max(args.prompts)])
            model.reset()
            runs: dict[str, Callable[[], object]] = {"decode": lambda: decode(model, ids[: args.new_tokens])}
            runs |= {f"prompt {n}": lambda n=n: model.prefill(ids[:n]) for n in args.prompts}
            for name, run in runs.items():
                rounds = []
                for _ in range(args.rounds):
                    timed.start(measure_for(bundle, kernels, memory, (1,) if name == "decode" else COUNTS))
                    run()
                    model.reset()
                    rounds.append((timed.us_per_call, timed.predicted_over_measured))
                report(model.point, name, rounds)


class TimedKernels:
    """`Kernels` that sum what the calls of experts take, and what a cost model predicts for them."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._cost: CostModel | None = None
        self._calls, self._measured, self._predicted = 0, 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def start(self, cost: CostModel) -> None:
        """Sum from 0 again, with predictions of this cost model."""
        self._cost = cost
        self._calls, self._measured, self._predicted = 0, 0.0, 0.0

    @property
    def us_per_call(self) -> float:
        """Return the mean microseconds of a call."""
        return 1e6 * self._measured / self._calls

    @property
    def predicted_over_measured(self) -> float:
        """Return the sum of the predictions over that of the times."""
        return self._predicted / self._measured

    def moe(self, parts: Sequence[ExpertRows], *rest: Any) -> None:
        self._timed(lambda: self._kernels.moe(parts, *rest), [(part.expert.tier, part.rows) for part in parts])

    def moe_token(self, experts: Sequence[PreparedExpert], *rest: Any) -> np.ndarray:
        return self._timed(lambda: self._kernels.moe_token(experts, *rest), [(expert.tier, 1) for expert in experts])

    def _timed(self, call: Callable[[], Any], runs: Sequence[tuple[int, int]]) -> Any:
        """Time a call with these (tier, tokens), one for each expert."""
        started = time.perf_counter()
        result = call()
        self._measured += time.perf_counter() - started
        self._calls += 1
        if self._cost is not None:
            self._predicted += self._cost.layer(runs)
        return result


def report(point: str, name: str, rounds: Sequence[tuple[float, float]]) -> None:
    """Print a row of the table from (us of a call, predicted over measured) of each round."""
    ratios = sorted(ratio for _, ratio in rounds)
    us = statistics.median(us for us, _ in rounds)
    print(
        f"{point:<12}{name:<12}{us:>9.0f}{statistics.median(ratios):>11.2f}{ratios[0]:>7.2f}-{ratios[-1]:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
