"""The descent in compiled code, on torch tensors."""

from __future__ import annotations

import torch

from dymoe_compile.quantize.descent import Descent, Grid
from dymoe_compile.quantize.descent_reference import ReferenceDescent
from dymoe_runtime.bundle.tiers import TRELLIS
from dymoe_runtime.kernels import _native

# Most bits of the highest tier that the compiled `fit` supports: kMaxFittedBits in kernels.h.
MAX_FITTED = 5


class NativeDescent:
    """`DescentKernels` in the compiled code of one instruction set."""

    def __init__(self, isa: str) -> None:
        self._isa = isa

    def fit(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        if grid.ladder[-1] > MAX_FITTED:
            return ReferenceDescent().fit(weight, grid)
        grid.check(weight)
        tiers, (rows, cols) = len(grid.ladder), weight.shape
        codes = torch.empty(rows, cols, dtype=torch.uint8)
        scales = torch.empty(tiers, *grid.starts.shape[1:])
        _check(grid.starts, torch.float32, 3, "starts")
        _native.fit(
            self._isa,
            list(grid.ladder),
            list(grid.weights),
            _matrix(weight, "weight"),
            _vector(grid.importance, torch.float32, "importance")[0],
            len(grid.starts),
            grid.starts.data_ptr(),
            scales.data_ptr(),
            codes.data_ptr(),
        )
        return codes, scales

    def descend(self, block: Descent) -> None:
        cols = block.columns.stop - block.columns.start
        tiers, rows, pitch = block.error.shape
        _check(block.error, torch.float32, 3, "error")
        _check(block.codes, torch.uint8, 2, "codes")
        _check(block.hessian, torch.float32, 2, "hessian")
        shapes = {
            "ladder": (len(block.ladder), tiers),
            "codes": (tuple(block.codes.shape), (rows, pitch)),
            "hessian": (tuple(block.hessian.shape), (pitch, pitch)),
            "slope": (tuple(block.slope.shape), (tiers, rows, cols)),
            "scales": (tuple(block.scales.shape), (tiers, rows)),
            "units": (None if block.units is None else tuple(block.units.shape), (tiers, rows)),
            "columns": (0 <= block.columns.start < block.columns.stop <= pitch, True),
        }
        for name, (found, expected) in shapes.items():
            if found is not None and found != expected:
                raise ValueError(f"{name}: expected {expected}, got {found}")
        slope = block.slope.view(tiers * rows, cols)
        first = block.columns.start
        _native.descend(
            self._isa,
            list(block.ladder),
            list(block.weights),
            (block.hessian.data_ptr() + 4 * first * (pitch + 1), cols, cols),
            pitch,
            _matrix(slope, "slope"),
            0 if block.units is None else _matrix(block.units, "units")[0],
            _matrix(block.scales, "scales")[0],
            block.error.data_ptr() + 4 * first,
            block.codes.data_ptr() + first,
            pitch,
            block.last,
            block.whole,
            block.grid == TRELLIS,
            0 if block.weight is None else block.weight.data_ptr() + 4 * first,
        )


def _vector(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> tuple[int, int]:
    """Return address and length of a tensor that compiled code can safely read."""
    _check(tensor, dtype, 1, name)
    return tensor.data_ptr(), tensor.numel()


def _matrix(tensor: torch.Tensor, name: str) -> tuple[int, int, int]:
    _check(tensor, torch.float32, 2, name)
    return tensor.data_ptr(), *tensor.shape


def _check(tensor: torch.Tensor, dtype: torch.dtype, dims: int, name: str) -> None:
    if tensor.dtype is dtype and tensor.dim() == dims and tensor.is_cpu and tensor.is_contiguous():
        return
    raise ValueError(
        f"{name}: expected a contiguous {dtype} tensor of {dims} dimensions on the CPU, "
        f"got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
    )
