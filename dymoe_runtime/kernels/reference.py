"""The operations on records in plain torch, with float activations: slow, and what the kernels must equal.

Arrays come and go as NumPy's, whose memory torch shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dymoe_runtime import tiers
from dymoe_runtime.activations import ACTIVATIONS, Activation
from dymoe_runtime.attention import attention, received
from dymoe_runtime.kernels.descent_reference import WEIGHTS_AT_ONCE
from dymoe_runtime.kernels.descent_reference import descend as descend
from dymoe_runtime.kernels.descent_reference import fit as fit
from dymoe_runtime.kernels.job import Coming, Expert, Job
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.memory import Place, memory_at
from dymoe_runtime.tiers import MatrixLayout, Part, RecordLayout

isa = "torch"
threads = torch.get_num_threads
set_threads = torch.set_num_threads


def prepare(layout: RecordLayout, tier: int, segments: Sequence[np.ndarray]) -> Expert:
    _arrays(layout, tier, segments)  # checks them
    return Expert(layout, tier, segments)


def prepare_at(layout: RecordLayout, tier: int, places: Sequence[Place]) -> Expert:
    return prepare(layout, tier, [memory_at(place) for place in places])


def moe(
    jobs: Sequence[Job],
    x: np.ndarray,
    tokens: np.ndarray,
    y: np.ndarray,
    activation: str = "silu",
) -> None:
    function = _function(activation)
    for job in jobs:
        _check_input(x, job.expert.layout.matrices["gate"].cols)
        rows = slice(job.first, job.first + job.rows)
        if not 0 <= rows.start <= rows.stop <= len(y):
            raise ValueError(f"jobs: rows {rows.start}..{rows.stop} are not in 0..{len(y)}")
        wanted = tokens[rows]
        if ((wanted < 0) | (wanted >= len(x))).any():
            raise ValueError(f"tokens: {wanted.tolist()} are not all below {len(x)}")
        y[rows] = _ffn(job.expert, torch.from_numpy(x[wanted]), function).numpy()


def _function(activation: str) -> Activation:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}': expected {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def _ffn(expert: Expert, x: torch.Tensor, function: Activation) -> torch.Tensor:
    """[T, H] -> [T, H]."""
    layout, tier = expert.layout, expert.tier
    arrays = _arrays(layout, tier, expert.segments)
    hidden = function(_product(arrays, layout.matrices["gate"], tier, x))  # [T, I]
    hidden *= _product(arrays, layout.matrices["up"], tier, x)
    return _product(arrays, layout.matrices["down"], tier, hidden)


def moe_token(
    experts: Sequence[Expert], x: np.ndarray, gates: np.ndarray, activation: str = "silu", coming: Coming | None = None
) -> np.ndarray:
    if x.shape[0] != 1 or gates.shape != (1, len(experts)):
        raise ValueError(f"x: expected one token and a gate for each expert, got {list(x.shape)}, {list(gates.shape)}")
    y, tokens = np.empty((len(experts), x.shape[1]), np.float32), np.zeros(len(experts), np.int64)
    late = [] if coming is None else coming.tickets
    there = set(range(len(experts))) - {rank for rank, _ in late}
    moe([Job(experts[rank], rank, 1) for rank in there], x, tokens, y, activation)
    for rank, ticket in late:
        assert coming is not None
        coming.wait(ticket)
        moe([Job(experts[rank], rank, 1)], x, tokens, y, activation)
    return combine(y, np.arange(len(experts))[None], gates)


def combine(y: np.ndarray, rows: np.ndarray, gates: np.ndarray) -> np.ndarray:
    if rows.shape != gates.shape:
        raise ValueError(f"rows: expected {list(gates.shape)}, got {list(rows.shape)}")
    if (rows >= len(y)).any():
        raise ValueError(f"rows: {int(rows.max())} is not below {len(y)}")
    out = np.zeros((len(rows), y.shape[1]), np.float32)
    for rank in range(rows.shape[1]):
        here = rows[:, rank] >= 0
        out[here] += gates[here, rank, None] * y[rows[here, rank]]
    return out


def matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected {weight.shape[1]} columns, got {x.shape[-1]}")
    tokens, step = torch.from_numpy(x), max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    parts = (weight[first : first + step] for first in range(0, len(weight), step))
    wide = (tiers.widen_bf16(part) if part.dtype == np.uint16 else part for part in parts)
    return torch.cat([tokens @ torch.from_numpy(part).T for part in wide], dim=-1).numpy()


def activate(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    if gate.shape != up.shape:
        raise ValueError(f"up: expected {list(gate.shape)}, got {list(up.shape)}")
    return (_function(activation)(torch.from_numpy(gate)) * torch.from_numpy(up)).numpy()


def choose(logits: np.ndarray, top_k: int, norm_topk: bool) -> tuple[np.ndarray, np.ndarray]:
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"gates: expected 1..{logits.shape[-1]} columns")
    gates, experts = torch.from_numpy(logits).softmax(dim=-1).topk(top_k, dim=-1)
    if norm_topk:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return experts.numpy(), gates.numpy()


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    values = torch.from_numpy(x)
    scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (torch.from_numpy(weight) * (values * scale)).numpy()


def rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    turned = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    x *= cosines[:, None]
    x += turned * sines[:, None]
    return x


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cache: KVCache,
    layer: int,
    window: int | None = None,
    weigh: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    start = cache.length
    cache.write(layer, start, k, v)
    k, v = cache.read(layer, start + q.shape[1])
    mass = received(q, k, start, window) if weigh else None
    return attention(q, k, v, start, window), mass


def linear(layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
    _check_input(x, layout.matrices["weight"].cols)
    arrays, where = _arrays(layout, tier, segments), layout.matrices["weight"]
    return _product(arrays, where, tier, torch.from_numpy(x)).numpy()


def embed(layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], ids: np.ndarray) -> np.ndarray:
    where = layout.matrices["weight"]
    outside = ids[(ids < 0) | (ids >= where.rows)]
    if outside.size:
        raise ValueError(f"ids: {int(outside[0])} is not below {where.rows}")
    if not ids.size:
        return np.empty((0, where.cols), np.float32)
    return _rows(_arrays(layout, tier, segments), where, tier, ids)


def dequantize(layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], name: str) -> np.ndarray:
    return tiers.dequantize(_arrays(layout, tier, segments), layout.matrices[name], tier)


def _arrays(layout: RecordLayout, tier: int, segments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The segments that `tier` needs, or ValueError."""
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


