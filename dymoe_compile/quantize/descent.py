"""The state of a matrix while the codes of its nested tiers are chosen, and the protocol of that computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dymoe_runtime.bundle.tiers import blocks_of, levels_of


@dataclass(frozen=True)
class Grid:
    """Inputs of the search for the codes and scales with which a descent starts."""

    ladder: tuple[int, ...]
    weights: tuple[float, ...]  # [tiers]: weight of each tier's squared error
    importance: torch.Tensor  # float32 [cols]: weight of each column's squared error
    starts: torch.Tensor  # float32 [starts, rows, blocks]: scales to try for the highest tier

    def check(self, weight: torch.Tensor) -> None:
        """Raise ValueError unless the shapes fit `weight` [rows, cols]."""
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
    """A block of columns whose codes and scales are chosen anew, and the matrix [rows, cols] that contains it.

    The error E of a tier is scale * level - weight. The descent goes through the columns one by one and lowers
    the sum over tiers of weight * trace(E H E^T).
    """

    ladder: tuple[int, ...]
    weights: tuple[float, ...]  # [tiers]: weight of each tier's error
    columns: slice  # at most 64
    hessian: torch.Tensor  # float32 [cols, cols]
    slope: torch.Tensor  # float32 [tiers, rows, columns]: E H at the columns of this block
    units: torch.Tensor | None  # float32 [tiers, rows]: scales are these times SCALE_SIZES; None: any scale
    scales: torch.Tensor  # float32 [tiers, rows]: the scales of this block
    error: torch.Tensor  # float32 [tiers, rows, cols]
    codes: torch.Tensor  # uint8 [rows, cols]
    last: bool = True  # whether scales are fitted again to the chosen codes
    grid: str = ""  # of the codes, as in tiers.py
    # float32 [rows, cols], on the trellis grid in the first visit: there are no codes yet, and `error` is 0.
    weight: torch.Tensor | None = None
    whole: bool = False  # whether the levels of the only tier are the whole numbers code - 2^(bits - 1)

    def levels(self, codes: torch.Tensor, t: int) -> torch.Tensor:
        """Return the levels of the highest tier's `codes` at the tier with index `t`; float32, shaped like `codes`."""
        bits, top = self.ladder[t], self.ladder[-1]
        if self.whole:
            numbers: torch.Tensor = codes.float() - 2 ** (bits - 1)
            return numbers
        return torch.from_numpy(levels_of(bits, top))[(codes >> (top - bits)).int()]

    def all_levels(self) -> torch.Tensor:
        """Return the level of every code of the highest tier at each tier, float32 [tiers, codes]."""
        codes = torch.arange(2 ** self.ladder[-1])
        return torch.stack([self.levels(codes, t) for t in range(len(self.ladder))])


class DescentKernels(Protocol):
    """The code that computes a descent: compiled, or the reference in plain torch."""

    def fit(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes uint8 [rows, cols] and scales float32 [tiers, rows, blocks], from the best start of each block.

        weight is float32 [rows, cols]. Raises ValueError unless `grid` fits it.
        """

    def descend(self, block: Descent) -> None:
        """Choose new codes and scales for a block of columns, one column after another.

        Updates codes, scales and error in place. Afterwards `slope` must not be used.
        """
