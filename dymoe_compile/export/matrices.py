"""Matrices as operators of whole numbers take them: codes with a scale for each block of columns.

A value is (code - 2^(bits - 1)) * scale. Most levels of tiers are odd halves, such as 0.5, and twice a level is a whole
number. So a tier of up to 7 bits fits codes of 8 bits: twice its levels with half its scales. Halving and doubling are
exact in floating point, so the products are equal to `tiers.dequantize` bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dymoe_runtime.bundle.tiers import TRELLIS, MatrixLayout, levels_at, levels_of, tier_scales_of, unpack_codes
from dymoe_runtime.errors import DymoeError

# The largest magnitude of a whole number in codes of 8 bits whose zero is 128.
MOST = 127


@dataclass(frozen=True)
class Format:
    """The form in which a matrix is stored: codes of 4 or 8 bits, bfloat16 (16), or float32 (32)."""

    bits: int
    block: int = 0  # columns that share a scale; 0: no scales

    @property
    def is_whole(self) -> bool:
        """Return whether the matrix is stored as whole numbers."""
        return self.block > 0

    @property
    def zero(self) -> int:
        """Return the code of 0."""
        return 1 << (self.bits - 1)

    def blocks(self, cols: int) -> int:
        """Return the number of scales of a row."""
        return -(-cols // self.block)

    def padded(self, cols: int) -> int:
        """Return the number of columns in whole blocks."""
        return self.blocks(cols) * self.block if self.is_whole else cols


@dataclass(frozen=True)
class WholeNumbers:
    """Rows of a matrix: codes uint8 [rows, cols], and scales float32 [rows, blocks]."""

    codes: np.ndarray
    scales: np.ndarray


# Rows of a matrix in their format: float32 [rows, cols], bfloat16 as its bits uint16 [rows, cols], or whole numbers.
Rows = np.ndarray | WholeNumbers


def of_tier(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int) -> WholeNumbers:
    """Return a matrix at `tier` from the segments of a record, in codes of 8 bits, with all its values as they are.

    Raises DymoeError if the levels of the tier do not fit 8 bits.
    """
    codes, scales = unpack_codes(segments, where, tier), tier_scales_of(segments, where, tier)
    if where.grid == TRELLIS:
        return WholeNumbers((levels_at(codes, tier, where.ladder[-1], TRELLIS) + 128).astype(np.uint8), scales)
    table, factor = carrier(tier, where.ladder[-1], where.grid)
    return WholeNumbers(table[codes], scales / np.float32(factor))


def carrier(tier: int, top: int, grid: str = "") -> tuple[np.ndarray, int]:
    """Return the code of 8 bits of each code of a tier, uint8 [2^tier], and the divisor of its scales, 1 or 2.

    Not for the trellis grid, whose codes have no levels of their own.

    Raises DymoeError if its levels do not fit.

    >>> carrier(2, 4)
    (array([ 73, 111, 145, 183], dtype=uint8), 2)
    """
    levels, factor = _whole(tier, top, grid)
    numbers = np.rint(levels * factor)
    if not fits(tier, top, grid):
        raise DymoeError(
            f"tier {tier}: its levels are odd halves up to {levels[-1]:g}, which codes of 8 bits cannot hold exactly; "
            "export a lower tier with --tier, or from the checkpoint with --int4 --checkpoint MODEL"
        )
    return (numbers + 128).astype(np.uint8), factor


def fits(tier: int, top: int, grid: str = "") -> bool:
    """Return whether codes of 8 bits hold the levels of a tier.

    >>> fits(4, 4), fits(8, 8)
    (True, False)
    """
    if grid == TRELLIS:
        return True
    levels, factor = _whole(tier, top, grid)
    return bool(np.abs(np.rint(levels * factor)).max() <= MOST)


def _whole(tier: int, top: int, grid: str) -> tuple[np.ndarray, int]:
    """Return the levels of a tier, and the factor, 1 or 2, that makes them whole numbers."""
    levels = levels_of(tier, top, grid)
    return levels, 1 if (levels == np.rint(levels)).all() else 2


def rounded(weight: np.ndarray, form: Format) -> WholeNumbers:
    """Return the nearest whole numbers of weight float32 [rows, cols], with scales that clip nothing."""
    rows, cols = weight.shape
    padded = np.zeros((rows, form.blocks(cols), form.block), np.float32)
    padded.reshape(rows, -1)[:, :cols] = weight
    scales = np.abs(padded).max(axis=-1) / np.float32(form.zero - 1)
    relative = padded / np.where(scales > 0, scales, 1)[..., None]
    codes = (np.rint(relative) + form.zero).astype(np.uint8).reshape(rows, -1)[:, :cols]
    return WholeNumbers(codes, scales)


def values_of(numbers: WholeNumbers, form: Format) -> np.ndarray:
    """Return the values float32 [rows, cols] that whole numbers stand for."""
    cols = numbers.codes.shape[1]
    scales = numbers.scales.repeat(form.block, axis=1)[:, :cols]
    values: np.ndarray = (numbers.codes.astype(np.float32) - np.float32(form.zero)) * scales
    return values


def grown(rows: Rows, form: Format, shape: tuple[int, int]) -> Rows:
    """Return a matrix with zeros added below and to the right, so that it has `shape`."""
    if not isinstance(rows, WholeNumbers):
        return _grown(rows, shape, 0)
    scales = _grown(rows.scales, (shape[0], form.blocks(shape[1])), 0)
    return WholeNumbers(_grown(rows.codes, shape, form.zero), scales)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes uint8 [..., cols] as bytes: those of 4 bits are two to a byte, the first in the low bits."""
    if bits == 8:
        return codes
    pairs: np.ndarray = codes[..., ::2] | codes[..., 1::2] << 4
    return pairs


def _grown(array: np.ndarray, shape: tuple[int, int], fill: int) -> np.ndarray:
    if array.shape == shape:
        return array
    made = np.full(shape, fill, array.dtype)
    made[: array.shape[0], : array.shape[1]] = array
    return made
