"""The operations in plain NumPy with float32 activations: slow, and the reference for the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dymoe_runtime.bundle import tiers
from dymoe_runtime.bundle.tiers import TRELLIS, MatrixLayout, Part, RecordLayout
from dymoe_runtime.kernels.attention_reference import Sight, attention, received
from dymoe_runtime.kernels.delta_reference import gated_delta
from dymoe_runtime.kernels.kv_cache import KVCache
from dymoe_runtime.kernels.prepared import DeltaArrays, DeltaWeights, ExpertRows, PreparedExpert
from dymoe_runtime.kernels.reads import PendingReads
from dymoe_runtime.kernels.route_reference import choose_experts
from dymoe_runtime.memory import Place, memory_at
from dymoe_runtime.spec import GatedDeltaSpec, RouterSpec, clamped_parameters

# Weights of a matrix that are float32 at a time; temporaries take about six times as much memory again.
WEIGHTS_AT_ONCE = 1 << 17

_erf: Any = np.frompyfunc(math.erf, 1, 1)

Activation = Callable[[np.ndarray], np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    """Return x * sigmoid(x) (arXiv 1606.08415), float32 like x."""
    with np.errstate(over="ignore"):  # far below zero exp(-x) is inf, and the result 0
        y: np.ndarray = x / (1 + np.exp(-x))
    return y


def gelu(x: np.ndarray) -> np.ndarray:
    """Return x times the cumulative normal distribution at x (arXiv 1606.08415)."""
    y: np.ndarray = x * (0.5 + 0.5 * _erf(x / np.float32(math.sqrt(2))).astype(np.float32))
    return y


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Return the tanh approximation of `gelu` (arXiv 1606.08415)."""
    y: np.ndarray = 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x * x * x)))
    return y


# The names are those of Hugging Face configurations.
ACTIVATIONS: dict[str, Activation] = {"silu": silu, "gelu": gelu, "gelu_pytorch_tanh": gelu_tanh}


def available() -> list[str]:
    """Return the one name of the reference, which runs everywhere."""
    return [ReferenceKernels.name]


def load(name: str, notice: str | None = None) -> ReferenceKernels:
    """Return the reference; `notice` is what to tell the user about why it is used."""
    return ReferenceKernels(notice)


