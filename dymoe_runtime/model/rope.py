"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extensions."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from dymoe_runtime.spec import Rope


class Rotary:
    """Tables of cosines and sines. The last one is cached, because the next layer uses it too."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self._rope = rope
        self._frequencies = [inverse_frequencies(rope, head_dim, long) for long in (False, True)]
        # Replaced as a whole, so that threads can share it.
        self._last: tuple[tuple[int, int, bool], tuple[np.ndarray, np.ndarray]] | None = None

    def table(self, start: int, stop: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines and sines of the positions [start, stop), float32 [stop - start, n] each.

        n is the number of leading columns of a head that turn. `context` is the longest that the sequence may become.
        """
        rope, long = self._rope, is_long(self._rope, context)
        last, wanted = self._last, (start, stop, long)
        if last is not None and last[0] == wanted:
            return last[1]
        factor = np.float32(rope.long_attention_factor if long else rope.attention_factor)
        angles = np.arange(start, stop, dtype=np.float32)[:, None] * self._frequencies[long]
        angles = np.concatenate((angles, angles), axis=-1)  # [T, n]
        table = (np.cos(angles) * factor, np.sin(angles) * factor)
        self._last = (wanted, table)
        return table


@lru_cache(maxsize=8)
def rotary(rope: Rope, head_dim: int) -> Rotary:
    """Return the `Rotary` that all layers with this rotary embedding share."""
    return Rotary(rope, head_dim)


def is_long(rope: Rope, context: int) -> bool:
    """Return whether a context of so many tokens takes the long factors of LongRoPE."""
    return rope.kind == "longrope" and context > rope.original_max_position_embeddings


def inverse_frequencies(rope: Rope, head_dim: int, long: bool = False) -> np.ndarray:
    """Return the rotation angles per position in radians, float32 [n / 2], for the n columns that turn.

    `long` chooses the factors of kind `longrope`.
    """
    dims = rope.dims or head_dim
    width = head_dim if rope.kind == "proportional" else dims
    plain = 1.0 / (np.float32(rope.theta) ** (np.arange(0, width, 2, dtype=np.float32) / width))
    if rope.kind == "proportional":
        plain[dims // 2 :] = 0
        return plain / rope.factor
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, dims)
    if rope.kind == "longrope":
        return plain / np.array(rope.long_factors if long else rope.short_factors, np.float32)
    return plain


def _llama3(plain: np.ndarray, rope: Rope) -> np.ndarray:
    """Divide the frequencies of long wavelengths by `factor`, keep those of short ones, blend the rest (Llama 3.1)."""
    context = rope.original_max_position_embeddings
    rotations = context * plain / (2 * math.pi)
    width = max(rope.high_freq_factor - rope.low_freq_factor, 1e-20)  # 0: a step
    blend = (rotations - rope.low_freq_factor) / width
    blend = blend.clip(0, 1)
    blended: np.ndarray = (1 - blend) * plain / rope.factor + blend * plain
    return blended


def _yarn(plain: np.ndarray, rope: Rope, head_dim: int) -> np.ndarray:
    """Interpolate below `beta_slow` rotations and not above `beta_fast` (YaRN, arXiv 2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        positions = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(positions) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    ramp = ramp.clip(0, 1)
    blended: np.ndarray = plain / rope.factor * ramp + plain * (1 - ramp)
    return blended


def longrope_attention_factor(factor: float, original: int) -> float:
    """Return the factor that LongRoPE applies to cosines and sines if the configuration gives none.

    The context was extended by `factor` from `original` tokens.
    """
    return 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """Return the factor that YaRN applies to cosines and sines if the configuration gives none."""

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
