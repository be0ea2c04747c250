"""A mixer that is no attention: a gated causal convolution over a few tokens, with a state of its own.

It is all that a new kind of mixer takes: a specification, a state and a mixer in one file, and one row in
`model.mixers.MIXERS`, which the test adds. It resembles the short convolutions of LFM2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.mixer import Dense, WholeAttention
from dymoe_runtime.spec import Shapes


@dataclass(frozen=True)
class ShortConvolutionSpec:
    """A depthwise convolution over the last `width` tokens."""

    width: int
    channels: int
    kind: ClassVar[str] = "short_convolution"

    def tensor_shapes(self, hidden: int) -> Shapes:
        yield "conv.in", (3 * self.channels, hidden)
        yield "conv.kernel_exact", (self.width, self.channels)
        yield "conv.out", (hidden, self.channels)


class ConvolutionState:
    """The inputs of the last tokens, float32 [width - 1, channels]; zeros before the first token."""

    def __init__(self, memory: np.ndarray, spec: ShortConvolutionSpec) -> None:
        self.inputs = memory.view(np.float32).reshape(spec.width - 1, spec.channels)

    def truncate(self, length: int) -> bool:
        """Forget all; what earlier tokens were is not known any more."""
        if length == 0:
            self.inputs[:] = 0
        return length == 0

    def snapshot(self) -> np.ndarray:
        return self.inputs.copy()

    def rollback(self, snapshot: np.ndarray) -> None:
        self.inputs[:] = snapshot

    def used(self, length: int) -> list[np.ndarray]:
        return [self.inputs]


class ShortConvolution:
    """The convolution of one layer."""

    def __init__(
        self,
        spec: ShortConvolutionSpec,
        prefix: str,
        dense: Dense,
        kernels: Kernels,
        whole: WholeAttention | None,
        eps: float,
    ) -> None:
        self._spec, self._prefix, self._dense = spec, prefix, dense

    @staticmethod
    def state_bytes(spec: ShortConvolutionSpec, capacity: int, kv_bits: int) -> int:
        return 4 * (spec.width - 1) * spec.channels

    @staticmethod
    def make_state(spec: ShortConvolutionSpec, memory: np.ndarray, capacity: int, kv_bits: int) -> ConvolutionState:
        return ConvolutionState(memory, spec)

    @staticmethod
    def workspace_bytes(spec: ShortConvolutionSpec, kernels: Kernels, tokens: int, context: int) -> int:
        return 4 * (tokens + spec.width) * 8 * spec.channels

    def forward(
        self, h: np.ndarray, state: ConvolutionState | None, start: int, weigh: bool = False
    ) -> tuple[np.ndarray, None]:
        into, gate, x = np.split(self._dense.linear(f"{self._prefix}conv.in", h), 3, axis=1)
        width = self._spec.width
        before = np.zeros((width - 1, self._spec.channels), np.float32) if state is None else state.inputs
        inputs = np.concatenate([before, into * x])
        kernel = self._dense.vector(f"{self._prefix}conv.kernel_exact")
        mixed = sum(kernel[k] * inputs[k : k + len(h)] for k in range(width))
        if state is not None:
            state.inputs[:] = inputs[len(h) :]
        return self._dense.linear(f"{self._prefix}conv.out", np.ascontiguousarray(gate * mixed)), None
