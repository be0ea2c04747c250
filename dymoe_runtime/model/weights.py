"""The dense weights of a bundle, which are all weights outside the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import accumulate

import numpy as np

from dymoe_runtime.bundle.bundle import DENSE, Bundle, dense_layout, quantized_bits
from dymoe_runtime.bundle.records import check_dense, check_dense_types
from dymoe_runtime.bundle.tensorfile import header_of, read_into
from dymoe_runtime.bundle.tiers import RecordLayout, widen_bf16
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.memory import address_of, lock_in_memory, map_memory
from dymoe_runtime.model.routing import in_groups
from dymoe_runtime.storage import Member

# NumPy types of the tensors in a bundle; bf16 stays as its bits.
DTYPES = {"F32": np.float32, "BF16": np.uint16, "U8": np.uint8}
# Threads: one reads while the other verifies checksums.
READERS = 2
# Tokens that are multiplied between two pauses.
ROWS_AT_ONCE = 64
# Each tensor begins at a multiple of a cache line's bytes.
ALIGN = 64


class BundleDense:
    """The dense weights of a bundle, in memory."""

    def __init__(self, bundle: Bundle, kernels: Kernels) -> None:
        """Read and verify all dense weights.

        Raises DymoeError if a tensor is missing, has another type or shape, or is damaged.
        """
        self._kernels = kernels
        self._layouts: dict[str, RecordLayout] = {}
        self._pause: Callable[[], None] | None = None
        with closing(bundle.open_file(DENSE)) as file:
            self._memory, self._tensors = self._read(bundle, file)

    def _read(self, bundle: Bundle, file: Member) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the memory that the file takes, and the tensors in it by name."""
        path, shapes = bundle.path / DENSE, bundle.spec.tensor_shapes()
        header = header_of(file.fd, path, file.nbytes, file.start)
        check_dense_types(bundle, header)
        for name, shape in shapes.items():
            if bits := quantized_bits(name, shape, bundle.manifest.dense_bits):
                self._layouts[name] = dense_layout(shape, bits)
        starts = [0, *accumulate(-(-header[name].nbytes // ALIGN) * ALIGN for name in shapes)]
        memory = np.frombuffer(map_memory(starts[-1]), np.uint8)

        def read(name: str, start: int) -> np.ndarray:
            info = header[name]
            data = memory[start : start + info.nbytes]
            if info.nbytes:
                read_into(file.fd, file.path, file.start + info.start, memoryview(data))
            check_dense(path, name, data, bundle.manifest.dense_crc32[name])
            return data.view(DTYPES[info.dtype]).reshape(info.shape)

        with ThreadPoolExecutor(READERS) as pool:
            return memory, dict(zip(shapes, pool.map(read, shapes, starts), strict=True))

    def lock(self) -> int:
        """Lock the weights in memory; return the bytes locked, 0 if the system does not allow it."""
        return self._memory.nbytes if lock_in_memory(address_of(self._memory), self._memory.nbytes) else 0

    def embed(self, ids: np.ndarray) -> np.ndarray:
        weight = self._tensors["embed"]
        if "embed" in self._layouts:
            layout = self._layouts["embed"]
            return self._kernels.embed(layout, layout.ladder[0], [weight], ids)
        return widen_bf16(weight[ids]) if weight.dtype == np.uint16 else weight[ids]

    def vector(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def optional(self, name: str) -> np.ndarray | None:
        return self._tensors.get(name)

    def record(self, name: str) -> tuple[RecordLayout, np.ndarray] | None:
        """Return the layout and the bytes of a quantized matrix, or None if `name` is not one."""
        layout = self._layouts.get(name)
        return None if layout is None else (layout, self._tensors[name])

    @property
    def pause(self) -> Callable[[], None] | None:
        return self._pause

    @contextmanager
    def pausing(self, pause: Callable[[], None] | None) -> Iterator[None]:
        """Return a context in which `pause`, if given, is called between parts of long products.

        Other products may run in it. Results stay the same; with kernels that are not `batch_invariant` they would
        not, so that these never pause.
        """
        before = self._pause
        self._pause = pause if self._kernels.batch_invariant else None
        try:
            yield
        finally:
            self._pause = before

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        if self._pause is None or len(x) <= ROWS_AT_ONCE:
            return self._linear(name, x)
        parts = list[np.ndarray]()
        for rows in in_groups(x, ROWS_AT_ONCE):
            parts.append(self._linear(name, rows))
            self._pause()
        return np.concatenate(parts)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        weight, bias = self._tensors[name], self._tensors.get(f"{name}_bias")
        if layout := self._layouts.get(name):
            y = self._kernels.linear(layout, layout.ladder[0], [weight], x)
        else:
            y = self._kernels.matmul(x, weight)
        return y if bias is None else y + bias
