"""Timing of random tokens through prefill and decode."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.kernels.interface import Kernels

# Tokens of a run that measures speed, and how many runs there are, whose median counts.
PROMPT_TOKENS, NEW_TOKENS, RUNS = 32, 64, 3


def random_ids(vocabulary: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Return two texts of `count` random token ids each: one to time, and one to warm up with."""
    random = np.random.default_rng(seed)
    ids, others = (random.integers(vocabulary, size=count).tolist() for _ in range(2))
    return ids, others


def time_tokens(model: Model, ids: list[int], prompt_tokens: int) -> dict[str, Any]:
    """Run `ids`, the first `prompt_tokens` of them as a prompt and each other one by itself.

    Returns the statistics of the run, in which `ttft_s` is the time of the prompt, with `tpot_s`, the seconds per
    decoded token, and `decode_read_bytes_per_token`.
    """
    started = time.perf_counter()
    model.prefill(ids[:prompt_tokens])
    first, read = time.perf_counter() - started, model.store.stats.read_bytes
    for token_id in ids[prompt_tokens:]:
        model.decode(token_id)
    new_tokens = len(ids) - prompt_tokens
    return model.statistics() | {
        "ttft_s": first,
        "tpot_s": model.stats.decode.seconds / new_tokens,
        "decode_read_bytes_per_token": (model.store.stats.read_bytes - read) / new_tokens,
    }


def decoding_speed(bundle: Bundle, kernels: Kernels, point: str, memory_bytes: int | None) -> float:
    """Return the tokens/s of decoding at `point` on this machine: the median of RUNS runs after one to warm up.

    Raises DymoeError as `load_model` does.
    """
    count = min(PROMPT_TOKENS + NEW_TOKENS, bundle.spec.max_context)
    prompt = min(PROMPT_TOKENS, count - 1)
    ids, others = random_ids(bundle.spec.vocab_size, count, seed=0)
    options = RunOptions(point=point, memory_bytes=memory_bytes, context=count, dynamic=False)
    times: list[float] = []
    with load_model(bundle, options, kernels) as model:
        for text in (others, *[ids] * RUNS):
            model.reset()
            model.reset_stats()
            times.append(time_tokens(model, text, prompt)["tpot_s"])
    return 1 / median(times[1:])