class ReferenceKernels:
    """`Kernels` in NumPy. Products use the threads of NumPy's BLAS, whose number cannot be set from here."""

    name = "numpy"
    compiled_isa: str | None = None
    batch_invariant = False
    reserve_bytes = 48 << 20
    frees_large_blocks = True
    timed_at_start = False
    reads: Callable[[int], Any] | None = None

    def __init__(self, notice: str | None = None) -> None:
        """Keep `notice`: what to tell the user about why NumPy is used."""
        self.notice = notice

    def threads(self) -> int:
        return 1

    def set_threads(self, count: int) -> None:
        pass

    def pin_threads(self) -> bool:
        return False

    def prepare(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray]) -> PreparedExpert:
        _arrays(layout, tier, segments)  # raises ValueError where they do not fit
        return PreparedExpert(layout, tier, segments)

    def prepare_at(self, layout: RecordLayout, tier: int, places: Sequence[Place]) -> PreparedExpert:
        return self.prepare(layout, tier, [memory_at(place) for place in places])

    def moe(
        self, parts: Sequence[ExpertRows], x: np.ndarray, tokens: np.ndarray, y: np.ndarray, activation: str
    ) -> None:
        for expert, first, count in parts:
            _check_input(x, expert.layout.matrices["gate"].cols)
            rows = slice(first, first + count)
            if not 0 <= rows.start <= rows.stop <= len(y):
                raise ValueError(f"rows {rows.start}..{rows.stop} are not in 0..{len(y)}")
            wanted = tokens[rows]
            if ((wanted < 0) | (wanted >= len(x))).any():
                raise ValueError(f"tokens: {wanted.tolist()} are not all below {len(x)}")
            y[rows] = _ffn(expert, x[wanted], activation)

    def moe_token(
        self,
        experts: Sequence[PreparedExpert],
        x: np.ndarray,
        weights: np.ndarray,
        activation: str,
        pending: PendingReads | None = None,
    ) -> np.ndarray:
        if x.shape[0] != 1 or weights.shape != (1, len(experts)):
            raise ValueError(
                f"x: expected one token and a weight for each expert, got {list(x.shape)}, {list(weights.shape)}"
            )
        y, tokens = np.empty((len(experts), x.shape[1]), np.float32), np.zeros(len(experts), np.int64)
        late = [] if pending is None else pending.tickets
        ready = set(range(len(experts))) - {rank for rank, _ in late}
        self.moe([ExpertRows(experts[rank], rank, 1) for rank in ready], x, tokens, y, activation)
        for rank, ticket in late:
            assert pending is not None
            pending.wait(ticket)
            self.moe([ExpertRows(experts[rank], rank, 1)], x, tokens, y, activation)
        return self.combine(y, np.arange(len(experts))[None], weights)

    def combine(self, y: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if rows.shape != weights.shape:
            raise ValueError(f"rows: expected {list(weights.shape)}, got {list(rows.shape)}")
        if (rows >= len(y)).any():
            raise ValueError(f"rows: {int(rows.max())} is not below {len(y)}")
        out = np.zeros((len(rows), y.shape[1]), np.float32)
        for rank in range(rows.shape[1]):
            here = rows[:, rank] >= 0
            out[here] += weights[here, rank, None] * y[rows[here, rank]]
        return out

    def matmul(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(f"x: expected {weight.shape[1]} columns, got {x.shape[-1]}")
        step = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
        parts = (weight[first : first + step] for first in range(0, len(weight), step))
        wide = (tiers.widen_bf16(part) if part.dtype == np.uint16 else part for part in parts)
        return np.concatenate([x @ part.T for part in wide], axis=-1)

    def activate(self, gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
        if gate.shape != up.shape:
            raise ValueError(f"up: expected {list(gate.shape)}, got {list(up.shape)}")
        return _gated(activation, gate, up)

    def route(
        self,
        logits: np.ndarray,
        router: RouterSpec,
        select: np.ndarray | None = None,
        scale: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        return choose_experts(logits, router, select, scale)

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps))
        normed: np.ndarray = weight * (x * scale)
        return normed

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> np.ndarray:
        normed = self.norm(x - x.mean(-1, keepdims=True), weight, eps)
        return normed if bias is None else normed + bias

    def rotate(self, x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
        turning = x[..., : cosines.shape[1]]
        half = turning.shape[-1] // 2
        turned = np.concatenate((-turning[..., half:], turning[..., :half]), axis=-1)
        turning *= cosines[:, None]
        turning += turned * sines[:, None]
        return x

    def attend(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        cache: KVCache,
        start: int,
        window: int | None = None,
        weigh: bool = False,
        sinks: np.ndarray | None = None,
        chunk: int | None = None,
        pause: Callable[[], None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        cache.write(start, k, v)
        k, v = cache.read(start + q.shape[1])
        sight = Sight(window, chunk)
        mass = received(q, k, start, sight, sinks) if weigh else None
        return attention(q, k, v, start, sight, sinks), mass

    def gated_delta(
        self, spec: GatedDeltaSpec, mixed: np.ndarray, rates: np.ndarray, weights: DeltaWeights, state: DeltaArrays
    ) -> np.ndarray:
        return gated_delta(spec, mixed, rates, weights, state)

    def linear(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
        _check_input(x, layout.matrices["weight"].cols)
        return _product(_arrays(layout, tier, segments), layout.matrices["weight"], tier, x)

    def embed(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], ids: np.ndarray) -> np.ndarray:
        where = layout.matrices["weight"]
        outside = ids[(ids < 0) | (ids >= where.rows)]
        if outside.size:
            raise ValueError(f"ids: {int(outside[0])} is not below {where.rows}")
        if not ids.size:
            return np.empty((0, where.cols), np.float32)
        return _rows(_arrays(layout, tier, segments), where, tier, ids)

    def dequantize(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], name: str) -> np.ndarray:
        return tiers.dequantize(_arrays(layout, tier, segments), layout.matrices[name], tier)

    def decode_stack(self, layers: object, activation: str) -> None:
        return None

    def resident_table(self, layers: int, experts: int, ladder: Sequence[int]) -> None:
        return None

    def attention_bytes(self, heads: int, kv_heads: int, head_dim: int, tokens: int, context: int) -> int:
        """Return the bytes of one head's scores with their temporaries, and of keys and values as float32."""
        return 4 * context * (3 * tokens + 2 * kv_heads * head_dim)

    def product_bytes(self) -> int:
        return 4 * 8 * WEIGHTS_AT_ONCE

    def kept_bytes(self, tokens: int, expert_width: int, widest: int) -> int:
        return 0


def _gated(activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return act(gate) * up, or what `clamped_swiglu` says, [T, n]."""
    clamped = clamped_parameters(activation)
    if clamped is not None:
        alpha, limit = (np.float32(value) for value in clamped)
        gate, up = np.minimum(gate, limit), up.clip(-limit, limit)
        with np.errstate(over="ignore"):
            glu: np.ndarray = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
        return glu
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}': expected {', '.join(ACTIVATIONS)}")
    y: np.ndarray = ACTIVATIONS[activation](gate) * up
    return y


def _ffn(expert: PreparedExpert, x: np.ndarray, activation: str) -> np.ndarray:
    """Return one expert's output; x [T, H] -> [T, H]."""
    layout, tier = expert.layout, expert.tier
    arrays = _arrays(layout, tier, expert.segments)

    def product(name: str, x: np.ndarray) -> np.ndarray:
        y, bias = _product(arrays, layout.matrices[name], tier, x), layout.vectors.get(f"{name}_bias")
        return y if bias is None else y + tiers.vector_of(arrays, bias)

    return product("down", _gated(activation, product("gate", x), product("up", x)))


def _arrays(layout: RecordLayout, tier: int, segments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the segments that `tier` needs, or raise ValueError."""
    if tier not in layout.ladder:
        raise ValueError(f"tier {tier}: the tiers of this record are {', '.join(map(str, layout.ladder))}")
    needed = layout.segment_bytes[: layout.segments_of(tier)]
    if len(segments) < len(needed):
        raise ValueError(f"tier {tier} needs {len(needed)} segments, got {len(segments)}")
    return [_array(i, segments[i]) for i in range(len(needed))]


def _array(index: int, segment: np.ndarray) -> np.ndarray:
    if segment.dtype != np.uint8 or segment.ndim != 1:
        raise ValueError(f"segment {index}: expected uint8 with 1 dimension")
    return segment


def _check_input(x: np.ndarray, cols: int) -> None:
    if x.ndim != 2 or x.shape[1] != cols or x.dtype != np.float32:
        raise ValueError(f"x: expected float32 of shape [*, {cols}], got {x.dtype} of {list(x.shape)}")


def _product(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int, x: np.ndarray) -> np.ndarray:
    """Return x @ W.T; only a few rows of W are float32 at a time, so that a large matrix takes little memory."""
    if where.grid == TRELLIS:
        y: np.ndarray = x @ tiers.dequantize(segments, where, tier).T  # a row needs those above it
        return y
    step = max(1, WEIGHTS_AT_ONCE // where.cols)
    rows = np.arange(where.rows)
    parts = (_rows(segments, where, tier, rows[i : i + step]) for i in rows[::step])
    return np.concatenate([x @ part.T for part in parts], axis=-1)


def _rows(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int, ids: np.ndarray) -> np.ndarray:
    """Return the rows `ids` of a matrix, float32 [len(ids), cols]."""
    if where.grid == TRELLIS:
        rows: np.ndarray = tiers.dequantize(segments, where, tier)[ids]  # a row needs those above it
        return rows
    few = tiers.make_layout({"weight": (len(ids), where.cols)}, where.ladder, grid=where.grid).matrices["weight"]
    return tiers.dequantize(_take_rows(segments, where, few, ids), few, tier)


def _take_rows(
    segments: Sequence[np.ndarray], where: MatrixLayout, few: MatrixLayout, ids: np.ndarray
) -> list[np.ndarray]:
    """Return segments that hold the rows `ids` of the matrix at `where`, laid out as `few`."""
    pairs = [p for p in zip(_parts(where), _parts(few), strict=True) if p[0].segment < len(segments)]
    taken = [np.zeros(max(to.offset + to.nbytes for _, to in pairs), np.uint8) for _ in segments]
    for source, to in pairs:
        rows = segments[source.segment][source.offset : source.offset + source.nbytes].reshape(where.rows, -1)
        taken[to.segment][to.offset : to.offset + to.nbytes] = rows[ids].reshape(-1)
    return taken


def _parts(where: MatrixLayout) -> list[Part]:
    return [*(plane.part for plane in where.planes), *where.scale_indices, where.multiplier]
