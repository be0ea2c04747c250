"""Quantization to whole numbers of few bits with a scale for each narrow block: the form that other runtimes take.

The codes are chosen by the same descent as those of tiers. Scales are any numbers, negative ones included: the whole
numbers of b bits reach one further below zero than above it, so a block whose largest weight is positive has a negative
scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dymoe_compile.quantize.descent import Descent, DescentKernels
from dymoe_compile.quantize.moments import Moments

# Passes over all columns, in alternate directions. The first takes the columns to come as exact, as GPTQ does.
SWEEPS = 4
# Columns whose slopes are computed at once, because narrow products are slow.
PULL = 256
# Scales tried for each block: that which maps its largest weight to the largest number, times these.
CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64)


def quantize_whole(
    weight: torch.Tensor, bits: int, block: int, descent: DescentKernels, moments: Moments | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weight [rows, cols] to (code - 2^(bits - 1)) * scale, for inputs with these `moments`.

    Returns codes uint8 [rows, cols], and scales float32 [rows, blocks], one for each `block` columns. Without moments,
    or with too few samples, all columns count alike.
    """
    enough = moments is not None and moments.enough
    hessian = moments.ridged() if moments is not None and enough else None
    return _WholeDescent(weight.float(), bits, block, descent, hessian).run()


class _WholeDescent:
    """Coordinate descent on one matrix. Blocks with a negative scale are mirrored for the descent's kernel."""

    def __init__(
        self, weight: torch.Tensor, bits: int, block: int, descent: DescentKernels, hessian: torch.Tensor | None
    ) -> None:
        self._bits, self._block, self._descent, self._hessian = bits, block, descent, hessian
        rows, self._cols = weight.shape
        padded = F.pad(weight, (0, -self._cols % block)).view(rows, -1, block)
        largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))[..., 0]
        self._signs = torch.where(largest > 0, -1.0, 1.0)  # [rows, blocks]
        importance = torch.ones(self._cols) if hessian is None else hessian.diagonal()
        weights_of = F.pad(importance, (0, -self._cols % block)).view(-1, block)
        self._scales, codes = _best_start(padded * self._signs[..., None], weights_of, bits)
        self._codes = codes.view(rows, -1)[:, : self._cols].contiguous()
        self._error = self._values() - weight

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run all sweeps; return codes and scales."""
        sweeps = SWEEPS if self._hessian is not None else 1
        for sweep in range(sweeps):
            self._sweep(ahead=sweep == 0, backward=sweep % 2 == 1, last=sweep == sweeps - 1)
        return self._codes, self._scales * self._signs

    def _sweep(self, ahead: bool, backward: bool, last: bool) -> None:
        """Visit every block once, with slopes that include what was chosen so far; `ahead` leaves out later groups."""
        starts = range(0, self._cols, PULL)
        for start in reversed(starts) if backward else starts:
            group = slice(start, min(start + PULL, self._cols))
            slopes = self._slopes(slice(0, group.stop if ahead else self._cols), group)
            before = self._error[:, group].clone()
            firsts = range(group.start, group.stop, self._block)
            for first in reversed(firsts) if backward else firsts:
                columns = slice(first, min(first + self._block, self._cols))
                slope = slopes[:, columns.start - start : columns.stop - start]
                done = slice(columns.stop, group.stop) if backward else slice(start, first)
                if done.start < done.stop and self._hessian is not None:
                    changed = self._error[:, done] - before[:, done.start - start : done.stop - start]
                    slope = slope + changed @ self._hessian[done, columns]
                self._visit(columns, slope, last)

    def _slopes(self, seen: slice, columns: slice) -> torch.Tensor:
        """Return the part of error times Hessian at `columns` that comes from the columns `seen`, [rows, columns]."""
        if self._hessian is None:
            return self._error[:, columns]
        return self._error[:, seen] @ self._hessian[seen, columns]

    def _visit(self, columns: slice, slope: torch.Tensor, last: bool) -> None:
        """Choose new codes and scales for one block of columns."""
        index, width = columns.start // self._block, columns.stop - columns.start
        signs = self._signs[:, index, None]
        hessian = torch.eye(width) if self._hessian is None else self._hessian[columns, columns].contiguous()
        codes, scales = self._codes[:, columns].contiguous(), self._scales[:, index][None].contiguous()
        moved = torch.zeros(1, len(codes), width)
        self._descent.descend(
            Descent(
                ladder=(self._bits,),
                weights=(1.0,),
                columns=slice(0, width),
                hessian=hessian,
                slope=(slope * signs)[None].contiguous(),
                units=None,
                scales=scales,
                error=moved,
                codes=codes,
                last=last,
                whole=True,
            )
        )
        self._codes[:, columns], self._scales[:, index] = codes, scales[0]
        self._error[:, columns] += moved[0] * signs

    def _values(self) -> torch.Tensor:
        """Return the matrix that codes and scales stand for, float32 [rows, cols]."""
        scales = (self._scales * self._signs).repeat_interleave(self._block, dim=1)[:, : self._cols]
        values: torch.Tensor = (self._codes.float() - 2 ** (self._bits - 1)) * scales
        return values


def _best_start(blocks: torch.Tensor, importance: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positive scales [rows, blocks], and codes uint8 [rows, blocks, block], of the best of a few scales.

    blocks is [rows, blocks, block], the largest weight of each negative; importance is [blocks, block].
    """
    zero = 2 ** (bits - 1)
    best = torch.zeros(blocks.shape[:-1]), torch.full(blocks.shape, zero, dtype=torch.uint8)
    least = torch.full(blocks.shape[:-1], torch.inf)
    largest = blocks.abs().amax(-1) / zero
    for clip in CLIPS:
        numbers = _nearest(blocks, largest * clip, zero)
        weighted = numbers * importance
        square = (weighted * numbers).sum(-1)
        scale = ((weighted * blocks).sum(-1) / square.clamp_min(1e-30)).clamp_min(0.0)
        numbers = _nearest(blocks, scale, zero)
        loss = (importance * (numbers * scale[..., None] - blocks).square()).sum(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        codes = (numbers + zero).to(torch.uint8)
        best = torch.where(better, scale, best[0]), torch.where(better[..., None], codes, best[1])
    return best


def _nearest(blocks: torch.Tensor, scale: torch.Tensor, zero: int) -> torch.Tensor:
    """Return the nearest whole numbers of blocks / scale that there are, 0 where the scale is 0."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)[..., None]
    return (blocks * inverse).round().clamp(-zero, zero - 1)
