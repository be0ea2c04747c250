"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extensions."""

from __future__ import annotations

import math

import numpy as np

from dymoe_runtime import kernels
from dymoe_runtime.spec import Rope

KINDS = ("default", "linear", "llama3", "yarn")


class Rotary:
    """Rotates queries and keys; cosines and sines of the positions seen last are kept."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._factor = rope.attention_factor
        self._span = (0, 0)
        self._table = (np.empty(0), np.empty(0))

    def __call__(self, x: np.ndarray, start: int) -> np.ndarray:
        """Rotate x [T, heads, head_dim] in place; its first token stands at position `start`."""
        return kernels.rotate(x, *self.table(start, start + len(x)))

    def table(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines [stop - start, head_dim] of positions start..stop."""
        if self._span != (start, stop):
            angles = np.arange(start, stop, dtype=np.float32)[:, None] * self._frequencies
            angles = np.concatenate((angles, angles), axis=-1)  # [T, head_dim]
            self._table = (np.cos(angles) * np.float32(self._factor), np.sin(angles) * np.float32(self._factor))
            self._span = (start, stop)
        return self._table


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angles per position, float32 [head_dim / 2]."""
    plain = 1.0 / (np.float32(rope.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim))
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, head_dim)
    return plain


def _llama3(plain: np.ndarray, rope: Rope) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, the rest blended."""
    context = rope.original_max_position_embeddings
    rotations = context * plain / (2 * math.pi)
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clip(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(plain: np.ndarray, rope: Rope, head_dim: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071), section 3.2: interpolate below `beta_slow` rotations, not above `beta_fast`."""

    def dimension(rotations: float) -> float:
        positions = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(positions) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    ramp = ramp.clip(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """The factor on cosines and sines that YaRN uses where the configuration gives none."""

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
