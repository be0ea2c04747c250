"""Matrices that GPTQ and AWQ have quantized. Both store them transposed, [inputs, outputs].

| tensor | GPTQ | AWQ |
|---|---|---|
| X.qweight | I32 [inputs * bits / 32, outputs], packed along inputs | I32 [inputs, outputs / 8], packed along outputs |
| X.qzeros | I32 [groups, outputs * bits / 32] | I32 [groups, outputs / 8] |
| X.scales | [groups, outputs] | [groups, outputs] |
| X.g_idx | the group of each input [inputs], unless they are in order | |

weight = (number - zero point) * scale. In GPTQ, the bits are one stream, lowest bits first. Its version 1 stores zero
points less 1, and version 2 as they are. In AWQ, the 8 numbers of a word are those of the outputs 0, 2, 4, 6, 1, 3, 5
and 7, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dymoe_compile.checkpoint.directory import CONFIG, TensorFiles
from dymoe_compile.checkpoint.formats.stored import FLOATS, WEIGHT, Parts, Shape, Stored, block_size
from dymoe_compile.checkpoint.quantization import GPTQ_BITS, Quantization
from dymoe_runtime.errors import DymoeError

if TYPE_CHECKING:
    import torch

# Where in its word AWQ puts output 0, 1, 2 … of 8.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
AWQ_BITS, AWQ_NUMBERS = 4, 8  # of a number; in a word


@dataclass(frozen=True)
class Gptq(Stored):
    """A matrix that GPTQ has quantized."""

    bits: int
    group_size: int
    stored_less_one: bool
    symmetric: bool

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from dymoe_compile.checkpoint.formats import arithmetic

        rows, cols = self.shape
        zeros = arithmetic.unpack(parts["zeros"], self.bits, rows).T  # [rows, groups]
        if self.stored_less_one:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)  # a zero point of 0 is stored as the highest number
        middle = 1 << (self.bits - 1)
        if self.symmetric and not (zeros == middle).all():
            raise DymoeError(
                f"tensor {self.parts['zeros']} has other zero points than {middle}, though {CONFIG} says that the "
                "quantization is symmetric; use the config.json that belongs to this checkpoint"
            )
        numbers = arithmetic.unpack(parts["data"].T, self.bits, cols)
        scales = parts["scale"].T.float()
        groups = parts.get("groups")
        if groups is not None and not ((groups >= 0) & (groups < scales.shape[1])).all():
            raise DymoeError(f"tensor {self.parts['groups']} names groups that do not exist; download it again")
        return arithmetic.affine(numbers, zeros.float(), scales, groups, self.group_size)


@dataclass(frozen=True)
class Awq(Stored):
    """A matrix that AWQ has quantized."""

    group_size: int

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from dymoe_compile.checkpoint.formats import arithmetic

        rows, _ = self.shape
        numbers, zeros = (
            arithmetic.unpack(parts[role], AWQ_BITS, rows).view(-1, rows // AWQ_NUMBERS, AWQ_NUMBERS)[..., AWQ_PLACES]
            for role in ("data", "zeros")
        )
        numbers, zeros, scales = (each.reshape(-1, rows).T for each in (numbers, zeros.float(), parts["scale"].float()))
        return arithmetic.affine(numbers, zeros, scales, None, self.group_size)


def find(name: str, shape: Shape, files: TensorFiles, quantization: Quantization) -> Stored | None:
    """Return the matrix `name` if GPTQ or AWQ has quantized it.

    Raises DymoeError if config.json does not say which of them, or if a tensor that belongs to it is missing or does
    not fit.
    """
    base = name.removesuffix(WEIGHT)
    packed = f"{base}.qweight"
    if not name.endswith(WEIGHT) or packed not in files:
        return None
    if not quantization.layout:
        raise DymoeError(
            f"{files.path(packed)}: tensor {packed} is quantized, but {CONFIG} does not say that it is by GPTQ or AWQ; "
            "use the config.json that belongs to this checkpoint"
        )
    parts = Parts(name, packed, files)
    if parts.dtype != "I32" or len(parts.shape) != 2:
        parts.misfit("data", "I32 with two dimensions")
    zeros = parts.add("zeros", f"{base}.qzeros", ("I32",))
    scale = parts.add("scale", f"{base}.scales", FLOATS)
    if len(scale) != 2 or not all(scale):
        parts.misfit("scale", "[groups, outputs]")
    if len(zeros) != 2 or zeros[0] != scale[0]:
        parts.misfit("zeros", f"[{scale[0]}, outputs * bits / 32]")
    if quantization.layout == "awq":
        return _awq(name, parts, scale, quantization)
    groups = parts.maybe("groups", f"{base}.g_idx", ("I32", "I64"))
    return _gptq(name, parts, zeros, scale, groups, quantization)


def _gptq(
    name: str, parts: Parts, zeros: Shape, scale: Shape, groups: Shape | None, quantization: Quantization
) -> Stored:
    count, rows = scale
    bits = zeros[1] * 32 // rows
    if bits not in GPTQ_BITS or zeros[1] * 32 != bits * rows:
        parts.misfit("zeros", f"[{count}, {rows} * bits / 32]")
    cols = parts.shape[0] * 32 // bits
    if parts.shape != (cols * bits // 32, rows):
        parts.misfit("scale", f"[groups, {parts.shape[1]}]")
    if groups == (0,):
        parts.found.pop("groups")
    elif groups is not None:
        parts.expect("groups", (cols,))
    size = block_size(cols, count, quantization.group_size)
    if size is None and "groups" not in parts.found:
        parts.misfit("scale", f"one row for each {quantization.group_size} of {cols} inputs")
    known = (bits, size or quantization.group_size, quantization.stored_less_one, quantization.symmetric)
    return Gptq(name, (rows, cols), parts.found, *known)


def _awq(name: str, parts: Parts, scale: Shape, quantization: Quantization) -> Stored:
    count, rows = scale
    cols = parts.shape[0]
    if parts.shape[1] * AWQ_NUMBERS != rows:
        parts.misfit("scale", f"[groups, {parts.shape[1] * AWQ_NUMBERS}]")
    parts.expect("zeros", (count, parts.shape[1]))
    size = block_size(cols, count, quantization.group_size)
    if size is None:
        parts.misfit("scale", f"one row for each {quantization.group_size} of {cols} inputs")
    return Awq(name, (rows, cols), parts.found, size or quantization.group_size)
