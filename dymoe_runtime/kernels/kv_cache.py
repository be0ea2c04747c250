"""The KV cache of one layer, for one sequence.

Keys and values have 32, 16 or 8 bits; at 8 bits, each 32 columns share a half-precision scale.
"""

from __future__ import annotations

import numpy as np

from dymoe_runtime.memory import address_of

# Columns that share a scale at 8 bits.
GROUP = 32
# The largest finite number in half precision.
MAX_HALF = 65504.0
# How many of a prompt's last tokens decide the token weights by their attention.
HEAVY_HITTER_QUERIES = 32


class KVCache:
    """Keys and values of one layer as rows that `pack` makes.

    `rows` is uint8 [2, kv_heads, capacity, row bytes]: keys at index 0, values at index 1.
    """

    def __init__(self, memory: np.ndarray, kv_heads: int, head_dim: int, capacity: int, bits: int = 16) -> None:
        """Keep the rows in `memory`, uint8 [bytes_needed(...)]; `bits` is one of BITS."""
        self.rows = memory.reshape(2, kv_heads, capacity, row_bytes(head_dim, bits))
        self.bits = bits
        self.capacity = capacity
        # For compiled code: addresses of keys and values, capacity, bits.
        self.address = (address_of(self.rows[0]), address_of(self.rows[1]), capacity, bits)
        self._head_dim = head_dim

    def address_from(self, head: int) -> tuple[int, int, int, int]:
        """Return `address` of the heads from `head` on."""
        keys, values, capacity, bits = self.address
        return keys + head * self.rows.strides[1], values + head * self.rows.strides[1], capacity, bits

    @staticmethod
    def bytes_needed(kv_heads: int, head_dim: int, capacity: int, bits: int = 16) -> int:
        """Return the bytes that the keys and values of `capacity` tokens take."""
        return 2 * kv_heads * capacity * row_bytes(head_dim, bits)

    def write(self, start: int, k: np.ndarray, v: np.ndarray) -> None:
        """Store k and v [kv_heads, T, d] at the positions from `start` on."""
        rows = self.rows[:, :, start : start + k.shape[1]]
        rows[0] = pack(k, self.bits)
        rows[1] = pack(v, self.bits)

    def read(self, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, values) of the positions before `stop`, float32 [kv_heads, stop, d]."""
        rows = self.rows[:, :, :stop]
        return unpack(rows[0], self._head_dim, self.bits), unpack(rows[1], self._head_dim, self.bits)


def row_bytes(head_dim: int, bits: int) -> int:
    """Return the bytes of one key or one value of one head."""
    return head_dim + 2 * -(-head_dim // GROUP) if bits == 8 else head_dim * bits // 8


def pack(x: np.ndarray, bits: int) -> np.ndarray:
    """Return x float32 [..., d] as rows uint8 [..., row bytes].

    A row of 32 bits is float32. A row of 16 bits is half precision, and values out of range become the largest half.
    A row of 8 bits is d int8 codes, then a half-precision scale for each GROUP columns. The scale is the group's
    largest magnitude / 127, or NaN if a value of the group is not finite.
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
    """Return the values of rows that `pack` made, float32 [..., d]; 8 and 16 bits have rounded them."""
    if bits == 32:
        return rows.view(np.float32)
    if bits == 16:
        return rows.view(np.float16).astype(np.float32)
    scales = np.ascontiguousarray(rows[..., head_dim:]).view(np.float16).astype(np.float32)
    codes = rows[..., :head_dim].view(np.int8)
    unpacked: np.ndarray = codes * scales.repeat(GROUP, axis=-1)[..., :head_dim]
    return unpacked


def _half(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.clip(-MAX_HALF, MAX_HALF).astype(np.float16))
