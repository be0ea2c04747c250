"""Grids of nested tiers: the scales that a block may have, where its codes start, and how scales are stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dymoe_runtime import kernels
from dymoe_runtime.kernels.descent import Grid
from dymoe_runtime.kernels.descent_reference import nearest_codes
from dymoe_runtime.tiers import BLOCK, FINE_STEPS, MOST_CURVED, STEPS, blocks_of, levels_of, unit_of

# Weight of a tier's squared error against that of the highest, which is 4^(t - T) of it at equal
# shares. On the reference model 1.6 and 0.8 lower KL at 2 bits by 5% and raise it at 4 bits by
# 10%; between them mixed points are best, and no tier is far behind one that is stored alone.
LOWEST_SHARE = 0.8
BETWEEN_SHARE = 0.5
# Scales tried per block: that at which the largest level is the largest magnitude, times CLIPS; for
# curved levels that, and those at which their root mean square is the block's, times SPREADS. On the
# reference model better than seven clips.
CLIPS = (1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57)
SPREADS = (0.88, 1.0, 1.14)
# About the root mean square of the curved levels that normal weights get.
LEVELS_RMS = {2: 16.2, 3: 9.5, 4: 11.5}
# From six bits on no clipping is tried and no codes are descended: rounding is as good.
FINE = 6
# Room above the largest scale of a row for what the descent makes of it.
HEADROOM = 1.0


def tier_weights(ladder: Sequence[int]) -> tuple[float, ...]:
    """Weight of each tier's squared error in the joint loss, 1 for the highest."""
    top = ladder[-1]
    lower = [BETWEEN_SHARE * 4.0 ** (tier - top) for tier in ladder[:-1]]
    return (*([lower[0] * LOWEST_SHARE / BETWEEN_SHARE, *lower[1:]] if lower else []), 1.0)


def start_grids(
    weight: torch.Tensor, ladder: tuple[int, ...], importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [rows, cols] and scales [tiers, rows, blocks] of the best of a few grids in each block."""
    top = ladder[-1]
    importance = importance / importance.mean().clamp_min(1e-30)
    starts = scales_to_try(weight, top)
    codes, scales = kernels.fit(weight, Grid(ladder, tier_weights(ladder), importance, starts))
    if top >= FINE:
        # Least squares of a grid that clips nothing may clip; it keeps its own scale.
        scales[-1] = starts[0]
        codes = rounded(weight, starts[0], top)
    return codes, scales


def scales_to_try(weight: torch.Tensor, top: int) -> torch.Tensor:
    """Scales of the top tier to try, [starts, rows, blocks]; the first clips nothing."""
    rows, cols = weight.shape
    blocks = F.pad(weight, (0, blocks_of(cols) * BLOCK - cols)).view(rows, -1, BLOCK)
    largest = blocks.abs().amax(dim=-1) / float(levels_of(top, top)[-1])
    if top > MOST_CURVED:
        return torch.stack([largest * clip for clip in (CLIPS if top < FINE else CLIPS[:1])])
    counts = torch.full((blocks.shape[1],), BLOCK)
    counts[-1] = cols - (len(counts) - 1) * BLOCK
    usual = (blocks.square().sum(-1) / counts).sqrt() / LEVELS_RMS[top]
    return torch.stack([largest, *(usual * spread for spread in SPREADS)])


def rounded(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [rows, cols] nearest at scales [rows, blocks] of even levels."""
    stored = scales.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]
    return nearest_codes(weight[..., None], stored, bits)[..., 0]


def multiplier_of(scales: torch.Tensor, ladder: tuple[int, ...]) -> torch.Tensor:
    """bf16 [rows] that lets the steps come closest to all scales [tiers, rows, blocks] of each row.

    The largest scale goes to the top of the fine steps or, where it is an outlier, to a coarse one.
    """
    in_top = scales / units_of(ladder)[:, None, None]
    largest = in_top.amax(dim=(0, 2)) * HEADROOM
    best, least = torch.empty(0), torch.empty(0)
    for step in STEPS[FINE_STEPS:].tolist():
        # bf16 keeps 8 bits; rounding up keeps the largest scale within reach.
        multiplier = (largest / step * (1 + 2**-7)).to(torch.bfloat16)
        units = multiplier.float()[None].expand(len(ladder), -1)
        stored = torch.from_numpy(STEPS)[nearest_steps(in_top, units).long()] * units[:, :, None]
        off = torch.where(in_top > 0, stored / in_top.clamp_min(1e-38) - 1, 0.0).square().sum(dim=(0, 2))
        if not len(best):
            best, least = multiplier, off
        # A coarse step is for outliers: it must be worth more than rounding.
        better = off < 0.8 * least
        best, least = torch.where(better, multiplier, best), torch.where(better, off, least)
    return best


def units_of(ladder: Sequence[int]) -> torch.Tensor:
    """unit_of each tier, float32 [tiers]."""
    return torch.tensor([unit_of(tier, ladder[-1]) for tier in ladder])


def nearest_steps(scales: torch.Tensor, units: torch.Tensor, up: bool = False) -> torch.Tensor:
    """Indices uint8 [tiers, rows, blocks] of the steps nearest to `scales`, or not below them; 0 only for zero."""
    relative = scales / units.clamp_min(1e-38)[:, :, None]
    sizes = torch.from_numpy(STEPS[1:])
    between = sizes[:-1] if up else (sizes[:-1] + sizes[1:]) / 2
    steps = torch.bucketize(relative, between * (1 + 1e-6)) + 1
    return torch.where((scales > 0) & (units[:, :, None] > 0), steps, 0).to(torch.uint8)
