"""Floating-point numbers of 4 bits (E2M1), two in a byte, the first in the low bits: MXFP4 and NVFP4.

| | codes | scales | weight |
|---|---|---|---|
| MXFP4 of gpt-oss | Y_blocks U8 [experts, rows, cols / 32, 16] | Y_scales U8 [experts, rows, cols / 32] | code * 2**(scale - 127) |
| MXFP4 packed | X.weight_packed or X.weight U8 [rows, cols / 2] | X.weight_scale U8 [rows, cols / 32] | the same |
| NVFP4 packed | X.weight_packed U8 [rows, cols / 2] | X.weight_scale F8_E4M3 [rows, cols / 16], X.weight_global_scale | code * (scale / global) |
| NVFP4 of ModelOpt | X.weight U8 [rows, cols / 2] | X.weight_scale F8_E4M3 [rows, cols / 16], X.weight_scale_2 | code * (scale * scale_2) |
"""  # noqa: E501  # a table

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dymoe_compile.checkpoint.directory import TensorFiles
from dymoe_compile.checkpoint.formats.stored import FLOATS, WEIGHT, Parts, Shape, Stored
from dymoe_compile.checkpoint.quantization import Quantization

if TYPE_CHECKING:
    import torch

EXPONENTS = ("U8", "F8_E8M0")
MX_COLUMNS, NV_COLUMNS = 32, 16  # that share a scale


class MxFp4(Stored):
    """A matrix in MXFP4."""

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from dymoe_compile.checkpoint.formats import arithmetic

        weights = arithmetic.fp4(parts["data"].flatten(1))  # [rows, cols]
        return arithmetic.by_block(weights, arithmetic.number(parts["scale"]), (1, MX_COLUMNS), arithmetic.multiply)


class MxFp4Blocks(MxFp4):
    """A matrix in the MXFP4 of gpt-oss, which was trained in it."""

    trained_bits = 4


class NvFp4(Stored):
    """A matrix in NVFP4."""

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from dymoe_compile.checkpoint.formats import arithmetic

        scale = parts["scale"].float()
        scale = scale / parts["divisor"].float() if "divisor" in parts else scale * parts["factor"].float()
        weights = arithmetic.fp4(parts["data"])
        return arithmetic.by_block(weights, scale, (1, NV_COLUMNS), arithmetic.multiply)


def find(name: str, shape: Shape, files: TensorFiles, quantization: Quantization) -> Stored | None:
    """Return the matrix `name`, or a stack of matrices, if it is stored in 4 bits.

    Raises DymoeError if its scales are missing, or do not fit.
    """
    if f"{name}_blocks" in files:
        return _blocks(name, files)
    packed, scale = f"{name}_packed", f"{name}_scale"
    if not name.endswith(WEIGHT):
        return None
    if packed in files and files.info(packed).dtype == "U8":
        return _packed(name, Parts(name, packed, files), scale, "divisor", f"{name}_global_scale", files)
    if name in files and files.info(name).dtype == "U8" and scale in files:
        return _packed(name, Parts(name, name, files), scale, "factor", f"{name}_scale_2", files)
    return None


def _blocks(name: str, files: TensorFiles) -> Stored:
    parts = Parts(name, f"{name}_blocks", files)
    if parts.dtype != "U8" or parts.shape[-1:] != (MX_COLUMNS // 2,):
        parts.misfit("data", f"U8 [..., {MX_COLUMNS // 2}]")
    parts.add("scale", f"{name}_scales", EXPONENTS)
    parts.expect("scale", parts.shape[:-1])
    *stack, blocks, _ = parts.shape
    return MxFp4Blocks(name, (*stack, blocks * MX_COLUMNS), parts.found)


def _packed(name: str, parts: Parts, scale: str, role: str, second: str, files: TensorFiles) -> Stored:
    """Return a matrix in NVFP4, whose scales are FP8 and `second`, or in MXFP4."""
    *stack, half = parts.shape
    cols = 2 * half
    parts.add("scale", scale, ("F8_E4M3", *EXPONENTS))
    if files.info(scale).dtype in EXPONENTS:
        parts.expect("scale", (*stack, cols // MX_COLUMNS))
        return MxFp4(name, (*stack, cols), parts.found)
    parts.expect("scale", (*stack, cols // NV_COLUMNS))
    parts.add(role, second, FLOATS)
    parts.expect(role, (), (1,), *([tuple(stack[:1])] if len(stack) > 1 else []))
    return NvFp4(name, (*stack, cols), parts.found)
