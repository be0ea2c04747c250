"""Weights outside the experts, as a bundle keeps them: quantized matrices, the rest in float32."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np

from dymoe_runtime import kernels
from dymoe_runtime.bundle import DAMAGED, DENSE, Bundle, check_dense, dense_kind, dense_layout, quantized_bits
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.memory import address_of, lock_in_memory, map_memory
from dymoe_runtime.tensorfile import TensorInfo, read_header, read_into
from dymoe_runtime.tiers import RecordLayout, widen_bf16

# Of the tensors in a bundle; what is bf16 stays as it is.
DTYPES = {"F32": np.float32, "BF16": np.uint16, "U8": np.uint8}
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
        for name, shape in shapes.items():
            if bits := quantized_bits(name, shape, bundle.manifest.dense_bits):
                self._layouts[name] = dense_layout(shape, bits)
            if not self._fits(header[name], name, shape):
                raise DymoeError(
                    f"{path}: tensor {name} is {header[name].dtype} of shape {header[name].shape}; {DAMAGED}"
                )
        starts = [0, *accumulate(-(-header[name].nbytes // ALIGN) * ALIGN for name in shapes)]
        self._memory = np.frombuffer(map_memory(starts[-1]), np.uint8)
        fd = os.open(path, os.O_RDONLY)

        def read(name: str, start: int) -> np.ndarray:
            info = header[name]
            data = self._memory[start : start + info.nbytes]
            if info.nbytes:
                read_into(fd, path, info.start, memoryview(data))
            check_dense(path, name, data, bundle.manifest.dense_crc32[name])
            return data.view(DTYPES[info.dtype]).reshape(info.shape)

        try:
            with ThreadPoolExecutor(READERS) as pool:
                self._tensors = dict(zip(shapes, pool.map(read, shapes, starts), strict=True))
        finally:
            os.close(fd)

    def _fits(self, info: TensorInfo, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor `name` is stored as the model and the bits of its kind want it."""
        if name in self._layouts:
            return info.dtype == "U8" and info.shape == (self._layouts[name].record_bytes,)
        return info.dtype == ("BF16" if dense_kind(name, shape) else "F32") and info.shape == shape

    def lock(self) -> int:
        """Keep the weights from being swapped out, if the system allows it; the bytes that are kept."""
        return self._memory.nbytes if lock_in_memory(address_of(self._memory), self._memory.nbytes) else 0

    def replaced(self, records: Mapping[str, tuple[RecordLayout, np.ndarray]]) -> BundleDense:
        """The same weights but for those of `records`, name -> (dense_layout, record)."""
        other = copy.copy(self)
        other._layouts = self._layouts | {name: layout for name, (layout, _) in records.items()}
        other._tensors = self._tensors | {name: record for name, (_, record) in records.items()}
        return other

    def embed(self, ids: np.ndarray) -> np.ndarray:
        weight = self._tensors["embed"]
        if "embed" in self._layouts:
            layout = self._layouts["embed"]
            return kernels.embed(layout, layout.ladder[0], [weight], ids)
        return widen_bf16(weight[ids]) if weight.dtype == np.uint16 else weight[ids]

    def vector(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def optional(self, name: str) -> np.ndarray | None:
        return self._tensors.get(name)

    def record(self, name: str) -> tuple[RecordLayout, np.ndarray] | None:
        """The layout and the bytes of a matrix that is quantized; None if it is not."""
        layout = self._layouts.get(name)
        return None if layout is None else (layout, self._tensors[name])

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        weight, bias = self._tensors[name], self._tensors.get(f"{name}_bias")
        if layout := self._layouts.get(name):
            y = kernels.linear(layout, layout.ladder[0], [weight], x)
        else:
            y = kernels.matmul(x, weight)
        return y if bias is None else y + bias
