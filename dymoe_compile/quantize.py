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

from dymoe_compile.grid import (
    FINE,
    multiplier_of,
    nearest_steps,
    rounded,
    scales_to_try,
    start_grids,
    tier_weights,
    units_of,
)
from dymoe_runtime import kernels
from dymoe_runtime.kernels.descent import Descent
from dymoe_runtime.tiers import BLOCK, STEPS, QuantizedMatrix, levels_of, tier_scales


def _has_bf16() -> bool:
    """Whether products in bfloat16 are fast here; older releases of torch cannot tell."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16"))


# Passes of the descent over all columns; the first with free scales, the last from the last column to the first.
SWEEPS = 3
# Ridge on H relative to its mean diagonal: this many times columns over samples, at least the second.
RIDGE_PER_SAMPLE = 1.4
LEAST_RIDGE = 0.01
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
        np.concatenate([part.codes for part in parts]), steps, np.concatenate([part.multiplier for part in parts])
    )


def quantize_expert(
    weights: Mapping[str, torch.Tensor], ladder: Sequence[int], moments: Mapping[str, Moments] | None = None
) -> dict[str, QuantizedMatrix]:
    """quantize_matrix for each matrix of an expert; `moments` by matrix name."""
    moments = moments or {}
    return {name: quantize_matrix(weight, ladder, moments.get(name)) for name, weight in weights.items()}


class _Descending:
    """Coordinate descent on one matrix; columns are padded to whole blocks, which H leaves out."""

    def __init__(self, weight: torch.Tensor, ladder: tuple[int, ...], hessian: torch.Tensor | None) -> None:
        self._ladder = ladder
        self._cols = weight.shape[1]
        self._hessian = torch.eye(self._cols) if hessian is None else hessian
        self._diagonal = hessian is None
        self._weight = weight.float().contiguous()
        codes, scales = start_grids(self._weight, ladder, self._hessian.diagonal().contiguous())
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
        multiplier = multiplier_of(self._scales, self._ladder).float()
        units = (multiplier[None] * units_of(self._ladder)[:, None]).contiguous()
        self._snap(units)
        for sweep in range(1, SWEEPS):
            self._sweep(units, last=sweep == SWEEPS - 1)
            self._backward = not self._backward
        steps = nearest_steps(self._scales, units)
        return QuantizedMatrix(
            self._codes.numpy(), {tier: steps[i].numpy() for i, tier in enumerate(self._ladder)}, multiplier.numpy()
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
        steps = nearest_steps(self._scales, units)
        fine = self._ladder[-1] >= FINE
        if fine:
            # The nearest step may be too small, and what it clips is more than what a fine grid loses.
            steps[-1] = nearest_steps(self._scales[-1:], units[-1:], up=True)[0]
        self._scales = torch.from_numpy(STEPS)[steps.long()] * units[:, :, None]
        if fine:
            self._codes = rounded(self._weight, self._scales[-1], self._ladder[-1])
        self._take_error()

    def _take_error(self) -> None:
        """The error of each tier, [tiers, rows, cols], from codes and scales."""
        self._error = torch.stack([self._values(t) - self._weight for t in range(len(self._ladder))])
        self._visited.clear()
        self._rough_error = self._error.to(PULL_DTYPE)

    def _values(self, t: int) -> torch.Tensor:
        """The matrix at tier number `t`."""
        tier, top = self._ladder[t], self._ladder[-1]
        levels = torch.from_numpy(levels_of(tier, top))[(self._codes >> (top - tier)).int()]
        return levels * self._scales[t].repeat_interleave(BLOCK, dim=1)[:, : self._cols]


def _round_only(weight: torch.Tensor, tier: int) -> QuantizedMatrix:
    """Nearest codes of a fine grid."""
    weight = weight.float()
    scales = scales_to_try(weight, tier)
    multiplier = multiplier_of(scales, (tier,)).float()
    steps = nearest_steps(scales, multiplier[None], up=True)[0].numpy()
    stored = tier_scales(steps, multiplier.numpy(), tier, tier)
    codes = rounded(weight, torch.from_numpy(stored), tier)
    return QuantizedMatrix(codes.numpy(), {tier: steps}, multiplier.numpy())
