"""Tensors that are not quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dymoe_compile.checkpoint.directory import TensorFiles
from dymoe_compile.checkpoint.formats.stored import FLOATS, Shape, Stored
from dymoe_compile.checkpoint.quantization import Quantization

if TYPE_CHECKING:
    import torch


class Plain(Stored):
    """A tensor of floating-point numbers, in the precision that it is stored in; float32 if that is F64."""

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        data = parts["data"]
        return data.float() if data.itemsize == 8 else data


def find(name: str, shape: Shape, files: TensorFiles, quantization: Quantization) -> Stored | None:
    """Return the tensor `name` if it is there and not quantized."""
    if name not in files or files.info(name).dtype not in FLOATS:
        return None
    return Plain(name, files.info(name).shape, {"data": name})