def _product(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int, x: torch.Tensor) -> torch.Tensor:
    """x @ W.T, a few rows of W in float at a time, so that a large matrix takes little memory."""
    step = max(1, WEIGHTS_AT_ONCE // where.cols)
    rows = np.arange(where.rows)
    parts = (_rows(segments, where, tier, rows[i : i + step]) for i in rows[::step])
    return torch.cat([x @ torch.from_numpy(part).T for part in parts], dim=-1)


def _rows(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int, ids: np.ndarray) -> np.ndarray:
    """Rows `ids` of a matrix, float32 [len(ids), cols]."""
    few = tiers.make_layout({"weight": (len(ids), where.cols)}, where.ladder).matrices["weight"]
    return tiers.dequantize(_take_rows(segments, where, few, ids), few, tier)


def _take_rows(
    segments: Sequence[np.ndarray], where: MatrixLayout, few: MatrixLayout, ids: np.ndarray
) -> list[np.ndarray]:
    """Segments that hold the rows `ids` of the matrix at `where`, laid out as `few`."""
    pairs = [p for p in zip(_parts(where), _parts(few), strict=True) if p[0].segment < len(segments)]
    taken = [np.zeros(max(to.offset + to.nbytes for _, to in pairs), np.uint8) for _ in segments]
    for source, to in pairs:
        rows = segments[source.segment][source.offset : source.offset + source.nbytes].reshape(where.rows, -1)
        taken[to.segment][to.offset : to.offset + to.nbytes] = rows[ids].reshape(-1)
    return taken


def _parts(where: MatrixLayout) -> list[Part]:
    return [*(plane.part for plane in where.planes), *where.steps, where.multiplier]
