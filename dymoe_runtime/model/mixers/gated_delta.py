"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): a recurrent mixer whose state does not grow."""

from __future__ import annotations

import numpy as np

from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.kernels.prepared import DeltaArrays, DeltaWeights
from dymoe_runtime.model.mixer import Dense, WholeAttention
from dymoe_runtime.spec import GatedDeltaSpec


class DeltaState:
    """The last inputs of the convolution, and the memory of each head."""

    def __init__(self, arrays: DeltaArrays) -> None:
        self.arrays = arrays

    def clear(self) -> None:
        """Forget all tokens."""
        for array in self.arrays:
            array[:] = 0

    def truncate(self, length: int) -> bool:
        if length == 0:
            self.clear()
        return length == 0

    def snapshot(self) -> DeltaArrays:
        return DeltaArrays(*(array.copy() for array in self.arrays))

    def rollback(self, snapshot: DeltaArrays) -> None:
        for array, seen in zip(self.arrays, snapshot, strict=True):
            array[:] = seen

    def used(self, length: int) -> list[np.ndarray]:
        return list(self.arrays)


class GatedDelta:
    """The gated delta rule of one layer."""

    def __init__(
        self,
        spec: GatedDeltaSpec,
        prefix: str,
        dense: Dense,
        kernels: Kernels,
        whole: WholeAttention | None,
        eps: float,
    ) -> None:
        self._spec, self._prefix, self._dense = spec, prefix, dense
        self._kernels, self._eps = kernels, eps

    @staticmethod
    def state_bytes(spec: GatedDeltaSpec, capacity: int, kv_bits: int) -> int:
        return 4 * sum(int(np.prod(shape)) for shape in _shapes(spec))

    @staticmethod
    def make_state(spec: GatedDeltaSpec, memory: np.ndarray, capacity: int, kv_bits: int) -> DeltaState:
        values, arrays = memory.view(np.float32), []
        for shape in _shapes(spec):
            size = int(np.prod(shape))
            arrays.append(values[:size].reshape(shape))
            values = values[size:]
        return DeltaState(DeltaArrays(*arrays))

    @staticmethod
    def workspace_bytes(spec: GatedDeltaSpec, kernels: Kernels, tokens: int, context: int) -> int:
        """Return the bytes of what the convolution reads and writes, twice each, and of gates and outputs."""
        return 4 * (tokens * (4 * spec.channels + 5 * spec.values) + (spec.taps - 1) * spec.channels)

    def forward(
        self, h: np.ndarray, state: DeltaState | None, start: int, weigh: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        spec = self._spec
        if state is None:
            state = self.make_state(spec, np.zeros(self.state_bytes(spec, 0, 0), np.uint8), 0, 0)
        elif start == 0:  # the memory may have been that of another layer
            state.clear()
        weights = DeltaWeights(*(self._vector(name) for name in ("conv_exact", "a_log", "dt_bias")))
        mixed, rates = self._linear("qkv", h), self._linear("ba_exact", h)
        y = self._kernels.gated_delta(spec, mixed, rates, weights, state.arrays)
        normed = self._kernels.norm(
            y.reshape(-1, spec.value_heads, spec.value_dim), self._vector("norm"), self._eps
        ).reshape(y.shape)
        return self._linear("o", self._kernels.activate(self._linear("z", h), normed, "silu")), None

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self._dense.linear(f"{self._prefix}delta.{name}", x)

    def _vector(self, name: str) -> np.ndarray:
        return self._dense.vector(f"{self._prefix}delta.{name}")


def _shapes(spec: GatedDeltaSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the arrays of a state."""
    return (spec.taps - 1, spec.channels), (spec.value_heads, spec.key_dim, spec.value_dim)
