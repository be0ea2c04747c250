"""Matrices of tiers as whole numbers: every value is that of `tiers.dequantize`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from dymoe_compile.export.matrices import Format, WholeNumbers, grown, of_tier, packed, rounded, values_of
from dymoe_runtime.bundle.tiers import (
    MXFP4,
    TRELLIS,
    QuantizedMatrix,
    dequantize,
    make_layout,
    pack_record,
    split_record,
)
from dymoe_runtime.errors import DymoeError

LADDERS = [(2, 3, 4), (2, 4, 6), (3,), (4, 7), (5,), (2, 8)]


def record(ladder: tuple[int, ...], grid: str = "", cols: int = 130) -> tuple[list[np.ndarray], object]:
    """The segments of a random record of one matrix, and the matrix's layout."""
    random = np.random.default_rng(0)
    layout = make_layout({"weight": (5, cols)}, ladder, grid=grid)
    where = layout.matrices["weight"]
    codes = random.integers(0, 2 ** ladder[-1], (5, cols)).astype(np.uint8)
    shared = random.integers(0, 16, (5, where.scales)).astype(np.uint8)
    indices = {
        t: shared if grid == MXFP4 else random.integers(0, 16, (5, where.scales)).astype(np.uint8) for t in ladder
    }
    multiplier = (random.uniform(0.001, 0.1, 5).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    matrix = QuantizedMatrix(codes, indices, multiplier)
    return split_record(layout, pack_record(layout, {"weight": matrix})), where


@pytest.mark.parametrize(
    ("ladder", "tier", "grid"),
    [
        *((ladder, tier, "") for ladder in LADDERS for tier in ladder if tier < 8),
        *(((2, 3, 4), tier, MXFP4) for tier in (2, 3, 4)),
        *(((2, 3, 4, 5, 6), tier, TRELLIS) for tier in (2, 3, 4, 5, 6)),
    ],
)
def test_every_value_is_kept(ladder: tuple[int, ...], tier: int, grid: str) -> None:
    segments, where = record(ladder, grid)
    numbers = of_tier(segments, where, tier)
    expected = dequantize(segments, where, tier)
    form = Format(8, where.span)
    assert np.array_equal(values_of(numbers, form), expected) and np.abs(expected).max() > 0
    wide = grown(numbers, form, (7, form.padded(130)))
    assert isinstance(wide, WholeNumbers)
    assert np.array_equal(values_of(wide, form)[:5, :130], expected)
    assert not values_of(wide, form)[5:].any() and not values_of(wide, form)[:, 130:].any()


def test_8_bits_do_not_fit_and_say_so() -> None:
    segments, where = record((2, 8))
    with pytest.raises(DymoeError, match=r"tier 8: .*--tier"):
        of_tier(segments, where, 8)


@pytest.mark.parametrize("form", [Format(4, 32), Format(8, 32), Format(8, 64)])
def test_rounding_is_to_the_nearest_and_clips_nothing(form: Format) -> None:
    weight = np.random.default_rng(1).normal(size=(6, 100)).astype(np.float32)
    weight[2] = 0
    numbers = rounded(weight, form)
    steps = numbers.scales.repeat(form.block, axis=1)[:, :100]
    assert (np.abs(values_of(numbers, form) - weight) <= 0.5001 * steps).all()
    assert numbers.codes.min() >= 1 and numbers.codes.max() < 2**form.bits


def test_codes_of_4_bits_are_packed_low_bits_first() -> None:
    assert packed(np.array([[1, 2, 15, 0]], np.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert packed(np.array([[1, 2]], np.uint8), 8).tolist() == [[1, 2]]
