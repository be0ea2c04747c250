"""The operations on records in plain torch, with float activations: slow, and what the kernels must equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_runtime import tiers
from dymoe_runtime.activations import ACTIVATIONS
from dymoe_runtime.attention import attention, received
from dymoe_runtime.kernels.descent import Descent, Grid
from dymoe_runtime.kernels.job import Expert, Job
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.memory import Place, memory_at
from dymoe_runtime.tiers import MatrixLayout, Part, RecordLayout

# Weights of a matrix that are in float at a time, each with about six times its size beside it.
WEIGHTS_AT_ONCE = 1 << 17

# Curvatures below this are those of nothing.
TINY = 1e-30

isa = "torch"
threads = torch.get_num_threads
set_threads = torch.set_num_threads


def prepare(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor]) -> Expert:
    _arrays(layout, tier, segments)  # checks them
    return Expert(layout, tier, segments)


def prepare_at(layout: RecordLayout, tier: int, places: Sequence[Place]) -> Expert:
    return prepare(layout, tier, [memory_at(place) for place in places])


def moe(
    jobs: Sequence[Job],
    x: torch.Tensor,
    tokens: torch.Tensor,
    y: torch.Tensor,
    activation: str = "silu",
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}': expected {', '.join(ACTIVATIONS)}")
    for job in jobs:
        _check_input(x, job.expert.layout.matrices["gate"].cols)
        rows = slice(job.first, job.first + job.rows)
        if not 0 <= rows.start <= rows.stop <= len(y):
            raise ValueError(f"jobs: rows {rows.start}..{rows.stop} are not in 0..{len(y)}")
        wanted = tokens[rows]
        if ((wanted < 0) | (wanted >= len(x))).any():
            raise ValueError(f"tokens: {wanted.tolist()} are not all below {len(x)}")
        y[rows] = _ffn(job.expert, x[wanted], activation)


def _ffn(expert: Expert, x: torch.Tensor, activation: str) -> torch.Tensor:
    """[T, H] -> [T, H]."""
    layout, tier = expert.layout, expert.tier
    arrays = _arrays(layout, tier, expert.segments)
    hidden = ACTIVATIONS[activation](_product(arrays, layout.matrices["gate"], tier, x))  # [T, I]
    hidden *= _product(arrays, layout.matrices["up"], tier, x)
    return _product(arrays, layout.matrices["down"], tier, hidden)


def moe_token(
    experts: Sequence[Expert], x: torch.Tensor, gates: torch.Tensor, activation: str = "silu"
) -> torch.Tensor:
    if x.shape[0] != 1 or gates.shape != (1, len(experts)):
        raise ValueError(f"x: expected one token and a gate for each expert, got {list(x.shape)}, {list(gates.shape)}")
    y = torch.empty(len(experts), x.shape[1])
    jobs = [Job(expert, row, 1) for row, expert in enumerate(experts)]
    moe(jobs, x, torch.zeros(len(experts), dtype=torch.int64), y, activation)
    return combine(y, torch.arange(len(experts))[None], gates)


def combine(y: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    if rows.shape != gates.shape:
        raise ValueError(f"rows: expected {list(gates.shape)}, got {list(rows.shape)}")
    if (rows >= len(y)).any():
        raise ValueError(f"rows: {int(rows.max())} is not below {len(y)}")
    out = torch.zeros(len(rows), y.shape[1])
    for rank in range(rows.shape[1]):
        here = rows[:, rank] >= 0
        out[here] += gates[here, rank, None] * y[rows[here, rank]]
    return out


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x.mul_(cosines[:, None]).add_(turned.mul_(sines[:, None]))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KVCache,
    layer: int,
    window: int | None = None,
    weigh: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    start = cache.length
    cache.write(layer, start, k, v)
    k, v = cache.read(layer, start + q.shape[1])
    mass = received(q, k, start, window) if weigh else None
    return attention(q, k, v, start, window), mass


def linear(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    _check_input(x, layout.matrices["weight"].cols)
    return _product(_arrays(layout, tier, segments), layout.matrices["weight"], tier, x)


def embed(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    where = layout.matrices["weight"]
    outside = ids[(ids < 0) | (ids >= where.rows)]
    if outside.numel():
        raise ValueError(f"ids: {int(outside[0])} is not below {where.rows}")
    if not ids.numel():
        return torch.empty(0, where.cols)
    return _rows(_arrays(layout, tier, segments), where, tier, ids.numpy())


def dequantize(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    return tiers.dequantize(_arrays(layout, tier, segments), layout.matrices[name], tier)


def fit(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    grid.check(weight)
    blocks, (rows, cols) = tiers.blocks_of(weight.shape[1]), weight.shape
    padding = (0, blocks * tiers.BLOCK - cols)
    q = F.pad(grid.importance, padding).view(-1, tiers.BLOCK)
    codes, scales = torch.empty(rows, cols, dtype=torch.uint8), torch.empty(len(grid.ladder), rows, blocks)
    step = max(1, WEIGHTS_AT_ONCE // (blocks * tiers.BLOCK))
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        w = F.pad(weight[some], padding).view(-1, blocks, tiers.BLOCK)
        scales[:, some] = _best_scales(w, q, grid, grid.starts[:, some])
        codes[some] = nearest_codes(w, scales[-1, some], grid.ladder[-1]).view(len(w), -1)[:, :cols]
    return codes, scales


def nearest_codes(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., cols] of the levels nearest to w / scale; w [..., cols], scale [...], 0 for none."""
    relative = w * torch.where(scale > 0, 1 / scale, 0.0)[..., None]
    if bits > tiers.MOST_CURVED:
        return relative.add_(2 ** (bits - 1)).floor_().clamp_(0, 2**bits - 1).to(torch.uint8)
    levels = tiers.levels_of(bits, bits)
    return torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2, out_int32=True, right=True).to(torch.uint8)


