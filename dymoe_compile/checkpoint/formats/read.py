"""Read tensors in whatever format they are stored; each must be finite."""

from __future__ import annotations

import torch

from dymoe_compile.checkpoint.directory import TensorFiles
from dymoe_compile.checkpoint.formats.arithmetic import powers
from dymoe_compile.checkpoint.formats.stored import Stored
from dymoe_runtime.errors import DymoeError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def read(files: TensorFiles, stored: Stored, index: int | None = None) -> torch.Tensor:
    """Return a tensor, or matrix `index` of a stack, in its stored precision, or in float32 if it is quantized.

    Raises DymoeError if it, or a tensor that it is made of, is not finite.
    """
    main, *others = stored.parts
    parts = {role: _part(files, stored, role, index) for role in stored.parts}
    for role in others:
        if parts[role].is_floating_point():
            _check_finite(files, stored.parts[role], parts[role].float())
    tensor = stored.decode(parts)
    _check_finite(files, stored.parts[main], tensor)
    return tensor


def _part(files: TensorFiles, stored: Stored, role: str, index: int | None) -> torch.Tensor:
    """Return a tensor that a tensor is made of; of a stack, what belongs to one matrix."""
    name = stored.parts[role]
    info = files.info(name)
    if info.shape[:1] != stored.shape[:1]:  # one for the whole stack
        index = None
    data = torch.from_numpy(files.read(name, index))
    shape = info.shape if index is None else info.shape[1:]
    return powers(data).view(shape) if info.dtype == "F8_E8M0" else data.view(DTYPES[info.dtype]).view(shape)


def _check_finite(files: TensorFiles, name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise DymoeError(
            f"{files.path(name)}: tensor {name} holds NaN or Inf; the checkpoint is damaged, download it again"
        )
