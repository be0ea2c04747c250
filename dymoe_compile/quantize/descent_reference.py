"""The descent in plain torch: slow, and the reference for the compiled code."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dymoe_compile.quantize import trellis_reference
from dymoe_compile.quantize.descent import Descent, Grid
from dymoe_runtime.bundle import tiers
from dymoe_runtime.bundle.tiers import TRELLIS

# Curvatures below this count as zero.
TINY = 1e-30
# Weights that `fit` handles at a time; its temporaries take about six times their size.
WEIGHTS_AT_ONCE = 1 << 17


class ReferenceDescent:
    """`DescentKernels` in plain torch."""

    def fit(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
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

    def descend(self, block: Descent) -> None:
        if block.grid == TRELLIS:
            return trellis_reference.descend(block)
        for tier in range(len(block.ladder)):
            _fit_scale(block, tier)
        for column in range(block.columns.start, block.columns.stop):
            _choose_codes(block, column)
        if block.last:
            for tier in range(len(block.ladder)):
                _fit_scale(block, tier)


def nearest_codes(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of the levels nearest to w / scale, uint8 [..., cols].

    w is [..., cols], scale is [...]. Where scale is 0, w / scale counts as 0.
    """
    relative = w * torch.where(scale > 0, 1 / scale, 0.0)[..., None]
    if bits > tiers.MAX_CURVED:
        return relative.add_(2 ** (bits - 1)).floor_().clamp_(0, 2**bits - 1).to(torch.uint8)
    levels = torch.from_numpy(tiers.levels_of(bits, bits))
    return torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2, out_int32=True, right=True).to(torch.uint8)


def _best_scales(w: torch.Tensor, q: torch.Tensor, grid: Grid, starts: torch.Tensor) -> torch.Tensor:
    """Return the scales [tiers, rows, blocks] of the start with the least loss in each block.

    w is [rows, blocks, 64]. q [blocks, 64] is the importance of each column.
    """
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
    """Return the least-squares scale of `tier` for codes of tier `top`, and its weighted squared error.

    Both are [rows, blocks].
    """
    levels = torch.from_numpy(tiers.levels_of(tier, top))[codes.int() >> (top - tier)]
    weighted = levels * q
    across, square = (weighted * w).sum(-1), (weighted * levels).sum(-1)
    scale = torch.where(square > 0, across / square.clamp_min(TINY), 0.0).clamp_min_(0.0)
    return scale, (q * w * w).sum(-1) - 2 * scale * across + scale * scale * square


def _fit_scale(block: Descent, t: int) -> None:
    """Set each row's scale at the tier with index `t` to the one of least error for the current codes."""
    columns, scale = block.columns, block.scales[t]
    levels = block.levels(block.codes[:, columns], t)  # [rows, cols]
    curve = levels @ block.hessian[columns, columns]
    square = (curve * levels).sum(-1)
    moved = scale - (block.slope[t] * levels).sum(-1) / square.clamp_min(TINY)
    keep = ~(moved > 0) | ~(square > TINY) | (scale == 0)
    moved = torch.where(keep, scale, moved)
    if block.units is not None:
        sizes = block.units[t, :, None] * torch.from_numpy(tiers.SCALE_SIZES[1:])
        nearest = (sizes - moved[:, None]).abs().argmin(-1, keepdim=True)
        moved = torch.where(scale == 0, 0.0, sizes.gather(1, nearest)[:, 0])
    change = (moved - scale)[:, None]
    block.slope[t] += change * curve
    block.error[t][:, columns] += change * levels
    block.scales[t] = moved


def _choose_codes(block: Descent, column: int) -> None:
    """Give each row the code of `column` with the least error over all tiers, given all other codes."""
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
