"""What attention takes of a decoded token at long contexts, with everything in memory.

    python benchmarks/kernels/long_context.py BUNDLE --positions 64 1024 4096 8192

A prompt of random tokens fills the context; then `--tokens` are decoded at each position, of which the median counts.
Positions may exceed the context that the model was made for, since time does not depend on it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
from in_memory import load

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.console import spare_imports
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions


def main() -> None:
    """Print a row for each precision of the KV cache and each position."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 1024, 4096, 8192])
    parser.add_argument("--kv-bits", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--tiers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args()
    spare_imports()
    context = max(args.positions) + 1
    bundle = with_context(Bundle.open(args.bundle), context)
    ids = np.random.default_rng(0).integers(bundle.spec.vocab_size, size=context - 1).tolist()
    print(f"{'kv bits':>7}{'position':>10}{'ms/token':>10}{'more than at the first':>24}")
    for bits in args.kv_bits:
        options = RunOptions(tier=args.tiers, threads=args.threads, context=context, kv_bits=bits, preload=False)
        with load_model(bundle, options) as model:
            model.prefill(ids)
            load(model)
            # A sequence can be cut, but not grow back, so the last position comes first.
            seconds = {n: seconds_at(model, n, args.tokens) for n in sorted(args.positions, reverse=True)}
        first = seconds[args.positions[0]]
        for position in args.positions:
            more = 1 - first / seconds[position]
            print(f"{bits:>7}{position:>10}{1e3 * seconds[position]:>10.1f}{more:>24.0%}", flush=True)


def with_context(bundle: Bundle, context: int) -> Bundle:
    """Return a bundle whose model says that it was made for `context` tokens."""
    spec = replace(bundle.spec, max_context=context)
    return Bundle(bundle.path, replace(bundle.manifest, spec=spec), bundle.policy)


def seconds_at(model: Model, position: int, tokens: int) -> float:
    """Return the median seconds of a token at `position`."""
    times = []
    for token in range(tokens):
        if model.reset(position) != position:
            raise SystemExit("this model cannot go back to an earlier position")
        started = time.perf_counter()
        model.decode(token)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
