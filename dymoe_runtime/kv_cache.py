"""Keys and values of one sequence, at 16 bits, or 8 with a scale for each 32 columns, or 32."""

from __future__ import annotations

import math

import numpy as np

from dymoe_runtime.memory import address_of, map_memory
from dymoe_runtime.spec import ModelSpec

BITS = (8, 16, 32)
# Columns that share a scale at 8 bits.
GROUP = 32
MOST_HALF = 65504.0
# Queries at the end of a prompt whose attention decides which of its tokens weigh most.
HEAVY_HITTER_QUERIES = 32


class KVCache:
    """Rows uint8 [layers, 2, kv_heads, capacity, row bytes]: keys and values as `pack` makes them.

    With `one_layer` all layers share a place: for passes that start anew and are not continued.
    """

    def __init__(self, spec: ModelSpec, capacity: int, bits: int = 16, one_layer: bool = False) -> None:
        layers = 1 if one_layer else spec.num_layers
        shape = layers, 2, spec.num_kv_heads, capacity, row_bytes(spec.head_dim, bits)
        self.rows = np.frombuffer(map_memory(math.prod(shape)), np.uint8, math.prod(shape)).reshape(shape)
        self.bits = bits
        self.capacity = capacity
        self.length = 0
        self._head_dim = spec.head_dim
        # Of each layer for compiled code: addresses of keys and values, capacity, bits.
        self.addresses = [
            (address_of(keys), address_of(values), capacity, bits)
            for keys, values in (self.rows[layer % layers] for layer in range(spec.num_layers))
        ]

    @staticmethod
    def bytes_needed(spec: ModelSpec, capacity: int, bits: int = 16, one_layer: bool = False) -> int:
        layers = 1 if one_layer else spec.num_layers
        return 2 * layers * spec.num_kv_heads * capacity * row_bytes(spec.head_dim, bits)

    def write(self, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        """Keep k and v [kv_heads, T, d] of positions start.. ."""
        rows = self.rows[layer % len(self.rows), :, :, start : start + k.shape[1]]
        rows[0] = pack(k, self.bits)
        rows[1] = pack(v, self.bits)

    def read(self, layer: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values before `stop`, float32 [kv_heads, stop, d]."""
        rows = self.rows[layer % len(self.rows), :, :, :stop]
        return unpack(rows[0], self._head_dim, self.bits), unpack(rows[1], self._head_dim, self.bits)


def row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a key or a value of one head."""
    return head_dim + 2 * -(-head_dim // GROUP) if bits == 8 else head_dim * bits // 8


def pack(x: np.ndarray, bits: int) -> np.ndarray:
    """Rows uint8 [..., row bytes] of x float32 [..., d].

    16 bits: halves, the largest for what is beyond. 8: codes, then a half for each GROUP columns,
    their largest magnitude / 127; NaN where one of them is not finite.
    """
    if bits == 32:
        return np.ascontiguousarray(x).view(np.uint8)
    if bits == 16:
        return _half(x).view(np.uint8)
    n = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % GROUP)])
    groups = padded.reshape(*x.shape[:-1], padded.shape[-1] // GROUP, GROUP)
    largest = np.abs(groups).max(-1, keepdims=True)
    scales = _half(np.where(np.isfinite(largest), largest / 127, np.nan))
    sizes = scales.astype(np.float32)
    codes = np.zeros(groups.shape, np.float32)
    np.divide(groups, sizes, out=codes, where=sizes > 0)
    rounded = codes.round().clip(-127, 127).astype(np.int8).reshape(padded.shape)
    return np.concatenate([rounded[..., :n].view(np.uint8), scales[..., 0].view(np.uint8)], axis=-1)


def unpack(rows: np.ndarray, head_dim: int, bits: int) -> np.ndarray:
    """What `pack` was given, as far as `bits` keep it: float32 [..., d]."""
    if bits == 32:
        return rows.view(np.float32)
    if bits == 16:
        return rows.view(np.float16).astype(np.float32)
    scales = np.ascontiguousarray(rows[..., head_dim:]).view(np.float16).astype(np.float32)
    codes = rows[..., :head_dim].view(np.int8)
    unpacked: np.ndarray = codes * scales.repeat(GROUP, axis=-1)[..., :head_dim]
    return unpacked


def _half(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.clip(-MOST_HALF, MOST_HALF).astype(np.float16))
