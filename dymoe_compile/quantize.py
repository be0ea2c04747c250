"""Nested tiers of one matrix: one code per weight whose top bits serve every lower tier.

First the grid of each block of 64 is chosen jointly: among a few scales, the one with
the least weighted error summed over the tiers, where each tier's scale is refitted by least
squares to the codes that it inherits. Then coordinate descent improves codes and scales for
what the matrix is used for: with H the mean outer product of its inputs, it lowers the sum
over tiers of weight * trace(E H E^T), each tier with an error E of its own. That is the aim
of GPTQ (arXiv 2210.17323), solved as in QuantEase (arXiv 2309.01885), for all tiers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_runtime import kernels
from dymoe_runtime.kernels.descent import Descent, Grid
from dymoe_runtime.kernels.reference import nearest_codes
from dymoe_runtime.tiers import (
    BLOCK,
    FINE_STEPS,
    MOST_CURVED,
    STEPS,
    QuantizedMatrix,
    blocks_of,
    levels_of,
    tier_scales,
    unit_of,
)


def _has_bf16() -> bool:
    """Whether products in bfloat16 are fast here; older releases of torch cannot tell."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16"))


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
# Passes of the descent over all columns; the first with free scales, the last from the last column to the first.
SWEEPS = 3
# Ridge on H relative to its mean diagonal: this many times columns over samples, at least the second.
RIDGE_PER_SAMPLE = 1.4
LEAST_RIDGE = 0.01
# Room above the largest scale of a row for what the descent makes of it.
HEADROOM = 1.0
# Columns whose slopes are computed at once: narrow products are slow.
PULL = 4 * BLOCK
# Slopes are sums over all columns; eight bits of each term are enough to choose codes by.
PULL_DTYPE = torch.bfloat16 if _has_bf16() else torch.float32
# Weights that are in float at a time where there is nothing to descend.
WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Moments:
    """Second moments of what multiplies a matrix: `hessian` [cols, cols] is the weighted sum of x x^T."""

    hessian: torch.Tensor
    samples: int

    @property
    def enough(self) -> bool:
        """Whether there are at least as many samples as columns; with fewer, H says little of other texts."""
        return self.samples >= len(self.hessian)

    def ridged(self) -> torch.Tensor:
        """H with a ridge that shrinks as samples grow, scaled to a mean diagonal of 1."""
        mean = self.hessian.diagonal().mean().clamp_min(1e-30)
        ridge = max(LEAST_RIDGE, RIDGE_PER_SAMPLE * len(self.hessian) / self.samples)
        scaled = self.hessian / mean
        scaled.diagonal().add_(ridge)
        return scaled


