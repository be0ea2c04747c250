"""Types of llama.cpp's quantizers: their bits, and the errors that they leave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightType:
    """A type of llama.cpp: its bits per weight, the columns of a block, and its squared error.

    The error is relative to the squared weights, both weighted by the importance of columns. It was measured with
    llama-quantize and an importance matrix on the experts of the model in examples/.
    """

    name: str
    bits: float
    block: int
    error: float


# By rising bits.
TYPES: tuple[WeightType, ...] = ()
# What llama-quantize makes of rows that are no multiple of 32 columns.
HALF = WeightType("f16", 16, 1, 0.0)


def types_for(cols: int) -> list[WeightType]:
    """Return the types whose blocks divide a row of `cols` columns."""
    return [each for each in TYPES if cols % each.block == 0] or [HALF]
