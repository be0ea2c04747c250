"""Arguments of the kernels: prepared experts, their rows, reads in flight, and dense weights for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.spec import AttentionSpec, RouterSpec


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


@dataclass(frozen=True, eq=False)
class DecodeWeights:
    """The dense weights of one layer for decoding in compiled code; all plain arrays are float32."""

    hidden: int  # H, the width of the residual stream
    eps: float  # of all norms
    attention: AttentionSpec
    router: RouterSpec | None  # None for a dense layer
    attn_norm: np.ndarray  # [H]
    q_norm: np.ndarray | None  # [head_dim], or [heads * head_dim] if qk_norm is "full"
    k_norm: np.ndarray | None  # [head_dim], or [kv_heads * head_dim] if qk_norm is "full"
    mlp_norm: np.ndarray  # [H]
    router_weight: np.ndarray | None  # [experts, H]
    q: LinearWeights  # [heads * head_dim, H]
    k: LinearWeights  # [kv_heads * head_dim, H]
    v: LinearWeights  # [kv_heads * head_dim, H]
    o: LinearWeights  # [H, heads * head_dim]
