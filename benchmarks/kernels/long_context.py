"""What attention takes of a decoded token at long contexts, with everything in memory.

    python benchmarks/kernels/long_context.py BUNDLE --positions 64 1024 4096 8192

Keys and values before a position are random. Medians of `--tokens`; positions may lie beyond what the
model was made for, as time does not depend on it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
from in_memory import load

from dymoe_runtime.bundle import Bundle
from dymoe_runtime.console import spare_imports
from dymoe_runtime.model import Model
from dymoe_runtime.options import RunOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 1024, 4096, 8192])
    parser.add_argument("--kv-bits", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--tiers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args()
    spare_imports()
    bundle = Bundle.open(args.bundle)
    context = max(args.positions) + 1
    bundle.spec = replace(bundle.spec, max_context=context)
    print(f"{'kv bits':>7}{'position':>10}{'ms/token':>10}{'more than at the first':>24}")
    for bits in args.kv_bits:
        options = RunOptions(tier=args.tiers, threads=args.threads, context=context, kv_bits=bits)
        with Model(bundle, options) as model:
            load(model)
            fill(model)
            first = None
            for position in args.positions:
                seconds = at(model, position, args.tokens)
                first = first or seconds
                print(f"{bits:>7}{position:>10}{1e3 * seconds:>10.1f}{1 - first / seconds:>24.0%}")


def fill(model: Model) -> None:
    """Random rows for the whole context."""
    cache, spec, random = model._cache, model.spec, np.random.default_rng(0)
    for layer in range(spec.num_layers):
        k, v = random.standard_normal((2, spec.num_kv_heads, cache.capacity, spec.head_dim), np.float32)
        cache.write(layer, 0, k, v)


def at(model: Model, position: int, tokens: int) -> float:
    """Median seconds of a token at `position`."""
    times = []
    for token in range(tokens):
        model._cache.length = position
        started = time.perf_counter()
        model.decode(token)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
