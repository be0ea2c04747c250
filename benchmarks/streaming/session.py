r"""How long it takes to save a conversation, and to go on with it in another process.

    python benchmarks/models/make.py olmoe /tmp/olmoe --experts 16
    dymoe-compile /tmp/olmoe -o /tmp/olmoe.dymoe --tiers 4 --calibration-tokens 1024
    python benchmarks/streaming/session.py /tmp/olmoe.dymoe --tokens 4096

One process computes a context and saves it; after that, each of several processes loads it, and runs a short question.
Prints medians as JSON, in seconds: *prompt*, computing the context; *save*; *read*, reading the file into memory that
is already there; *load*; *first*, from the start of loading to the logits of the first token; *beyond*, what is left of
*first* without *read*; *same*, the question in the process that saved. `--cold` empties the page cache of the file
before each read. Exits with 1 if the logits differ by a bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions

# Experts that the question needs are read before it is timed.
WARM_UP = 2


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--question", type=int, default=1, help="tokens")
    parser.add_argument("--kv-bits", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="read the session from the disk")
    parser.add_argument("--folder", type=Path, help="for the session, on the disk to measure")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(measure_load(args, args.load)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "session"
        saved = measure_save(args, file)
        again = [sys.executable, __file__, *sys.argv[1:], "--load", str(file)]
        runs = [
            json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
            for _ in range(args.rounds)
        ]
        bits = {json.dumps(result.pop("logits")) for result in [saved, *runs]}
        loaded = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        size = file.stat().st_size
    figures = {**saved, **loaded, "beyond": loaded["first"] - loaded["read"]}
    print(json.dumps({"bytes": size, **{name: round(value, 4) for name, value in figures.items()}}))
    sys.exit(len(bits) != 1)


def measure_save(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Compute a context, save it, and run the question."""
    with start(args) as model:
        context, question = ids_of(model, args)
        prompt_s = seconds(lambda: model.prefill(context))
        save_s = seconds(lambda: model.save_state(file, "note"))
        started = time.perf_counter()
        logits = model.prefill(question)
        same_s = time.perf_counter() - started
        return {"prompt": prompt_s, "save": save_s, "same": same_s, "logits": logits.tobytes().hex()}


def measure_load(args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Load the state and run the question."""
    with start(args) as model:
        _, question = ids_of(model, args)
        for _ in range(WARM_UP):
            model.prefill(question)
        model.reset()
        memory = np.zeros(file.stat().st_size, np.uint8)
        memory[:] = 1
        if args.cold:
            forget(file)
        read_s = seconds(lambda: read(file, memory))
        if args.cold:
            forget(file)
        load_s = seconds(lambda: model.load_state(file))
        started = time.perf_counter()
        logits = model.prefill(question)
        first_s = load_s + time.perf_counter() - started
        return {"read": read_s, "load": load_s, "first": first_s, "logits": logits.tobytes().hex()}


def start(args: argparse.Namespace) -> Model:
    """Load the model with room for the context and the question."""
    context = args.tokens + WARM_UP * args.question
    return load_model(args.bundle, RunOptions(context=context, kv_bits=args.kv_bits, threads=args.threads))


def ids_of(model: Model, args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Return the ids of the context and of the question."""
    generator = random.Random(0)
    vocabulary = model.spec.vocab_size
    context, question = ([generator.randrange(vocabulary) for _ in range(n)] for n in (args.tokens, args.question))
    return context, question


def read(file: Path, memory: np.ndarray) -> None:
    """Read the whole file into memory."""
    with open(file, "rb", buffering=0) as opened:
        left = memoryview(memory)
        while count := opened.readinto(left):
            left = left[count:]


def forget(file: Path) -> None:
    """Drop the file from the page cache."""
    number = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
