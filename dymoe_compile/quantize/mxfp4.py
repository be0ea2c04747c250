"""Codes of weights that were trained in MXFP4 (OCP Microscaling Formats 1.0): they are kept, not chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dymoe_runtime.bundle.tiers import MX_BLOCK, MX_SIZES, QuantizedMatrix

# The values of the codes from 8 on; those before mirror them.
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
BITS = 4
# The least exponent of a row's multiplier. With it, scales reach down to the least of the format, 2^-127, and the
# factors that undo them are finite.
LEAST_EXPONENT = -112


def mxfp4_expert(weights: Mapping[str, torch.Tensor], ladder: Sequence[int]) -> dict[str, QuantizedMatrix]:
    """Return the codes of each matrix of an expert, whose weights are on the grid of MXFP4."""
    return {name: mxfp4_codes(weight, ladder) for name, weight in weights.items()}


def mxfp4_codes(weight: torch.Tensor, ladder: Sequence[int]) -> QuantizedMatrix:
    """Return the codes of weight float32 [rows, cols], and the powers of two that scale each 32 columns.

    The result is exact if each 32 columns are on the grid of MXFP4 with any power of two as their scale, and the scales
    of a row differ by at most 2^15. Weights of smaller scales are rounded to the smallest one.
    """
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % MX_BLOCK)).view(rows, -1, MX_BLOCK)
    # The largest magnitude of a group is 4 or 6 times the smallest scale with which the group is on the grid.
    exponents = torch.frexp(padded.abs().amax(-1))[1].float() - 3
    exponents[padded.abs().amax(-1) == 0] = -torch.inf
    highest = exponents.amax(-1).clamp_min(LEAST_EXPONENT)
    indices = (highest[:, None] - exponents).clamp(0, len(MX_SIZES) - 1)
    scaled = padded * torch.exp2(indices - highest[:, None])[..., None]
    magnitude = torch.bucketize(scaled.abs(), (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2)
    codes = torch.where(scaled < 0, 7 - magnitude, 8 + magnitude).view(rows, -1)[:, :cols]
    top = codes.to(torch.uint8).numpy() >> (BITS - ladder[-1])
    sizes = indices.to(torch.uint8).numpy()
    return QuantizedMatrix(top, dict.fromkeys(ladder, sizes), torch.exp2(highest).numpy().astype(np.float32))
