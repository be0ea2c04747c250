"""Measure what a constraint costs: time and memory to read a vocabulary and compile, and time per token.

    python benchmarks/constraints/cost.py [BUNDLE]

Without a bundle, vocabularies of random words as large as those of known models; with one, its tokens in turns with and
without a constraint, and the medians of both.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import time

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dymoe_runtime import Tokenizer, load_model
from dymoe_runtime.text.constraints import Grammars
from dymoe_runtime.text.generate import generate
from dymoe_runtime.text.sampling import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 30},
    },
    "required": ["name", "age", "tags"],
}
SIZES = (4_096, 151_936, 262_144)
STEPS, ROUNDS = 300, 9


def main() -> None:
    """Print the figures as JSON lines."""
    if sys.argv[1:]:
        print(json.dumps(beside_decoding(sys.argv[1])))
        return
    for size in SIZES:
        print(json.dumps(of_vocabulary(size)))


def peak_mib() -> float:
    """Return the peak of the process's memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def random_tokenizer(size: int) -> Tokenizer:
    """Return a byte-level tokenizer of random words, and an end token."""
    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys(alphabet)
    while len(words) < size - 1:
        letters = rng.choices('etaoinshrdlucmfwypvbgkjqxz"{}:,0123456789', k=rng.randrange(2, 9))
        words[("Ġ" if rng.random() < 0.5 else "") + "".join(letters)] = None
    vocabulary = {word: i for i, word in enumerate([*words, "</s>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"}, {})


def of_vocabulary(size: int) -> dict[str, float]:
    """Return the costs for a vocabulary of `size` tokens."""
    tokenizer = random_tokenizer(size)
    before, started = peak_mib(), time.perf_counter()
    grammars = Grammars(tokenizer)
    read_s, read_mib = time.perf_counter() - started, peak_mib() - before
    started = time.perf_counter()
    constraint = grammars.json_schema(SCHEMA).constraint()
    compile_s = time.perf_counter() - started
    generator = np.random.default_rng(0)
    rows = [generator.standard_normal(size, np.float32) for _ in range(8)]
    steps = []
    for step in range(STEPS):
        logits = rows[step % len(rows)]
        started = time.perf_counter()
        scores = constraint.allow(logits)
        token_id = int(scores.argmax())
        constraint.accept(token_id)
        steps.append(time.perf_counter() - started)
        if constraint.ended:
            constraint.restart()
    quantiles = np.quantile(steps, [0.5, 0.99]) * 1000
    return {
        "tokens": size,
        "read_s": round(read_s, 2),
        "read_mib": round(read_mib, 1),
        "compile_ms": round(compile_s * 1000, 1),
        "step_ms_median": round(float(quantiles[0]), 3),
        "step_ms_p99": round(float(quantiles[1]), 3),
    }


def beside_decoding(path: str) -> dict[str, float]:
    """Return the seconds per token of a bundle with and without a constraint, in turns."""
    with load_model(path) as model:
        tokenizer = Tokenizer.of(model)
        grammar = Grammars(tokenizer).json_schema(SCHEMA)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for constrained in times:
                model.reset(0)
                constraint = grammar.constraint() if constrained else None
                tokens = generate(
                    model, tokenizer, "Once", SamplingParams(), 64, ignore_eos=not constrained, constraint=constraint
                )
                next(tokens)
                started = time.perf_counter()
                count = sum(1 for _ in tokens)
                times[constrained].append((time.perf_counter() - started) / count)
    without, with_ = (statistics.median(times[key]) for key in (False, True))
    return {
        "without_ms": round(without * 1000, 3),
        "with_ms": round(with_ * 1000, 3),
        "ratio": round(with_ / without, 3),
    }


if __name__ == "__main__":
    main()