def _best_scales(w: torch.Tensor, q: torch.Tensor, grid: Grid, starts: torch.Tensor) -> torch.Tensor:
    """Of blocks w [rows, blocks, 64] with column importances q, the scales [tiers, rows, blocks] that lose least."""
    top = grid.ladder[-1]
    best, least = torch.empty(0), torch.full(w.shape[:-1], torch.inf)
    for start in starts:
        codes = nearest_codes(w, start, top)
        fitted = [_fit_tier(w, q, codes, tier, top) for tier in grid.ladder]
        loss = torch.stack([weight * error for weight, (_, error) in zip(grid.weights, fitted, strict=True)]).sum(0)
        scales = torch.stack([scale for scale, _ in fitted])
        best = torch.where(loss < least, scales, best) if len(best) else scales
        least = torch.minimum(loss, least)
    return best


def _fit_tier(
    w: torch.Tensor, q: torch.Tensor, codes: torch.Tensor, tier: int, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale of `tier` for codes of `top`, and the weighted squared error; [rows, blocks] each."""
    levels = tiers.levels_of(tier, top)[codes.int() >> (top - tier)]
    weighted = levels * q
    across, square = (weighted * w).sum(-1), (weighted * levels).sum(-1)
    scale = torch.where(square > 0, across / square.clamp_min(TINY), 0.0).clamp_min_(0.0)
    return scale, (q * w * w).sum(-1) - 2 * scale * across + scale * scale * square


def descend(block: Descent) -> None:
    for tier in range(len(block.ladder)):
        _fit_scale(block, tier)
    for column in range(block.columns.start, block.columns.stop):
        _choose_codes(block, column)
    if block.last:
        for tier in range(len(block.ladder)):
            _fit_scale(block, tier)


def _fit_scale(block: Descent, t: int) -> None:
    """Move each row's scale of one tier to where the error is least, given its codes."""
    columns, scale = block.columns, block.scales[t]
    levels = block.levels(block.codes[:, columns], t)  # [rows, cols]
    curve = levels @ block.hessian[columns, columns]
    square = (curve * levels).sum(-1)
    moved = scale - (block.slope[t] * levels).sum(-1) / square.clamp_min(TINY)
    keep = ~(moved > 0) | ~(square > TINY) | (scale == 0)
    moved = torch.where(keep, scale, moved)
    if block.units is not None:
        sizes = block.units[t, :, None] * torch.from_numpy(tiers.STEPS[1:])
        nearest = (sizes - moved[:, None]).abs().argmin(-1, keepdim=True)
        moved = torch.where(scale == 0, 0.0, sizes.gather(1, nearest)[:, 0])
    change = (moved - scale)[:, None]
    block.slope[t] += change * curve
    block.error[t][:, columns] += change * levels
    block.scales[t] = moved


def _choose_codes(block: Descent, column: int) -> None:
    """Give each row the code of one column that leaves the least error over all tiers, given all other codes."""
    columns = block.columns
    h = block.hessian[column, columns]
    own = block.hessian[column, column]
    levels = block.all_levels()  # [tiers, codes]
    current = levels[:, block.codes[:, column].long()]  # [tiers, rows]
    slope = block.slope[:, :, column - columns.start]
    target = block.scales * current - (slope / own if own > TINY else 0 * slope)
    weights = torch.tensor(block.weights)[:, None, None]
    errors = block.scales[:, :, None] * levels[:, None, :] - target[:, :, None]
    best = (weights * errors.square()).sum(0).argmin(-1)  # [rows]
    change = block.scales * (levels[:, best] - current)
    block.codes[:, column] = best.to(torch.uint8)
    block.slope += change[:, :, None] * h
    block.error[:, :, column] += change


def _arrays(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The segments that `tier` needs, or ValueError."""
    if tier not in layout.ladder:
        raise ValueError(f"tier {tier}: the tiers of this record are {', '.join(map(str, layout.ladder))}")
    needed = layout.segment_bytes[: layout.segments_of(tier)]
    if len(segments) < len(needed):
        raise ValueError(f"tier {tier} needs {len(needed)} segments, got {len(segments)}")
    return [_array(i, segments[i]) for i in range(len(needed))]


def _array(index: int, segment: torch.Tensor) -> np.ndarray:
    if segment.dtype != torch.uint8 or segment.dim() != 1:
        raise ValueError(f"segment {index}: expected uint8 with 1 dimension")
    return segment.numpy()


def _check_input(x: torch.Tensor, cols: int) -> None:
    if x.dim() != 2 or x.shape[1] != cols or x.dtype != torch.float32:
        raise ValueError(f"x: expected float32 of shape [*, {cols}], got {x.dtype} of {list(x.shape)}")


def _product(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int, x: torch.Tensor) -> torch.Tensor:
    """x @ W.T, a few rows of W in float at a time, so that a large matrix takes little memory."""
    step = max(1, WEIGHTS_AT_ONCE // where.cols)
    rows = np.arange(where.rows)
    return torch.cat([x @ _rows(segments, where, tier, rows[i : i + step]).T for i in rows[::step]], dim=-1)


def _rows(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int, ids: np.ndarray) -> torch.Tensor:
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
