r"""How fast a packed bundle runs in place, beside the directory that it was made from.

    python benchmarks/streaming/packed.py build/demo.dymoe
    python benchmarks/streaming/packed.py build/demo.dymoe --share 0.4

One process packs BUNDLE beside it, on the same disk, and loads both. They take turns, so that other work meets both
alike: in each round each runs the same random tokens as a new sequence, `--prompt` of them as a prompt and
`--tokens` one by one. `--share` of the experts' bytes is their arena; with less than 1, experts come from the disk in
every round. Prints medians, and the ratio of packed to directory in the median round with the range of its quarters.
Exits with 1 if any logits differ by a bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dymoe_runtime import Bundle, RunOptions, load_kernels, load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.tools.bench import random_ids
from dymoe_runtime.tools.shipping.pack import pack

# The seconds of a prompt and of each token after it, and the logits after each.
Round = tuple[float, float, list[np.ndarray]]


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tier", type=int, help="tier of all experts instead of the bundle's default point")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    with tempfile.TemporaryDirectory(dir=args.bundle.absolute().parent) as folder:
        packed = Path(folder) / "packed.dymoe"
        pack(bundle, packed, lambda _: None)
        return compare(bundle, Bundle.open(packed), args)


def compare(directory: Bundle, packed: Bundle, args: argparse.Namespace) -> int:
    """Run both in turns; return the exit code."""
    count = args.prompt + args.tokens
    options = RunOptions(
        arena_bytes=max(1, int(args.share * directory.expert_bytes())),
        context=count,
        threads=args.threads,
        tier=args.tier,
    )
    kernels, rounds = load_kernels(threads=args.threads), []
    with load_model(directory, options, kernels) as one, load_model(packed, options, kernels) as other:
        for number in range(args.rounds + 1):  # the first one warms up
            ids, _ = random_ids(directory.spec.vocab_size, count, number)
            # Who is first in one round is last in the next.
            order = (one, other) if number % 2 else (other, one)
            times = {id(model): run(model, ids, args.prompt) for model in order}
            rounds.append((times[id(one)], times[id(other)]))
        read = [model.store.stats.read_bytes / count / len(rounds) for model in (one, other)]
    print(f"{args.rounds} rounds; {read[0] / 2**20:.2f} and {read[1] / 2**20:.2f} MiB read per token")
    print(f"{'':<24}{'directory':>12}{'packed':>12}{'packed / directory':>22}")
    print_row("prompt, tokens/s", [(args.prompt / a[0], args.prompt / b[0]) for a, b in rounds[1:]])
    print_row("decoding, tokens/s", [(1 / a[1], 1 / b[1]) for a, b in rounds[1:]])
    same = all(np.array_equal(x, y) for a, b in rounds for x, y in zip(a[2], b[2], strict=True))
    print(f"the logits are {'the same' if same else 'NOT the same'}")
    return 0 if same else 1


def run(model: Model, ids: list[int], prompt: int) -> Round:
    """Run `ids` as a new sequence."""
    model.reset()
    started = time.perf_counter()
    logits = [model.prefill(ids[:prompt])]
    between, times = time.perf_counter(), []
    for token in ids[prompt:]:
        before = time.perf_counter()
        logits.append(model.decode(token))
        times.append(time.perf_counter() - before)
    return between - started, statistics.fmean(times), logits


def print_row(what: str, pairs: Sequence[tuple[float, float]]) -> None:
    """Print the medians of both and of their ratios."""
    first, second = (statistics.median(each) for each in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    print(f"{what:<24}{first:>12.1f}{second:>12.1f}{middle:>10.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    sys.exit(main())
