"""The state of a matrix while the codes of its nested tiers are chosen: what `descend` works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dymoe_runtime.tiers import levels_of


@dataclass
class Descent:
    """One block of columns, and the whole matrix [rows, cols] that it belongs to.

    For each tier the error E is scale * level - weight. What is made least, one column after
    another, is the sum over tiers of weight * trace(E H E^T).
    """

    ladder: tuple[int, ...]
    weights: tuple[float, ...]  # of each tier's error
    columns: slice  # at most 64
    hessian: torch.Tensor  # float32 [cols, cols]
    slope: torch.Tensor  # float32 [tiers, rows, columns]: E H of this block
    units: torch.Tensor | None  # float32 [tiers, rows]: a scale is one of STEPS times this; None for any scale
    scales: torch.Tensor  # float32 [tiers, rows], of this block
    error: torch.Tensor  # float32 [tiers, rows, cols]
    codes: torch.Tensor  # uint8 [rows, cols]
    last: bool = True  # whether scales are fitted once more to the codes chosen; slope is of use to no one then

    def levels(self, codes: torch.Tensor, t: int) -> torch.Tensor:
        """What the scale of tier number `t` multiplies, float32, shaped like `codes`."""
        bits, top = self.ladder[t], self.ladder[-1]
        return levels_of(bits, top)[(codes >> (top - bits)).int()]

    def all_levels(self) -> torch.Tensor:
        """Levels of each code at each tier, float32 [tiers, codes]."""
        codes = torch.arange(2 ** self.ladder[-1])
        return torch.stack([self.levels(codes, t) for t in range(len(self.ladder))])
