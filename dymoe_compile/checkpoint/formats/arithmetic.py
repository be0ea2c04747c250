"""What formats have in common, in torch: packed numbers, powers of two, and values that a block of weights shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import gcd

import torch

# The values of E2M1 codes without their sign, which is the fourth bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Rows for which values of groups are spread over columns at a time.
ROWS_AT_ONCE = 4096

# Changes its first argument by the second, which is broadcast.
Operation = Callable[[torch.Tensor, torch.Tensor], object]
multiply: Operation = torch.Tensor.mul_
subtract: Operation = torch.Tensor.sub_


def powers(codes: torch.Tensor) -> torch.Tensor:
    """Return 2**(code - 127) of uint8 codes (E8M0), as float32; code 255 is not finite."""
    bits = codes.int() << 23  # the exponent of a float32
    bits[codes == 0] = 1 << 22  # 2**-127 is smaller than any with an exponent
    return bits.view(torch.float32)


def number(values: torch.Tensor) -> torch.Tensor:
    """Return scales or zero points as float32; bytes are powers of two."""
    return powers(values) if values.dtype == torch.uint8 else values.float()


def fp4(codes: torch.Tensor) -> torch.Tensor:
    """Return the values [rows, 2 * bytes] of E2M1 codes in uint8 [rows, bytes], the low bits first, as float32."""
    return _pairs().index_select(0, codes.reshape(-1).int()).view(len(codes), -1)


@cache
def _pairs() -> torch.Tensor:
    """Return the two values [256, 2] in each byte."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = torch.arange(256)
    return torch.stack((values[codes & 15], values[codes >> 4]), 1)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` numbers of `bits` bits in each row of int32 [rows, words], as uint8 [rows, count].

    A row is one stream of bits, lowest first.
    """
    data = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    period, numbers = bits // gcd(bits, 8), 8 // gcd(bits, 8)  # bytes after which numbers start at a byte again
    data = torch.nn.functional.pad(data, (0, -data.shape[1] % period)).reshape(len(data), -1, period)
    unpacked = torch.empty((*data.shape[:2], numbers), dtype=torch.uint8)
    for i in range(numbers):
        byte, start = divmod(i * bits, 8)
        value = data[:, :, byte] >> start
        if start + bits > 8:
            value |= data[:, :, byte + 1] << (8 - start)
        unpacked[:, :, i] = value & ((1 << bits) - 1)
    return unpacked.flatten(1)[:, :count]


def by_block(weights: torch.Tensor, values: torch.Tensor, block: tuple[int, int], operation: Operation) -> torch.Tensor:
    """Apply `operation` to each block of `weights` [rows, cols] with its value; return `weights`, which it changes.

    `values` has one for each block of so many rows and columns; the blocks at the edges may be shorter.
    """
    rows, cols = block
    if weights.shape[1] % cols:
        values, cols = values.repeat_interleave(cols, 1)[:, : weights.shape[1]], 1
    whole = weights.shape[0] // rows
    for part, own in ((weights[: whole * rows], values[:whole]), (weights[whole * rows :], values[whole:])):
        if len(part):
            operation(part.view(len(own), -1, own.shape[1], cols), own[:, None, :, None])
    return weights


def affine(
    numbers: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None,
    group_size: int | None = None,
) -> torch.Tensor:
    """Return (numbers - zeros) * scales as float32 [rows, cols].

    numbers is uint8 [rows, cols]. zeros and scales are float32 [rows or 1, groups]. `groups` is the group of each
    column; without it, `group_size` neighbours share a group, or as many as make the groups equal.
    """
    weights = numbers.contiguous().float()
    rows, cols = weights.shape
    for values, operation in ((zeros, subtract), (scales, multiply)):
        if groups is None:
            by_block(weights, values, (rows // len(values), group_size or cols // values.shape[1]), operation)
            continue
        parts = (torch.split(each, ROWS_AT_ONCE) for each in (weights, values.expand(rows, -1)))
        for part, own in zip(*parts, strict=True):
            operation(part, own[:, groups.long()])
    return weights
