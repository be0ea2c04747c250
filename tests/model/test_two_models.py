"""Models in several threads: each gives what it gives alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from kernel_kit import ALL, kernels_of

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.kernels import REFERENCE
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.store.arena import min_arena_bytes

TOKENS = 40


def answer(
    bundle: Bundle, options: RunOptions, ids: Sequence[int], kernels: Kernels | None, ready: threading.Barrier
) -> list[np.ndarray]:
    """The logits of two prompts, each with greedy tokens after it."""
    logits: list[np.ndarray] = []
    with load_model(bundle, options, kernels) as model:
        ready.wait(60)
        for prompt in (ids[:70], ids[70:]):
            logits.append(model.prefill(prompt))
            for _ in range(TOKENS):
                logits.append(model.decode(int(logits[-1].argmax())).copy())
    return logits


@pytest.mark.parametrize("shared", [False, True], ids=["kernels of their own", "the same kernels"])
@pytest.mark.parametrize("name", list(dict.fromkeys([ALL[0], REFERENCE])))
def test_models_in_threads_give_what_each_gives_alone(name: str, shared: bool, tiny_path: Path) -> None:
    """With room for all experts and for the fewest, at another tier and with other bits in the cache."""
    bundle, rng = Bundle.open(tiny_path), np.random.default_rng(8)
    least = min_arena_bytes(bundle.layout)
    runs = [
        (RunOptions(context=256, tier=4), rng.integers(256, size=90).tolist()),
        (RunOptions(context=256, point="2.5", arena_bytes=least, kv_bits=8), rng.integers(256, size=90).tolist()),
    ]
    kernels = kernels_of(name) if shared or name == REFERENCE else None
    alone = [answer(bundle, options, ids, kernels, threading.Barrier(1)) for options, ids in runs]
    ready = threading.Barrier(len(runs))
    with ThreadPoolExecutor(len(runs)) as pool:
        for _ in range(3):
            tasks = [pool.submit(answer, bundle, options, ids, kernels, ready) for options, ids in runs]
            for task, expected in zip(tasks, alone, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(task.result(120), expected, strict=True))
