"""What the tests of quantization share: random matrices and inputs, and how far a tier of a record is off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.moments import Moments
from dymoe_compile.quantize.quantize import quantize_matrix
from dymoe_runtime.bundle.tiers import (
    BLOCK,
    SCALE_SIZES,
    QuantizedMatrix,
    dequantize,
    levels_of,
    make_layout,
    pack_record,
    split_record,
    tier_scales,
    unit_of,
)
from dymoe_runtime.kernels import load_kernels

DESCENT = load_descent(load_kernels())


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Matrices are small here; threads that wait for each other take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quantized(weight: torch.Tensor, ladder: tuple[int, ...], moments: Moments | None = None) -> QuantizedMatrix:
    return quantize_matrix(weight, ladder, DESCENT, moments)


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def at_tier(matrix: QuantizedMatrix, ladder: tuple[int, ...], tier: int) -> torch.Tensor:
    """The values of a tier, from a record as it is stored."""
    layout = make_layout({"m": matrix.codes.shape}, ladder)
    segments = split_record(layout, pack_record(layout, {"m": matrix}))
    return torch.from_numpy(dequantize(segments, layout.matrices["m"], tier))


def error(weight: torch.Tensor, ladder: tuple[int, ...], tier: int, moments: Moments | None = None) -> torch.Tensor:
    """Squared error of each weight at `tier`."""
    return (at_tier(quantized(weight, ladder, moments), ladder, tier) - weight).square()


def weighted_error(
    matrix: QuantizedMatrix, weight: torch.Tensor, ladder: tuple[int, ...], hessian: torch.Tensor
) -> list[float]:
    """trace(E H E^T) of each tier."""
    errors = [at_tier(matrix, ladder, tier).double() - weight for tier in ladder]
    return [((e @ hessian.double()) * e).sum().item() for e in errors]


def correlated(samples: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Inputs [samples, cols] of one distribution whatever the seed: columns correlated, some of them large."""
    mixing = gaussian(cols, cols, seed=1000 + cols) / cols**0.5
    mixing = torch.eye(cols) + 1.5 * mixing + 2 * gaussian(1, cols, seed=2000 + cols).T @ gaussian(1, cols, 3000) / cols
    sizes = torch.linspace(-1, 1, cols)[torch.randperm(cols, generator=torch.Generator().manual_seed(cols))].exp()
    return gaussian(samples, cols, seed) @ mixing * sizes


def moments_of(x: torch.Tensor) -> Moments:
    return Moments(x.T @ x, len(x))


def positive_definite(cols: int, seed: int) -> Moments:
    x = gaussian(4 * cols, cols, seed) @ (torch.eye(cols) + gaussian(cols, cols, seed + 1) / cols**0.5)
    return moments_of(x)


def grid(bits: int, rows: int, blocks: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Weights on a grid of the format, and the codes of it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, blocks * BLOCK), np.uint8)
    codes[:, ::BLOCK] = 0  # every block has the largest magnitude of its scale
    indices = rng.integers(1, 16, (rows, blocks), np.uint8)
    multiplier = torch.from_numpy(rng.uniform(0.01, 3.0, rows)).to(torch.bfloat16).float().numpy()
    scales = tier_scales(indices, multiplier, bits, bits).repeat(BLOCK, axis=1)
    return torch.from_numpy(scales * levels_of(bits, bits)[codes]), codes


def nearest_steps(weight: torch.Tensor, codes: np.ndarray, matrix: QuantizedMatrix, bits: int) -> np.ndarray:
    """Weights on a grid with these codes, their scales rounded to those that `matrix` can store."""
    sizes = matrix.multiplier[:, None] * np.float32(unit_of(bits, bits)) * SCALE_SIZES[1:]
    levels = levels_of(bits, bits)[codes]
    true = (weight.numpy() / levels)[:, ::BLOCK]
    nearest = np.take_along_axis(sizes, np.abs(sizes[:, None] - true[..., None]).argmin(-1), axis=1)
    return np.asarray(nearest.repeat(BLOCK, axis=1) * levels)


def assert_same(a: QuantizedMatrix, b: QuantizedMatrix) -> None:
    assert np.array_equal(a.codes, b.codes)
    assert list(a.scale_indices) == list(b.scale_indices)
    assert all(np.array_equal(a.scale_indices[tier], b.scale_indices[tier]) for tier in a.scale_indices)
    assert np.array_equal(a.multiplier, b.multiplier)
