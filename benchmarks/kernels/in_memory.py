"""Tokens per second of one bundle with all of its experts in memory, as JSON.

    python benchmarks/kernels/in_memory.py BUNDLE 128 512 --point 3

A pass of each length warms up. Then come the prompts, and `--new-tokens` of random ids are decoded.
`--profile` prints instead what Python spends its time on while decoding.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import time

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.console import spare_imports
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.request import ExpertRequest


def main() -> None:
    """Print the rates, or the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("prompts", type=int, nargs="+")
    parser.add_argument("--tiers", type=int)
    parser.add_argument("--point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    spare_imports()
    bundle = Bundle.open(args.bundle)
    context = min(max(args.prompts) + args.new_tokens, bundle.spec.max_context)
    options = RunOptions(tier=args.tiers, point=args.point, threads=args.threads, context=context, preload=False)
    ids = np.random.default_rng(0).integers(bundle.spec.vocab_size, size=context).tolist()
    with load_model(bundle, options) as model:
        load(model)
        for tokens in args.prompts:
            model.prefill(ids[:tokens])
            model.reset()
        if args.profile:
            with cProfile.Profile() as profile:
                decode(model, ids[: args.new_tokens])
            profile.print_stats("tottime")
            return
        rates = {}
        for tokens in args.prompts:
            started = time.perf_counter()
            model.prefill(ids[:tokens])
            rates[f"pp{tokens}"] = tokens / (time.perf_counter() - started)
            model.reset()
        decode(model, ids[:4])
        model.reset()
        rates[f"tg{args.new_tokens}"] = args.new_tokens / decode(model, ids[: args.new_tokens])
        print(json.dumps(rates | {"bits": model.statistics()["bits_mean"]}))


def load(model: Model) -> None:
    """Read all experts up to the highest tier; exit where they do not fit."""
    top = model.bundle.manifest.ladder[-1]
    for layer in model.spec.moe_layers:
        requests = [ExpertRequest(ExpertKey(layer, expert), top) for expert in range(model.spec.num_experts)]
        with model.store.acquire(requests) as lease:
            for _ in lease.batches():
                pass
        if not model.store.holds_layer(layer, top):
            raise SystemExit("the experts do not fit the memory of this machine")


def decode(model: Model, ids: list[int]) -> float:
    """Return the seconds that decoding these tokens takes."""
    started = time.perf_counter()
    for token_id in ids:
        model.decode(token_id)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
