"""Nested tiers of one matrix: one code per weight whose top bits serve every lower tier.

First, each block of 64 columns gets one grid for all tiers: of a few scales, the one with the least weighted error
summed over the tiers. The scale of each lower tier is fitted by least squares to the codes that it inherits. On the
trellis grid scales begin with the size of the block, and codes with the first pass of what follows.

Then coordinate descent improves codes and scales for the inputs of the matrix. Let H be the mean outer product of the
inputs, and E the error of a tier. The descent lowers the sum over tiers of weight * trace(E H E^T). This is the
objective of GPTQ (arXiv 2210.17323), solved as in QuantEase (arXiv 2309.01885), for all tiers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dymoe_compile.quantize.descent import Descent, DescentKernels
from dymoe_compile.quantize.grid import (
    FINE,
    multiplier_of,
    nearest_scale_indices,
    rounded,
    scales_to_try,
    start_grids,
    tier_weights,
    units_of,
    usual_scales,
)
from dymoe_compile.quantize.moments import Moments
from dymoe_runtime.bundle.tiers import BLOCK, SCALE_SIZES, TRELLIS, QuantizedMatrix, levels_at, tier_scales


def _has_bf16() -> bool:
    """Return whether bfloat16 products are fast on this CPU; False if this release of torch cannot tell."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16"))


# Passes of the descent over all columns. The first has free scales; the last runs from the last column to the first.
SWEEPS = 3
# Columns whose slopes are computed at once, because narrow products are slow.
PULL = 4 * BLOCK
# A slope is a sum over all columns; eight bits of each term are enough to choose codes.
PULL_DTYPE = torch.bfloat16 if _has_bf16() else torch.float32
# A larger rise of a scale would multiply the rounding of the error too much.
MOST_RESCALED = 16.0
# Weights that are in float32 at a time when a matrix is quantized in parts.
WEIGHTS_AT_ONCE = 1 << 22


