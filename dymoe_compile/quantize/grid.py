"""Grids of nested tiers: scales to try for a block, codes to start from, and how scales are stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dymoe_compile.quantize.descent import DescentKernels, Grid
from dymoe_compile.quantize.descent_reference import nearest_codes
from dymoe_runtime.bundle.tiers import (
    BLOCK,
    FINE_SCALES,
    MAX_CURVED,
    SCALE_SIZES,
    TRELLIS,
    blocks_of,
    levels_of,
    unit_of,
)

# The squared error of a tier t below the highest tier T weighs 4^(t - T) times a share: the first for the lowest tier,
# the second for the next, and so on; the last for all that remain. On the usual grid, shares of 1.6 and 0.8 lower KL of
# the reference model at 2 bits by 5% and raise it at 4 bits by 10%. With the shares below, points that mix 2 to 4 bits
# are best, and no tier is far behind one that is stored alone.
SHARES = (0.8, 0.5)
TRELLIS_SHARES = (0.4, 1.4)
# With four tiers or more, the highest tier has less error than the dense weights. So all others may weigh more: KL of
# the reference model is 3% less at 3 and 4 bits, and 2% more at 5.
DEEP_TRELLIS_SHARES = (0.6, 2.8, 2.2)
# What the nearest codes yield is smaller than the weight, because their errors do not correlate with them. So all
# experts add too little to the residual stream, and these errors add up from layer to layer. KL of the reference model
# is least if a tier yields more by 0.3 to 0.4 times the share of its squared error: 11% less at 2 bits, 4% at 3.
TRELLIS_GAINS = {2: 1.025, 3: 1.011, 4: 1.002, 5: 1.0, 6: 1.0}
# Scales tried for each block. Even levels: the scale that maps the largest level to the largest magnitude,
# times CLIPS. Curved levels: that scale itself, and the scale that matches the root mean square of the
# levels to that of the block, times SPREADS. On the reference model this is better than seven clips.
CLIPS = (1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57)
SPREADS = (0.88, 1.0, 1.14)
# Bits -> approximate root mean square of the curved levels that normally distributed weights get.
LEVELS_RMS = {2: 16.2, 3: 9.5, 4: 11.5}
# From this many bits on no clipping is tried, and a single tier is only rounded, which is as good.
FINE = 6


def tier_weights(ladder: Sequence[int], grid: str = "") -> tuple[float, ...]:
    """Return the weight of each tier's squared error in the joint loss, 1 for the highest tier."""
    top = ladder[-1]
    shares = SHARES if grid != TRELLIS else DEEP_TRELLIS_SHARES if len(ladder) > 3 else TRELLIS_SHARES
    return (*(shares[min(i, len(shares) - 1)] * 4.0 ** (tier - top) for i, tier in enumerate(ladder[:-1])), 1.0)


def usual_scales(weight: torch.Tensor, ladder: tuple[int, ...]) -> torch.Tensor:
    """Return the scales with which the trellis grid suits normal weights, [tiers, rows, blocks].

    weight is float32 [rows, cols]. Levels times the unit of their tier have a root mean square of about 1.
    """
    rows, cols = weight.shape
    blocks = F.pad(weight, (0, blocks_of(cols) * BLOCK - cols)).view(rows, -1, BLOCK)
    counts = torch.full((blocks.shape[1],), BLOCK)
    counts[-1] = cols - (len(counts) - 1) * BLOCK
    return (blocks.square().sum(-1) / counts).sqrt() * units_of(ladder, TRELLIS)[:, None, None]