def quantize_matrix(weight: torch.Tensor, ladder: Sequence[int], moments: Moments | None = None) -> QuantizedMatrix:
    """Quantize weight [rows, cols] to all tiers of `ladder` for inputs of these `moments`.

    Without moments, or with too few samples, all columns count alike.
    """
    ladder = tuple(ladder)
    if moments is not None and moments.enough and not _only_rounded(ladder):
        return _Descending(weight, ladder, moments.ridged()).run()
    # Rows do not meet, and all of an embedding in float would be too much.
    parts = weight.split(max(1, WEIGHTS_AT_ONCE // weight.shape[1]))
    if _only_rounded(ladder):
        return _joined([_round_only(part, ladder[0]) for part in parts])
    return _joined([_Descending(part, ladder, None).run() for part in parts])


def _only_rounded(ladder: tuple[int, ...]) -> bool:
    return len(ladder) == 1 and ladder[0] >= FINE


def _joined(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """One matrix of the rows of all."""
    steps = {tier: np.concatenate([part.steps[tier] for part in parts]) for tier in parts[0].steps}
    return QuantizedMatrix(
        np.concatenate([part.codes for part in parts]), steps, torch.cat([part.multiplier for part in parts])
    )


def quantize_expert(
    weights: Mapping[str, torch.Tensor], ladder: Sequence[int], moments: Mapping[str, Moments] | None = None
) -> dict[str, QuantizedMatrix]:
    """quantize_matrix for each matrix of an expert; `moments` by matrix name."""
    moments = moments or {}
    return {name: quantize_matrix(weight, ladder, moments.get(name)) for name, weight in weights.items()}


def tier_weights(ladder: Sequence[int]) -> tuple[float, ...]:
    """Weight of each tier's squared error in the joint loss, 1 for the highest."""
    top = ladder[-1]
    lower = [BETWEEN_SHARE * 4.0 ** (tier - top) for tier in ladder[:-1]]
    return (*([lower[0] * LOWEST_SHARE / BETWEEN_SHARE, *lower[1:]] if lower else []), 1.0)


class _Descending:
    """Coordinate descent on one matrix; columns are padded to whole blocks, which H leaves out."""

    def __init__(self, weight: torch.Tensor, ladder: tuple[int, ...], hessian: torch.Tensor | None) -> None:
        self._ladder = ladder
        self._cols = weight.shape[1]
        self._hessian = torch.eye(self._cols) if hessian is None else hessian
        self._diagonal = hessian is None
        self._weight = weight.float().contiguous()
        codes, scales = _start(self._weight, ladder, self._hessian.diagonal().contiguous())
        self._codes, self._scales = codes, scales  # uint8 [rows, cols], [tiers, rows, blocks]
        self._rough_hessian = self._hessian.to(PULL_DTYPE)
        self._error = self._rough_error = torch.empty(0)
        self._backward = False
        # Start of a group of columns -> what the columns already visited give to its slopes. The next pass goes
        # the other way and visits them after the group, so that half of its products are at hand
        # (Conrad and Wallach, Alternating methods for sets of linear equations, 1979).
        self._visited: dict[int, torch.Tensor] = {}
        self._take_error()

    def run(self) -> QuantizedMatrix:
        self._sweep(None)
        multiplier = _multiplier(self._scales, self._ladder)
        units = (multiplier.float()[None] * _units(self._ladder)[:, None]).contiguous()
        self._snap(units)
        for sweep in range(1, SWEEPS):
            self._sweep(units, last=sweep == SWEEPS - 1)
            self._backward = not self._backward
        steps = _nearest_steps(self._scales, units)
        return QuantizedMatrix(
            self._codes.numpy(), {tier: steps[i].numpy() for i, tier in enumerate(self._ladder)}, multiplier
        )

    def _sweep(self, units: torch.Tensor | None, last: bool = False) -> None:
        """Visit every block of columns once, with the slope that the codes chosen so far leave.

        The first sweep, the one with free scales, takes columns still to come for exact, as GPTQ does:
        their rounding will be chosen anew.
        """
        cols = self._cols
        starts = range(0, cols, PULL)
        for start in reversed(starts) if self._backward else starts:
            group = slice(start, min(start + PULL, cols))
            before = self._error[:, :, group].clone()
            slopes = self._slopes(group, free=units is None, last=last)
            firsts = range(group.start, group.stop, BLOCK)
            for first in reversed(firsts) if self._backward else firsts:
                columns = slice(first, min(first + BLOCK, cols))
                slope = slopes[:, :, columns.start - start : columns.stop - start]
                done = slice(columns.stop, group.stop) if self._backward else slice(start, first)
                if done.start < done.stop and not self._diagonal:
                    changed = self._error[:, :, done] - before[:, :, done.start - start : done.stop - start]
                    slope = slope + changed @ self._hessian[done, columns]
                self._visit(columns, slope.contiguous(), units, last)
            if not self._diagonal:
                self._rough_error[:, :, group] = self._error[:, :, group].to(PULL_DTYPE)

    def _slopes(self, group: slice, free: bool, last: bool) -> torch.Tensor:
        """Error times Hessian, float32 [tiers, rows, columns of the group]; rough, where that is much faster.

        With `free` scales without the columns that come after the group.
        """
        if self._diagonal:
            return self._error[:, :, group]
        before, after = slice(0, group.start), slice(group.stop, self._cols)
        if free:
            return self._product(slice(0, group.stop), group)
        visited, coming = (after, before) if self._backward else (before, after)
        mine = slice(min(group.start, coming.start), max(group.stop, coming.stop))
        known = self._visited.pop(group.start, None)
        slopes = self._product(mine, group) if known is None else self._product(group, group) + known
        passed = self._product(visited, group)
        if not last:
            self._visited[group.start] = passed
        return slopes + passed

    def _product(self, seen: slice, columns: slice) -> torch.Tensor:
        """What the error of the columns `seen` gives to the slopes of `columns`."""
        return (self._rough_error[:, :, seen] @ self._rough_hessian[seen, columns]).float()

    def _visit(self, columns: slice, slope: torch.Tensor, units: torch.Tensor | None, last: bool) -> None:
        index = columns.start // BLOCK
        scales = self._scales[:, :, index].contiguous()
        weights = tier_weights(self._ladder)
        kernels.descend(
            Descent(self._ladder, weights, columns, self._hessian, slope, units, scales, self._error, self._codes, last)
        )
        self._scales[:, :, index] = scales

    def _snap(self, units: torch.Tensor) -> None:
        """Move every scale to one that can be stored."""
        steps = _nearest_steps(self._scales, units)
        fine = self._ladder[-1] >= FINE
        if fine:
            # The nearest step may be too small, and what it clips is more than what a fine grid loses.
            steps[-1] = _nearest_steps(self._scales[-1:], units[-1:], up=True)[0]
        self._scales = torch.from_numpy(STEPS)[steps.long()] * units[:, :, None]
        if fine:
            self._codes = _nearest_codes(self._weight, self._scales[-1], self._ladder[-1])
        self._take_error()

    def _take_error(self) -> None:
        """The error of each tier, [tiers, rows, cols], from codes and scales."""
        self._error = torch.stack([self._values(t) - self._weight for t in range(len(self._ladder))])
        self._visited.clear()
        self._rough_error = self._error.to(PULL_DTYPE)

    def _values(self, t: int) -> torch.Tensor:
        """The matrix at tier number `t`."""
        tier, top = self._ladder[t], self._ladder[-1]
        levels = levels_of(tier, top)[(self._codes >> (top - tier)).int()]
        return levels * self._scales[t].repeat_interleave(BLOCK, dim=1)[:, : self._cols]


def _round_only(weight: torch.Tensor, tier: int) -> QuantizedMatrix:
    """Nearest codes of a fine grid."""
    weight = weight.float()
    scales = _starts(weight, tier)
    multiplier = _multiplier(scales, (tier,))
    steps = _nearest_steps(scales, multiplier.float()[None], up=True)[0]
    codes = _nearest_codes(weight, tier_scales(steps, multiplier, tier, tier), tier)
    return QuantizedMatrix(codes.numpy(), {tier: steps.numpy()}, multiplier)


def _start(
    weight: torch.Tensor, ladder: tuple[int, ...], importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [rows, cols] and scales [tiers, rows, blocks] of the best of a few grids in each block."""
    top = ladder[-1]
    importance = importance / importance.mean().clamp_min(1e-30)
    starts = _starts(weight, top)
    codes, scales = kernels.fit(weight, Grid(ladder, tier_weights(ladder), importance, starts))
    if top >= FINE:
        # Least squares of a grid that clips nothing may clip; it keeps its own scale.
        scales[-1] = starts[0]
        codes = _nearest_codes(weight, starts[0], top)
    return codes, scales


def _starts(weight: torch.Tensor, top: int) -> torch.Tensor:
    """Scales of the top tier to try, [starts, rows, blocks]; the first clips nothing."""
    rows, cols = weight.shape
    blocks = F.pad(weight, (0, blocks_of(cols) * BLOCK - cols)).view(rows, -1, BLOCK)
    largest = blocks.abs().amax(dim=-1) / levels_of(top, top)[-1]
    if top > MOST_CURVED:
        return torch.stack([largest * clip for clip in (CLIPS if top < FINE else CLIPS[:1])])
    counts = torch.full((blocks.shape[1],), BLOCK)
    counts[-1] = cols - (len(counts) - 1) * BLOCK
    usual = (blocks.square().sum(-1) / counts).sqrt() / LEVELS_RMS[top]
    return torch.stack([largest, *(usual * spread for spread in SPREADS)])


def _nearest_codes(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [rows, cols] nearest at scales [rows, blocks] of even levels."""
    stored = scales.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]
    return nearest_codes(weight[..., None], stored, bits)[..., 0]


def _multiplier(scales: torch.Tensor, ladder: tuple[int, ...]) -> torch.Tensor:
    """bf16 [rows] that lets the steps come closest to all scales [tiers, rows, blocks] of each row.

    The largest scale goes to the top of the fine steps or, where it is an outlier, to a coarse one.
    """
    in_top = scales / _units(ladder)[:, None, None]
    largest = in_top.amax(dim=(0, 2)) * HEADROOM
    best, least = torch.empty(0), torch.empty(0)
    for step in STEPS[FINE_STEPS:].tolist():
        # bf16 keeps 8 bits; rounding up keeps the largest scale within reach.
        multiplier = (largest / step * (1 + 2**-7)).to(torch.bfloat16)
        units = multiplier.float()[None].expand(len(ladder), -1)
        stored = torch.from_numpy(STEPS)[_nearest_steps(in_top, units).long()] * units[:, :, None]
        off = torch.where(in_top > 0, stored / in_top.clamp_min(1e-38) - 1, 0.0).square().sum(dim=(0, 2))
        if not len(best):
            best, least = multiplier, off
        # A coarse step is for outliers: it must be worth more than rounding.
        better = off < 0.8 * least
        best, least = torch.where(better, multiplier, best), torch.where(better, off, least)
    return best


def _units(ladder: Sequence[int]) -> torch.Tensor:
    """unit_of each tier, float32 [tiers]."""
    return torch.tensor([unit_of(tier, ladder[-1]) for tier in ladder])


def _nearest_steps(scales: torch.Tensor, units: torch.Tensor, up: bool = False) -> torch.Tensor:
    """Indices uint8 [tiers, rows, blocks] of the steps nearest to `scales`, or not below them; 0 only for zero."""
    relative = scales / units.clamp_min(1e-38)[:, :, None]
    sizes = torch.from_numpy(STEPS[1:])
    between = sizes[:-1] if up else (sizes[:-1] + sizes[1:]) / 2
    steps = torch.bucketize(relative, between * (1 + 1e-6)) + 1
    return torch.where((scales > 0) & (units[:, :, None] > 0), steps, 0).to(torch.uint8)