def quantize_matrix(
    weight: torch.Tensor,
    ladder: Sequence[int],
    descent: DescentKernels,
    moments: Moments | None = None,
    grid: str = "",
) -> QuantizedMatrix:
    """Quantize weight [rows, cols] to all tiers of `ladder`, for inputs with these `moments`; `grid` is as in tiers.py.

    Without moments, or with too few samples, all columns count alike. A single tier of at least FINE bits is only
    rounded.
    """
    ladder = tuple(ladder)
    if moments is not None and moments.enough and not _only_rounded(ladder):
        return _Descending(weight, ladder, descent, moments.ridged(), grid).run()
    # Rows are independent, and a whole embedding in float32 would take too much memory.
    parts = torch.split(weight, max(1, WEIGHTS_AT_ONCE // weight.shape[1]))
    if _only_rounded(ladder):
        return _joined([_round_only(part, ladder[0]) for part in parts])
    return _joined([_Descending(part, ladder, descent, None, grid).run() for part in parts])


def _only_rounded(ladder: tuple[int, ...]) -> bool:
    return len(ladder) == 1 and ladder[0] >= FINE


def _joined(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Return one matrix with the rows of all parts."""
    indices = {tier: np.concatenate([part.scale_indices[tier] for part in parts]) for tier in parts[0].scale_indices}
    return QuantizedMatrix(
        np.concatenate([part.codes for part in parts]), indices, np.concatenate([part.multiplier for part in parts])
    )


def quantize_expert(
    weights: Mapping[str, torch.Tensor],
    ladder: Sequence[int],
    descent: DescentKernels,
    moments: Mapping[str, Moments] | None = None,
    grid: str = "",
) -> dict[str, QuantizedMatrix]:
    """Quantize each matrix of an expert; `moments` maps matrix names to the moments of their inputs."""
    moments = moments or {}
    return {name: quantize_matrix(weight, ladder, descent, moments.get(name), grid) for name, weight in weights.items()}


class _Descending:
    """Coordinate descent on one matrix; its last block of columns may be narrower than the others."""

    def __init__(
        self,
        weight: torch.Tensor,
        ladder: tuple[int, ...],
        descent: DescentKernels,
        hessian: torch.Tensor | None,
        grid: str,
    ) -> None:
        self._descent = descent
        self._grid = grid
        self._ladder = ladder
        self._cols = weight.shape[1]
        self._hessian = torch.eye(self._cols) if hessian is None else hessian
        self._diagonal = hessian is None
        self._weight = weight.float().contiguous()
        self._codes, self._scales = self._start()  # uint8 [rows, cols], [tiers, rows, blocks]
        self._rough_hessian = self._hessian.to(PULL_DTYPE)
        self._error = self._rough_error = torch.empty(0)
        self._backward = False
        # Start of a group of columns -> the part of its slopes that comes from columns visited before the group.
        # The next pass goes the other way and visits those columns after the group, so it reuses that part
        # (Conrad and Wallach, Alternating methods for sets of linear equations, 1979).
        self._visited: dict[int, torch.Tensor] = {}
        self._take_error(first=True)

    def _start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes and scales to start from; on the trellis grid codes come with the first visit."""
        if self._grid != TRELLIS:
            return start_grids(self._weight, self._ladder, self._hessian.diagonal().contiguous(), self._descent)
        return torch.zeros(self._weight.shape, dtype=torch.uint8), usual_scales(self._weight, self._ladder)

    def run(self) -> QuantizedMatrix:
        """Run all sweeps and return the quantized matrix."""
        self._sweep(None)
        multiplier = multiplier_of(self._scales, self._ladder, self._grid).float()
        units = (multiplier[None] * units_of(self._ladder, self._grid)[:, None]).contiguous()
        self._snap(units)
        for sweep in range(1, SWEEPS):
            self._sweep(units, last=sweep == SWEEPS - 1)
            self._backward = not self._backward
        indices = nearest_scale_indices(self._scales, units)
        return QuantizedMatrix(
            self._codes.numpy(), {tier: indices[i].numpy() for i, tier in enumerate(self._ladder)}, multiplier.numpy()
        )

    def _sweep(self, units: torch.Tensor | None, last: bool = False) -> None:
        """Visit every block of columns once, with slopes that include the codes chosen so far.

        In the first sweep scales are free: `units` is None. That sweep treats the columns to come as exact, as GPTQ
        does, because their codes are about to be chosen anew.
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
        """Return error times Hessian, float32 [tiers, rows, columns of the group], from factors in PULL_DTYPE.

        With `free` scales, the error of columns after the group is left out.
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
        """Return the part of the slopes of `columns` that comes from the error of the columns `seen`."""
        return (self._rough_error[:, :, seen] @ self._rough_hessian[seen, columns]).float()

    def _visit(self, columns: slice, slope: torch.Tensor, units: torch.Tensor | None, last: bool) -> None:
        index = columns.start // BLOCK
        scales = self._scales[:, :, index].contiguous()
        weights = tier_weights(self._ladder, self._grid)
        self._descent.descend(
            Descent(
                self._ladder,
                weights,
                columns,
                self._hessian,
                slope,
                units,
                scales,
                self._error,
                self._codes,
                last,
                self._grid,
                self._weight if self._grid == TRELLIS and units is None else None,
            )
        )
        self._scales[:, :, index] = scales

    def _snap(self, units: torch.Tensor) -> None:
        """Move every scale to one that can be stored, and update the error."""
        indices = nearest_scale_indices(self._scales, units)
        fine = self._ladder[-1] >= FINE and self._grid != TRELLIS
        if fine:
            # The nearest size may be too small; clipping costs more than a slightly coarser grid.
            indices[-1] = nearest_scale_indices(self._scales[-1:], units[-1:], up=True)[0]
        before, self._scales = self._scales, torch.from_numpy(SCALE_SIZES)[indices.long()] * units[:, :, None]
        if fine:
            self._codes = rounded(self._weight, self._scales[-1], self._ladder[-1])
            self._take_error()
        else:
            self._rescale_error(torch.where(before > 0, self._scales / before, 0.0))

    def _rescale_error(self, factors: torch.Tensor) -> None:
        """Update the error to scales that are `factors` [tiers, rows, blocks] times as large, with the same codes."""
        if bool((factors > MOST_RESCALED).any()):
            return self._take_error()
        whole = self._cols // BLOCK
        self._error += self._weight
        blocks = self._error[:, :, : whole * BLOCK].view(*self._error.shape[:2], whole, BLOCK)
        blocks.mul_(factors[:, :, :whole, None])
        self._error[:, :, whole * BLOCK :] *= factors[:, :, -1:]
        self._error -= self._weight
        self._visited.clear()
        self._rough_error = self._error.to(PULL_DTYPE)

    def _take_error(self, first: bool = False) -> None:
        """Compute the error of each tier, [tiers, rows, cols], from codes and scales; 0 if there are no codes yet."""
        if first and self._grid == TRELLIS:
            self._error = torch.zeros(len(self._ladder), *self._weight.shape)
        else:
            self._error = torch.stack([self._values(t) - self._weight for t in range(len(self._ladder))])
        self._visited.clear()
        self._rough_error = self._error.to(PULL_DTYPE)

    def _values(self, t: int) -> torch.Tensor:
        """Return the matrix at the tier with index `t`, float32 [rows, cols]."""
        tier, top = self._ladder[t], self._ladder[-1]
        levels = torch.from_numpy(levels_at((self._codes >> (top - tier)).numpy(), tier, top, self._grid))
        return levels * self._scales[t].repeat_interleave(BLOCK, dim=1)[:, : self._cols]


def _round_only(weight: torch.Tensor, tier: int) -> QuantizedMatrix:
    """Round a matrix to the nearest codes of a grid that clips nothing."""
    weight = weight.float()
    scales = scales_to_try(weight, tier)
    multiplier = multiplier_of(scales, (tier,)).float()
    indices = nearest_scale_indices(scales, multiplier[None], up=True)[0].numpy()
    stored = tier_scales(indices, multiplier.numpy(), tier, tier)
    codes = rounded(weight, torch.from_numpy(stored), tier)
    return QuantizedMatrix(codes.numpy(), {tier: indices}, multiplier.numpy())