def start_grids(
    weight: torch.Tensor, ladder: tuple[int, ...], importance: torch.Tensor, descent: DescentKernels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes uint8 [rows, cols] and scales float32 [tiers, rows, blocks], from the best of a few grids per block.

    weight is float32 [rows, cols]. importance [cols] is the weight of each column's squared error.
    """
    top = ladder[-1]
    importance = importance / importance.mean().clamp_min(1e-30)
    starts = scales_to_try(weight, top)
    codes, scales = descent.fit(weight, Grid(ladder, tier_weights(ladder), importance, starts))
    if top >= FINE:
        # A scale refitted by least squares may clip, so keep the scale that clips nothing.
        scales[-1] = starts[0]
        codes = rounded(weight, starts[0], top)
    return codes, scales


def scales_to_try(weight: torch.Tensor, top: int) -> torch.Tensor:
    """Return scales to try for the highest tier, [starts, rows, blocks]; the first clips nothing."""
    rows, cols = weight.shape
    blocks = F.pad(weight, (0, blocks_of(cols) * BLOCK - cols)).view(rows, -1, BLOCK)
    largest = blocks.abs().amax(dim=-1) / float(levels_of(top, top)[-1])
    if top > MAX_CURVED:
        return torch.stack([largest * clip for clip in (CLIPS if top < FINE else CLIPS[:1])])
    counts = torch.full((blocks.shape[1],), BLOCK)
    counts[-1] = cols - (len(counts) - 1) * BLOCK
    usual = (blocks.square().sum(-1) / counts).sqrt() / LEVELS_RMS[top]
    return torch.stack([largest, *(usual * spread for spread in SPREADS)])


def rounded(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest codes at scales [rows, blocks] of even levels, uint8 [rows, cols]."""
    stored = scales.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]
    return nearest_codes(weight[..., None], stored, bits)[..., 0]


def multiplier_of(scales: torch.Tensor, ladder: tuple[int, ...], grid: str = "") -> torch.Tensor:
    """Return the multipliers bf16 [rows] with which stored scales come closest to scales [tiers, rows, blocks].

    The largest scale of a row maps to the largest fine size or, if it is an outlier, to a coarse size.
    """
    in_top = scales / units_of(ladder, grid)[:, None, None]
    largest = in_top.amax(dim=(0, 2))
    best, least = torch.empty(0), torch.empty(0)
    for step in SCALE_SIZES[FINE_SCALES:].tolist():
        # bf16 keeps 8 bits; rounding up keeps the largest scale in range.
        multiplier = (largest / step * (1 + 2**-7)).to(torch.bfloat16)
        units = multiplier.float()[None].expand(len(ladder), -1)
        stored = torch.from_numpy(SCALE_SIZES)[nearest_scale_indices(in_top, units).long()] * units[:, :, None]
        off = torch.where(in_top > 0, stored / in_top.clamp_min(1e-38) - 1, 0.0).square().sum(dim=(0, 2))
        if not len(best):
            best, least = multiplier, off
        # A coarse size is for outliers: its gain must exceed rounding differences.
        better = off < 0.8 * least
        best, least = torch.where(better, multiplier, best), torch.where(better, off, least)
    return best


def units_of(ladder: Sequence[int], grid: str = "") -> torch.Tensor:
    """Return the unit with which each tier is fitted, float32 [tiers]: `unit_of` without its gain."""
    gains = TRELLIS_GAINS if grid == TRELLIS else dict.fromkeys(ladder, 1.0)
    return torch.tensor([unit_of(tier, ladder[-1], grid) / gains[tier] for tier in ladder])


def nearest_scale_indices(scales: torch.Tensor, units: torch.Tensor, up: bool = False) -> torch.Tensor:
    """Return the indices of the sizes nearest to `scales` in `units` [tiers, rows], uint8 [tiers, rows, blocks].

    With `up`, sizes below their scale do not count. Index 0 is only for a scale or unit of zero.
    """
    relative = scales / units.clamp_min(1e-38)[:, :, None]
    sizes = torch.from_numpy(SCALE_SIZES[1:])
    between = sizes[:-1] if up else (sizes[:-1] + sizes[1:]) / 2
    indices = torch.bucketize(relative, between * (1 + 1e-6)) + 1
    return torch.where((scales > 0) & (units[:, :, None] > 0), indices, 0).to(torch.uint8)
