"""How long a token takes, with all experts in memory, while other bytes are read: neither waits for the other.

    python benchmarks/streaming/at_once.py BUNDLE --tiers 4 --read-mb 193

Computing and reading share the memory's bandwidth, and on a virtual machine the host's processors. So both together
take longer than the longer of the two. Tokens with and without reads take turns, 16 each. Prints medians in
milliseconds as JSON: *alone*, a token without reads; *beside*, one with reads; *both*, until the reads have ended too;
and *reads*, the reads alone. Each reads the start of a record, up to about the bits that run, past the page cache; as
many are in flight as in the store.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.tiers import split_record
from dymoe_runtime.console import spare_imports
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.memory import address_of, map_memory
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import IN_FLIGHT
from dymoe_runtime.store.read_queue import ReadQueue
from dymoe_runtime.store.read_threads import start_threads
from dymoe_runtime.store.request import Read

PROMPT = 256
TURN = 16
# Until all experts that will be used are there.
MAX_WARM_UP = 2000
# Reads go all over so much memory, more than caches hold.
MEMORY_BYTES = 256 << 20


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--tiers", type=int)
    chosen.add_argument("--point")
    parser.add_argument("--read-mb", type=float, required=True, help="10^6 bytes a token")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.tokens < 2 * TURN:
        parser.error(f"--tokens {args.tokens}: expected at least {2 * TURN}")
    spare_imports()
    bundle = Bundle.open(args.bundle)
    context = PROMPT + args.tokens
    options = RunOptions(context=context, tier=args.tiers, point=args.point, threads=args.threads, prefetch=False)
    with load_model(bundle, options) as model:
        if not model.store.all_fit:
            raise SystemExit("this needs memory for all experts; run it without a limit")
        print(json.dumps(measure(model, args.read_mb * 1e6, args.tokens)))


def measure(model: Model, read_bytes: float, tokens: int) -> dict[str, float]:
    """Return medians in milliseconds."""
    generator = random.Random(0)
    prompt, *others = ([generator.randrange(model.spec.vocab_size) for _ in range(n)] for n in (PROMPT, TURN, tokens))
    model.prefill(prompt)
    warm_up(model, others[0])
    beside = Beside(model, read_bytes)
    times: dict[str, list[float]] = {"alone": [], "beside": [], "both": [], "reads": []}
    try:
        for number, token in enumerate(others[1]):
            reading = number // TURN % 2 == 1
            before, started = model.store.stats.read_bytes, time.perf_counter()
            wait = beside.start() if reading else None
            model.decode(token)
            decoded_s = time.perf_counter() - started
            if wait is not None:
                wait()
            both_s = time.perf_counter() - started
            if model.store.stats.read_bytes != before:
                continue  # an expert was read that had not been used before
            times["beside" if reading else "alone"].append(decoded_s)
            if reading:
                times["both"].append(both_s)
        for _ in range(TURN):
            started = time.perf_counter()
            beside.start()()
            times["reads"].append(time.perf_counter() - started)
    finally:
        beside.close()
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def warm_up(model: Model, ids: Sequence[int]) -> None:
    """Decode until nothing was read for a while."""
    for _ in range(MAX_WARM_UP // len(ids)):
        before = model.store.stats.read_bytes
        for token in ids:
            model.decode(token)
        model.reset(PROMPT)
        if model.store.stats.read_bytes == before:
            return
    raise SystemExit("experts are still being read; give a smaller bundle, or a faster disk")


class Beside:
    """Reads of about `read_bytes` at a time from a model's bundle, into memory that nobody needs."""

    def __init__(self, model: Model, read_bytes: float) -> None:
        layout, spec = model.bundle.layout, model.spec
        tier = min(layout.ladder, key=lambda tier: abs(tier - model.statistics()["bits_mean"]))
        spans = layout.segment_spans[: layout.segments_of(tier)]
        experts = [ExpertKey(layer, expert) for layer in spec.moe_layers for expert in range(spec.num_experts)]
        random.Random(0).shuffle(experts)
        self._experts = itertools.cycle(experts)
        self._count = round(read_bytes / sum(spans))
        slots = max(IN_FLIGHT, MEMORY_BYTES // sum(spans))
        self._memory = map_memory(slots * sum(spans))
        whole = np.frombuffer(self._memory, np.uint8)
        whole[:] = 0  # pages are had before anything is timed
        records = [split_record(layout, slot) for slot in whole.reshape(slots, -1)]
        self._places = itertools.cycle([[(address_of(part), part.size) for part in record] for record in records])
        threads = start_threads(model.kernels.reads, IN_FLIGHT)
        self._queue = ReadQueue(lambda *where: model.reader(*where)._replace(then=None), self._memory, threads)

    def start(self) -> Callable[[], None]:
        """Start the reads, and return a function that waits for them."""
        reads = [Read(next(self._experts), 0, next(self._places)) for _ in range(self._count)]
        for read in reads:
            self._queue.submit(read)

        def wait() -> None:
            for read in reads:
                self._queue.wait(read)
                if read.error is not None:
                    raise read.error

        return wait

    def close(self) -> None:
        """End the reading threads."""
        self._queue.close()


if __name__ == "__main__":
    main()
