"""Codes of 8 bits with scales: FP8 in blocks, by channel or by tensor, MXFP8, and int8.

| tensor | type and shape |
|---|---|
| X.weight | F8_E4M3, F8_E5M2 or I8 [rows, cols] |
| X.weight_scale_inv, X.weight_scale or X.scale | one for each block: [row blocks, column blocks], [rows] or a number |
| X.weight_zero_point | I8 like the scales, if there is one |

weight = (code - zero point) * scale. Scales that are bytes are powers of two: 2**(byte - 127). The blocks at the edges
may be shorter. A stack Y of matrices has Y_scale_inv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dymoe_compile.checkpoint.directory import TensorFiles
from dymoe_compile.checkpoint.formats.stored import FLOATS, WEIGHT, Parts, Shape, Stored, block_size
from dymoe_compile.checkpoint.quantization import Quantization

if TYPE_CHECKING:
    import torch

FLOAT_CODES = ("F8_E4M3", "F8_E5M2")
SCALES = (*FLOATS, "F8_E8M0", "U8")


@dataclass(frozen=True)
class Scaled(Stored):
    """A matrix of codes of 8 bits, with a scale for each block."""

    block: tuple[int, int]  # rows and columns

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from dymoe_compile.checkpoint.formats import arithmetic

        weights = parts["data"].float()
        for role, operation in (("zero_point", arithmetic.subtract), ("scale", arithmetic.multiply)):
            if role in parts:
                values = arithmetic.number(parts[role])
                grid = _grid(weights.shape[0], tuple(values.shape))
                arithmetic.by_block(weights, values.reshape(grid), self.block, operation)
        return weights


def find(name: str, shape: Shape, files: TensorFiles, quantization: Quantization) -> Stored | None:
    """Return the matrix `name`, or a stack of matrices, if it is stored as codes of 8 bits.

    Raises DymoeError if its scales are missing, or do not fit.
    """
    if name not in files or files.info(name).dtype not in (*FLOAT_CODES, "I8") or len(files.info(name).shape) < 2:
        return None
    parts = Parts(name, name, files)
    scale = parts.add("scale", _scale_of(name, parts.dtype, files), SCALES)
    *stack, rows, cols = parts.shape
    usual = quantization.block
    grid = _grid(rows, scale[1:] if stack and scale[:1] == tuple(stack) else scale)
    block = block_size(rows, grid[0], usual[0]), block_size(cols, grid[1], usual[1])
    if block[0] is None or block[1] is None:
        parts.misfit("scale", f"a number, [{rows}, 1] or one for each block of {usual[0]} rows and {usual[1]} columns")
    if parts.maybe("zero_point", f"{name}_zero_point", ("I8",)) is not None:
        parts.expect("zero_point", scale)
    return Scaled(name, parts.shape, parts.found, (block[0] or 0, block[1] or 0))


def _scale_of(name: str, dtype: str, files: TensorFiles) -> str:
    """Return the name of the scales of `name`, the usual one if there are none."""
    names = [f"{name}_scale_inv"]
    if name.endswith(WEIGHT):
        names += [f"{name}_scale", f"{name.removesuffix(WEIGHT)}.scale"]
    if dtype == "I8":  # codes of 4 bits have the other names
        names = [f"{name}_scale"]
    return next((name for name in names if name in files), names[0])


def _grid(rows: int, scale: Shape) -> tuple[int, int]:
    """Return the shape of scales as a matrix of blocks of a matrix of `rows` rows; (0, 0) if they cannot be one."""
    if len(scale) == 4 and scale[1] == scale[3] == 1:  # of ModelOpt: [row blocks, 1, column blocks, 1]
        return scale[0], scale[2]
    if len(scale) == 2:
        return scale[0], scale[1]
    if scale in ((), (1,)):
        return 1, 1
    return (rows, 1) if scale == (rows,) else (0, 0)
