"""Types of llama.cpp's quantizers: their bits, and the errors that they leave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightType:
    """A type of llama.cpp: its bits per weight, the columns of a block, and its squared error.

    The error is relative to the squared weights, both weighted by the importance of columns. It was measured with
    llama-quantize and an importance matrix on matrices of the model in examples/. A type may need such a matrix.
    """

    name: str
    bits: float
    block: int
    error: float
    needs_importance: bool = False


TYPES = (
    WeightType("iq2_xxs", 2.0625, 256, 0.1036, True),
    WeightType("iq2_xs", 2.3125, 256, 0.0785, True),
    WeightType("iq2_s", 2.5625, 256, 0.0559, True),
    WeightType("q2_K", 2.625, 256, 0.0634),
    WeightType("iq3_xxs", 3.0625, 256, 0.0283, True),
    WeightType("iq3_s", 3.4375, 256, 0.01646),
    WeightType("q3_K", 3.4375, 256, 0.01917),
    WeightType("iq4_xs", 4.25, 256, 0.00528),
    WeightType("q4_K", 4.5, 256, 0.0045),
    WeightType("iq4_nl", 4.5, 32, 0.00518),
    WeightType("q4_0", 4.5, 32, 0.00618),
    WeightType("q5_K", 5.5, 256, 0.00114),
    WeightType("q5_0", 5.5, 32, 0.00152),
    WeightType("q5_1", 6.0, 32, 0.00103),
    WeightType("q6_K", 6.5625, 256, 0.000274),
    WeightType("q8_0", 8.5, 32, 0.000028),
)
# What llama-quantize makes of rows that are no multiple of 32 columns.
HALF = WeightType("f16", 16, 1, 0.0)


def types_for(cols: int, has_importance: bool = True) -> list[WeightType]:
    """Return the types for rows of `cols` columns, which an importance matrix may be known for."""
    fitting = [each for each in TYPES if cols % each.block == 0 and (has_importance or not each.needs_importance)]
    return fitting or [HALF]
