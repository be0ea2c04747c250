"""The operations on records in plain torch, with float activations: slow, and what the kernels must equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dymoe_runtime import tiers
from dymoe_runtime.activations import ACTIVATIONS
from dymoe_runtime.tiers import MatrixLayout, Part, RecordLayout

isa = "torch"
threads = torch.get_num_threads
set_threads = torch.set_num_threads


def ffn(
    layout: RecordLayout,
    tier: int,
    segments: Sequence[torch.Tensor],
    x: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}': expected {', '.join(ACTIVATIONS)}")
    gate, up, down = (dequantize(layout, tier, segments, name) for name in ("gate", "up", "down"))
    _check_input(x, gate.shape[1])
    hidden = ACTIVATIONS[activation](x @ gate.T) * (x @ up.T)  # [T, I]
    return hidden @ down.T


def linear(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    _check_input(x, layout.matrices["weight"].cols)
    return x @ dequantize(layout, tier, segments, "weight").T


def embed(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    where = layout.matrices["weight"]
    outside = ids[(ids < 0) | (ids >= where.rows)]
    if outside.numel():
        raise ValueError(f"ids: {int(outside[0])} is not below {where.rows}")
    if not ids.numel():
        return torch.empty(0, where.cols)
    few = tiers.make_layout({"weight": (ids.numel(), where.cols)}, where.ladder).matrices["weight"]
    return tiers.dequantize(_take_rows(_arrays(layout, tier, segments), where, few, ids.numpy()), few, tier)


def dequantize(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    return tiers.dequantize(_arrays(layout, tier, segments), layout.matrices[name], tier)


def _arrays(layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The segments that `tier` needs, or ValueError."""
    if tier not in layout.ladder:
        raise ValueError(f"tier {tier}: the tiers of this record are {', '.join(map(str, layout.ladder))}")
    needed = layout.segment_bytes[: layout.segments_of(tier)]
    if len(segments) < len(needed):
        raise ValueError(f"tier {tier} needs {len(needed)} segments, got {len(segments)}")
    return [_array(i, segments[i]) for i in range(len(needed))]


def _array(index: int, segment: torch.Tensor) -> np.ndarray:
    if segment.dtype != torch.uint8 or segment.dim() != 1:
        raise ValueError(f"segment {index}: expected uint8 with 1 dimension")
    return segment.numpy()


def _check_input(x: torch.Tensor, cols: int) -> None:
    if x.dim() != 2 or x.shape[1] != cols or x.dtype != torch.float32:
        raise ValueError(f"x: expected float32 of shape [*, {cols}], got {x.dtype} of {list(x.shape)}")


def _take_rows(
    segments: Sequence[np.ndarray], where: MatrixLayout, few: MatrixLayout, ids: np.ndarray
) -> list[np.ndarray]:
    """Segments that hold the rows `ids` of the matrix at `where`, laid out as `few`."""
    pairs = [p for p in zip(_parts(where), _parts(few), strict=True) if p[0].segment < len(segments)]
    taken = [np.zeros(max(to.offset + to.nbytes for _, to in pairs), np.uint8) for _ in segments]
    for source, to in pairs:
        rows = segments[source.segment][source.offset : source.offset + source.nbytes].reshape(where.rows, -1)
        taken[to.segment][to.offset : to.offset + to.nbytes] = rows[ids].reshape(-1)
    return taken


def _parts(where: MatrixLayout) -> list[Part]:
    return [*(plane.part for plane in where.planes), *where.steps, where.multiplier]
