"""Nested tiers of one matrix: one code per weight whose top bits serve every lower tier.

The grid of each block of 64 is chosen jointly: among clipping factors, the one with the
least weighted error summed over the tiers, where each tier's scale is refitted by least
squares to the codes that it inherits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dymoe_runtime.tiers import BLOCK, QuantizedMatrix, blocks_of, tier_scales

# Share of a lower tier's squared error in the joint loss, against 1 for the highest tier.
# On Gaussian weights 0.1 against 0 costs 0.2 dB at 4 bits and gains 0.25 dB at 2 bits.
LOWER_TIER_LOSS = 0.1
# Clipping factors tried per block, relative to the largest magnitude.
CLIPS = (1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57)
# From six bits on no clipping is tried: the highest tier does not need it, lower ones of the ladder lose a little.
FINE = 6
MAX_STEP = 255
# Weights worked on at once, so that temporaries stay in the processor's cache.
CHUNK_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class _Fit:
    """Scale per tier, float32 [rows, blocks], ordered as the ladder, for the best grid so far."""

    loss: torch.Tensor
    scales: torch.Tensor  # [tiers, rows, blocks]


def quantize_matrix(
    weight: torch.Tensor, ladder: Sequence[int], importance: torch.Tensor | None = None
) -> QuantizedMatrix:
    """Quantize weight [rows, cols] to all tiers of `ladder`.

    `importance` [cols] weighs the squared error of each column, as the mean square of the
    activation that multiplies it does; without it all columns count alike.
    """
    cols = weight.shape[1]
    blocks = blocks_of(cols)
    column_weights = _column_weights(importance, cols)
    chunk = max(1, CHUNK_WEIGHTS // (blocks * BLOCK))
    parts = [_quantize_rows(part, tuple(ladder), column_weights) for part in weight.split(chunk)]
    codes = torch.cat([codes for codes, _, _ in parts])[:, :cols]
    steps = torch.cat([steps for _, steps, _ in parts], dim=1)
    return QuantizedMatrix(
        codes=codes.contiguous().numpy(),
        steps={tier: steps[i].numpy() for i, tier in enumerate(ladder)},
        multiplier=torch.cat([multiplier for _, _, multiplier in parts]),
    )


def quantize_expert(
    weights: Mapping[str, torch.Tensor], ladder: Sequence[int], importance: Mapping[str, torch.Tensor] | None = None
) -> dict[str, QuantizedMatrix]:
    """quantize_matrix for each matrix of an expert; `importance` by matrix name."""
    importance = importance or {}
    return {name: quantize_matrix(weight, ladder, importance.get(name)) for name, weight in weights.items()}


def _quantize_rows(
    weight: torch.Tensor, ladder: tuple[int, ...], column_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [rows, blocks * 64], steps uint8 [tiers, rows, blocks], multipliers bf16 [rows]."""
    rows = len(weight)
    w = F.pad(weight.float(), (0, column_weights.numel() - weight.shape[1])).view(rows, -1, BLOCK)
    q = column_weights.view(-1, BLOCK)
    top = ladder[-1]
    fit = _best_fit(w, q, ladder)
    multiplier = _multiplier(fit.scales, ladder)
    steps = _steps(fit.scales, multiplier, ladder)
    # The codes follow the scale as stored, and the lower tiers' scales follow the codes.
    codes = _round(w, tier_scales(steps[-1], multiplier, top, top), top)
    for i, tier in enumerate(ladder[:-1]):
        scale, _ = _refit(w, q, codes, tier, top)
        steps[i] = _steps(scale[None], multiplier, (tier,), top)[0]
    return codes.to(torch.uint8).view(rows, -1), steps.to(torch.uint8), multiplier


def _best_fit(w: torch.Tensor, q: torch.Tensor, ladder: tuple[int, ...]) -> _Fit:
    top = ladder[-1]
    largest = w.abs().amax(dim=-1) / ((2**top - 1) / 2)
    best: _Fit | None = None
    for clip in CLIPS if top < FINE else CLIPS[:1]:
        codes = _round(w, largest * clip, top)
        loss = torch.zeros_like(largest)
        scales = []
        for tier in ladder:
            scale, error = _refit(w, q, codes, tier, top)
            scales.append(scale)
            loss += error if tier == top else LOWER_TIER_LOSS * error
        fit = _Fit(loss, torch.stack(scales))
        best = fit if best is None else _better(best, fit)
    assert best is not None
    return best


def _better(a: _Fit, b: _Fit) -> _Fit:
    b_wins = b.loss < a.loss
    return _Fit(torch.where(b_wins, b.loss, a.loss), torch.where(b_wins, b.scales, a.scales))


def _round(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest codes, float32 like w; a zero scale gives the middle code."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (w * inverse[..., None]).add_(2 ** (bits - 1)).floor_().clamp_(0, 2**bits - 1)


def _refit(
    w: torch.Tensor, q: torch.Tensor, codes: torch.Tensor, tier: int, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale of `tier` for codes of `top`, and the weighted squared error; [rows, blocks] each."""
    levels = codes if tier == top else (codes / 2 ** (top - tier)).floor_()
    levels = levels - (2**tier - 1) / 2
    weighted = levels * q
    across = (weighted * w).sum(-1)
    square = (weighted * levels).sum(-1)
    scale = torch.where(square > 0, across / square.clamp_min(1e-30), 0.0).clamp_min_(0.0)
    error = (q * w * w).sum(-1) - 2 * scale * across + scale * scale * square
    return scale, error


def _multiplier(scales: torch.Tensor, ladder: tuple[int, ...]) -> torch.Tensor:
    """bf16 [rows], so large that no step exceeds MAX_STEP."""
    top = ladder[-1]
    in_top = torch.stack([scale * 2.0 ** (tier - top) for scale, tier in zip(scales, ladder, strict=True)])
    wanted = in_top.amax(dim=(0, 2)) / MAX_STEP
    # bf16 keeps 8 bits; rounding up keeps every step in range.
    return (wanted * (1 + 2**-7)).to(torch.bfloat16)


def _steps(scales: torch.Tensor, multiplier: torch.Tensor, ladder: tuple[int, ...], top: int = 0) -> torch.Tensor:
    """Steps [tiers, rows, blocks] that come closest to `scales`; 0 only for an all-zero block."""
    top = top or ladder[-1]
    powers = torch.tensor([2.0 ** (tier - top) for tier in ladder])[:, None, None]
    unit = multiplier.float()[None, :, None]
    steps = torch.where(unit > 0, scales * powers / unit.clamp_min(1e-38), 0.0).round_()
    return torch.where(scales > 0, steps.clamp_(1, MAX_STEP), 0.0)


def _column_weights(importance: torch.Tensor | None, cols: int) -> torch.Tensor:
    """Importance of each column padded to whole blocks with 0, mean about 1, none neglected."""
    if importance is None:
        weights = torch.ones(cols)
    else:
        weights = importance.float() / importance.float().mean().clamp_min(1e-30)
        weights = weights.clamp(0.05, 20.0)
    return F.pad(weights, (0, blocks_of(cols) * BLOCK - cols))
