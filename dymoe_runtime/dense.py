"""Weights outside the experts, as a bundle keeps them: quantized matrices, the rest in float32."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_runtime import kernels
from dymoe_runtime.bundle import DAMAGED, DENSE, Bundle, check_dense, dense_layout, quantized_bits
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.memory import lock_in_memory, map_memory
from dymoe_runtime.tensorfile import read_header, read_tensor
from dymoe_runtime.tiers import RecordLayout

# Rows of a bf16 matrix turned to float32 at a time.
ROWS_AT_ONCE = 4096
# One reads while the other checks.
READERS = 2
# Of where a tensor begins: a line of the caches.
ALIGN = 64


class BundleDense:
    """The dense weights of a bundle in memory, read and checked once."""

    def __init__(self, bundle: Bundle) -> None:
        self._layouts: dict[str, RecordLayout] = {}
        path, shapes = bundle.path / DENSE, bundle.spec.tensor_shapes()
        header = read_header(path)
        for name in shapes:
            if name not in header:
                raise DymoeError(f"{path}: tensor {name} is missing; {DAMAGED}")
        starts = [0, *accumulate(-(-header[name].nbytes // ALIGN) * ALIGN for name in shapes)]
        self._memory = torch.from_numpy(np.frombuffer(map_memory(starts[-1]), np.uint8))
        fd = os.open(path, os.O_RDONLY)

        def read(name: str, start: int) -> torch.Tensor:
            info = header[name]
            data = self._memory[start : start + info.nbytes]
            tensor = read_tensor(fd, path, info, name, into=data)
            check_dense(path, name, data.numpy(), bundle.manifest.dense_crc32[name])
            return tensor

        try:
            with ThreadPoolExecutor(READERS) as pool:
                self._tensors = dict(zip(shapes, pool.map(read, shapes, starts), strict=True))
        finally:
            os.close(fd)
        for name, shape in shapes.items():
            if bits := quantized_bits(name, shape, bundle.manifest.dense_bits):
                self._layouts[name] = dense_layout(shape, bits)

    def lock(self) -> int:
        """Keep the weights from being swapped out, if the system allows it; the bytes that are kept."""
        return self._memory.nbytes if lock_in_memory(self._memory.data_ptr(), self._memory.nbytes) else 0

    def replaced(self, records: Mapping[str, tuple[RecordLayout, torch.Tensor]]) -> BundleDense:
        """The same weights but for those of `records`, name -> (dense_layout, record)."""
        other = copy.copy(self)
        other._layouts = self._layouts | {name: layout for name, (layout, _) in records.items()}
        other._tensors = self._tensors | {name: record for name, (_, record) in records.items()}
        return other

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self._tensors["embed"]
        if "embed" in self._layouts:
            layout = self._layouts["embed"]
            return kernels.embed(layout, layout.ladder[0], [weight], ids)
        return weight[ids].float()

    def vector(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def optional(self, name: str) -> torch.Tensor | None:
        return self._tensors.get(name)

    def record(self, name: str) -> tuple[RecordLayout, torch.Tensor] | None:
        """The layout and the bytes of a matrix that is quantized; None if it is not."""
        layout = self._layouts.get(name)
        return None if layout is None else (layout, self._tensors[name])

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._tensors[name], self._tensors.get(f"{name}_bias")
        if layout := self._layouts.get(name):
            y = kernels.linear(layout, layout.ladder[0], [weight], x)
        elif weight.dtype == torch.float32:
            y = F.linear(x, weight)
        else:
            y = linear_by_rows(x, weight)
        return y if bias is None else y + bias


def linear_by_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, cols] @ weight.T [cols, rows] in float32, without the whole of a large weight in float32."""
    return torch.cat([F.linear(x, rows.float()) for rows in weight.split(ROWS_AT_ONCE)], dim=-1)
