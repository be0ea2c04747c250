"""Whole numbers of 2 to 8 bits, as compressed-tensors packs them (`pack-quantized`).

| tensor | type and shape |
|---|---|
| X.weight_packed | I32 [rows, cols * bits / 32] |
| X.weight_scale | [rows, groups], [rows, 1] or a number |
| X.weight_zero_point | I32 [rows * bits / 32, groups], packed along rows, if there are zero points |
| X.weight_g_idx | the group of each column [cols], unless the columns of a group are neighbours |
| X.weight_shape | [rows, cols] |

The bits of a row are one stream, lowest bits first. Numbers and zero points are stored plus 2**(bits - 1).
weight = (number - zero point) * scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dymoe_compile.checkpoint.directory import TensorFiles
from dymoe_compile.checkpoint.formats.stored import FLOATS, WEIGHT, Parts, Shape, Stored
from dymoe_compile.checkpoint.quantization import Quantization
from dymoe_runtime.errors import DymoeError

if TYPE_CHECKING:
    import torch

INTEGERS = ("I32", "I64")


@dataclass(frozen=True)
class PackedIntegers(Stored):
    """A matrix of packed whole numbers."""

    bits: int

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from dymoe_compile.checkpoint.formats import arithmetic

        if tuple(parts["shape"].tolist()) != self.shape:
            raise DymoeError(
                f"tensor {self.parts['shape']} is {parts['shape'].tolist()}, the other tensors of that matrix say "
                f"{list(self.shape)}; download the checkpoint again"
            )
        rows, cols = self.shape
        scales = parts["scale"].float()
        scales = scales if scales.dim() == 2 else scales.reshape(1, 1)  # [rows or 1, groups]
        zeros = scales.new_full((1, scales.shape[1]), 1 << (self.bits - 1))
        if "zero_point" in parts:
            zeros = arithmetic.unpack(parts["zero_point"].T, self.bits, rows).T.float()
        numbers = arithmetic.unpack(parts["data"], self.bits, cols)
        groups = parts.get("groups")
        if groups is not None and (groups < 0).any():  # never filled in
            groups = None
        return arithmetic.affine(numbers, zeros, scales, groups)


def find(name: str, shape: Shape, files: TensorFiles, quantization: Quantization) -> Stored | None:
    """Return the matrix `name` if it is stored as packed whole numbers.

    `shape` decides how many bits they have, if that is possible. Raises DymoeError if a tensor that belongs to it is
    missing, or does not fit.
    """
    packed = f"{name}_packed"
    if not name.endswith(WEIGHT) or packed not in files or files.info(packed).dtype != "I32":
        return None
    parts = Parts(name, packed, files)
    if len(parts.shape) != 2:
        parts.misfit("data", "[rows, columns * bits / 32]")
    rows, words = parts.shape
    fitting = [bits for bits in quantization.bits if len(shape) == 2 and math.ceil(shape[1] * bits / 32) == words]
    bits = (fitting or list(quantization.bits))[0]
    cols = shape[1] if fitting else words * 32 // bits
    scale = parts.add("scale", f"{name}_scale", FLOATS)
    if scale not in ((), (1,)) and (len(scale) != 2 or scale[0] != rows or not scale[1] or cols % scale[1]):
        parts.misfit("scale", f"a number or [{rows}, groups]")
    groups = scale[1] if len(scale) == 2 else 1
    if parts.maybe("zero_point", f"{name}_zero_point", ("I32",)) is not None:
        parts.expect("zero_point", (math.ceil(rows * bits / 32), groups))
    if parts.maybe("groups", f"{name}_g_idx", INTEGERS) is not None:
        parts.expect("groups", (cols,))
    parts.add("shape", f"{name}_shape", INTEGERS)
    parts.expect("shape", (2,))
    return PackedIntegers(name, (rows, cols), parts.found, bits)
