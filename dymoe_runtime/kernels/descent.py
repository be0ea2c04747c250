"""The state of a matrix while the codes of its nested tiers are chosen: what `descend` works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dymoe_runtime.tiers import blocks_of, levels_of


@dataclass(frozen=True)
class Grid:
    """What to choose the codes and scales by that a descent starts from."""

    ladder: tuple[int, ...]
    weights: tuple[float, ...]  # of each tier's squared error
    importance: torch.Tensor  # float32 [cols]: what the squared error of a column counts
    starts: torch.Tensor  # float32 [starts, rows, blocks]: scales of the highest tier to try

    def check(self, weight: torch.Tensor) -> None:
        """ValueError unless this fits weight [rows, cols]."""
        rows, cols = weight.shape
        shapes = {
            "weights": (len(self.weights), len(self.ladder)),
            "importance": (tuple(self.importance.shape), (cols,)),
            "starts": (tuple(self.starts.shape[1:]), (rows, blocks_of(cols))),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(f"{name}: expected {expected}, got {found}")


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
        return torch.from_numpy(levels_of(bits, top))[(codes >> (top - bits)).int()]

    def all_levels(self) -> torch.Tensor:
        """Levels of each code at each tier, float32 [tiers, codes]."""
        codes = torch.arange(2 ** self.ladder[-1])
        return torch.stack([self.levels(codes, t) for t in range(len(self.ladder))])
