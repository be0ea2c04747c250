"""What the tests of the kernels share: kernels by name, random records and inputs, and bounds of what int8 may move."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import numpy as np

from dymoe_runtime.bundle import tiers
from dymoe_runtime.bundle.tiers import BLOCK, MX_BLOCK, MXFP4, QuantizedMatrix, RecordLayout
from dymoe_runtime.kernels import REFERENCE, available_kernels, load_kernels
from dymoe_runtime.kernels.interface import Kernels

ALL = available_kernels()
COMPILED = [name for name in ALL if name != REFERENCE]

Record = tuple[RecordLayout, list[np.ndarray]]

HIDDEN, WIDTH = 200, 77  # of the expert below


@cache
def kernels_of(name: str) -> Kernels:
    """The kernels called `name`, the same each time."""
    return load_kernels(name)


reference = kernels_of(REFERENCE)


@cache
def random_record(
    shapes: tuple[tuple[str, int, int], ...], ladder: tuple[int, ...], size: float = 1.0, grid: str = ""
) -> Record:
    """A record of random matrices (name, rows, cols), weights about 0.002 * size: layout and segments. Read only."""
    rng = np.random.default_rng(len(shapes) + sum(ladder))
    layout = tiers.make_layout({name: (rows, cols) for name, rows, cols in shapes}, ladder, grid=grid)
    matrices = {name: random_matrix(rng, rows, cols, ladder, size, grid) for name, rows, cols in shapes}
    return layout, tiers.split_record(layout, tiers.pack_record(layout, matrices))


def random_matrix(
    rng: np.random.Generator, rows: int, cols: int, ladder: tuple[int, ...], size: float, grid: str = ""
) -> QuantizedMatrix:
    """With scales of any size: on the grid of MXFP4 up to 2^15 apart."""
    scales = -(-cols // (MX_BLOCK if grid == MXFP4 else BLOCK))
    codes = rng.integers(0, 2 ** ladder[-1], (rows, cols), dtype=np.uint8)
    indices = {tier: rng.integers(0, 16, (rows, scales), dtype=np.uint8) for tier in ladder}
    if grid == MXFP4:
        indices = dict.fromkeys(ladder, indices[ladder[0]])
    multiplier = narrow((size * rng.uniform(1e-5, 1e-4, rows)).astype(np.float32))
    return QuantizedMatrix(codes, indices, tiers.widen_bf16(multiplier))


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 as bf16, uint16: cut off, not rounded."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def weight(rows: int, cols: int, ladder: tuple[int, ...], grid: str = "") -> Record:
    return random_record((("weight", rows, cols),), ladder, grid=grid)


def expert(ladder: tuple[int, ...], grid: str = "") -> Record:
    return random_record((("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)), ladder, grid=grid)


def expert_at(tier: int, grid: str = "") -> tuple[RecordLayout, int, list[np.ndarray]]:
    """The expert of the ladder 2, 3, 4 at one tier: layout, tier and the segments that it needs."""
    layout, segments = expert((2, 3, 4), grid)
    return layout, tier, segments[: layout.segments_of(tier)]


def random_input(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def grid_input(tokens: int, cols: int) -> np.ndarray:
    """Activations that int8 holds exactly: integers up to 127 in each block, times a power of two."""
    x = np.random.default_rng(2).integers(-127, 128, (tokens, cols)).astype(np.float32)
    x[:, ::BLOCK] = 127.0
    return np.ldexp(x, np.arange(cols) // BLOCK % 5 - 2)


def rounding(x: np.ndarray) -> np.ndarray:
    """The most that int8 moves each activation: half of max|x| / 127 over its block."""
    blocks = tiers.blocks_of(x.shape[1])
    padded = np.pad(x, ((0, 0), (0, blocks * BLOCK - x.shape[1])))
    codes_apart = np.abs(padded.reshape(len(x), blocks, BLOCK)).max(-1) / 127  # [T, blocks]
    return codes_apart.repeat(BLOCK, axis=1)[:, : x.shape[1]] / 2


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> None:
    """`bound`, and float rounding besides."""
    slack = bound + 1e-5 * np.abs(expected).max() if expected.size else bound
    assert actual.shape == expected.shape
    assert (np.abs(actual - expected) <= slack).all()


def with_threads(kernels: Kernels, call: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """What a call gives with one, two and three threads."""
    before = kernels.threads()
    try:
        results = []
        for count in (1, 2, 3):
            kernels.set_threads(count)
            results.append(call())
    finally:
        kernels.set_threads(before)
    return results


def run_python(code: str, **env: str) -> str:
    """What a Python process prints, errors too."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr
