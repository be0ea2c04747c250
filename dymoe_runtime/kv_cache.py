"""Keys and values of one sequence, at 16 bits, or 8 with a scale for each 32 columns, or 32."""

from __future__ import annotations

import torch

from dymoe_runtime.spec import ModelSpec

BITS = (8, 16, 32)
# Columns that share a scale at 8 bits.
GROUP = 32
MOST_HALF = 65504.0


class KVCache:
    """Rows uint8 [layers, 2, kv_heads, capacity, row bytes]: keys and values as `pack` makes them.

    With `one_layer` all layers share a place: for passes that start anew and are not continued.
    """

    def __init__(self, spec: ModelSpec, capacity: int, bits: int = 16, one_layer: bool = False) -> None:
        layers = 1 if one_layer else spec.num_layers
        self.rows = torch.zeros(
            layers, 2, spec.num_kv_heads, capacity, row_bytes(spec.head_dim, bits), dtype=torch.uint8
        )
        self.bits = bits
        self.capacity = capacity
        self.length = 0
        self._head_dim = spec.head_dim
        # Of each layer for compiled code: addresses of keys and values, capacity, bits.
        self.addresses = [
            (keys.data_ptr(), values.data_ptr(), capacity, bits)
            for keys, values in (self.rows[layer % layers] for layer in range(spec.num_layers))
        ]

    @staticmethod
    def bytes_needed(spec: ModelSpec, capacity: int, bits: int = 16, one_layer: bool = False) -> int:
        layers = 1 if one_layer else spec.num_layers
        return 2 * layers * spec.num_kv_heads * capacity * row_bytes(spec.head_dim, bits)

    def write(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep k and v [kv_heads, T, d] of positions start.. ."""
        rows = self.rows[layer % len(self.rows), :, :, start : start + k.shape[1]]
        rows[0] = pack(k, self.bits)
        rows[1] = pack(v, self.bits)

    def read(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values before `stop`, float32 [kv_heads, stop, d]."""
        rows = self.rows[layer % len(self.rows), :, :, :stop]
        return unpack(rows[0], self._head_dim, self.bits), unpack(rows[1], self._head_dim, self.bits)


def row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a key or a value of one head."""
    return head_dim + 2 * -(-head_dim // GROUP) if bits == 8 else head_dim * bits // 8


def pack(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows uint8 [..., row bytes] of x float32 [..., d].

    16 bits: halves, the largest for what is beyond. 8: codes, then a half for each GROUP columns,
    their largest magnitude / 127; NaN where one of them is not finite.
    """
    if bits == 32:
        return x.contiguous().view(torch.uint8)
    if bits == 16:
        return _half(x).view(torch.uint8)
    n = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -n % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    scales = _half(torch.where(largest.isfinite(), largest / 127, torch.nan))
    codes = torch.where(scales > 0, groups / scales.float(), 0).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([codes.flatten(-2)[..., :n].view(torch.uint8), scales.squeeze(-1).view(torch.uint8)], dim=-1)


def unpack(rows: torch.Tensor, head_dim: int, bits: int) -> torch.Tensor:
    """What `pack` was given, as far as `bits` keep it: float32 [..., d]."""
    if bits == 32:
        return rows.view(torch.float32)
    if bits == 16:
        return rows.view(torch.float16).float()
    scales = rows[..., head_dim:].contiguous().view(torch.float16).float()
    return rows[..., :head_dim].view(torch.int8) * scales.repeat_interleave(GROUP, dim=-1)[..., :head_dim]


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-MOST_HALF, MOST_HALF).half().contiguous()
