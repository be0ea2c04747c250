"""Arguments of the kernels: prepared experts, their rows, reads in flight, and dense weights for decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.spec import LayerSpec


@dataclass(eq=False, slots=True)
class PreparedExpert:
    """One expert at one tier, ready for the kernels as long as its segments stay in place."""

    layout: RecordLayout
    tier: int
    segments: Sequence[np.ndarray]  # empty if the compiled kernels were given places
    views: Any = None  # a `_native.Expert` that points into the segments; None in the reference


class ExpertRows(NamedTuple):
    """An expert and the rows [first, first + rows) of a call that go through it."""

    expert: PreparedExpert
    first: int
    rows: int


class LinearWeights(NamedTuple):
    """A quantized matrix, as the layout and the bytes of its record, and its bias."""

    layout: RecordLayout
    data: np.ndarray  # uint8 [record bytes]
    bias: np.ndarray | None  # float32 [rows]


class DeltaWeights(NamedTuple):
    """The small tensors of a gated delta rule, float32."""

    conv: np.ndarray  # [channels, taps]
    a_log: np.ndarray  # [value_heads]
    dt_bias: np.ndarray  # [value_heads]


class DeltaArrays(NamedTuple):
    """The state of a gated delta rule for one sequence, float32; all zeros before the first token."""

    tail: np.ndarray  # [taps - 1, channels], the last inputs of the convolution
    memory: np.ndarray  # [value_heads, key_dim, value_dim]


@dataclass(frozen=True, eq=False)
class DecodeWeights:
    """The dense weights of one layer for decoding in compiled code, by their names in a bundle without the layer."""

    hidden: int  # H, the width of the residual stream
    norm: str  # one of NORMS in spec.py
    eps: float  # of all norms
    layer: LayerSpec
    rotation: int  # index of the layer's rotary embedding among those of the stack; -1 for none
    plain: Mapping[str, np.ndarray]  # float32: vectors, and matrices that are not quantized
    quantized: Mapping[str, LinearWeights]
