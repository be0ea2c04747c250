"""Products with records and with plain weights: every instruction set of this machine against the reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from kernel_kit import (
    ALL,
    COMPILED,
    assert_within,
    grid_input,
    kernels_of,
    narrow,
    random_input,
    random_record,
    reference,
    rounding,
    weight,
    with_threads,
)

from dymoe_runtime.bundle import tiers
from dymoe_runtime.bundle.tiers import MX_BLOCK, MXFP4, TRELLIS

LADDERS = [(2, 3, 4), (2, 3, 4, 8), (8,), (4,), (6,), (3, 4), (2, 4), (3,), (5, 8), (7,), (4, 6)]
SMALL_LADDERS = [(2, 3, 4), (4,), (3, 4), (2, 4), (3,), (2,)]
GRIDS = {"": LADDERS, MXFP4: SMALL_LADDERS, TRELLIS: [*SMALL_LADDERS, (2, 3, 4, 5, 6), (3, 6), (5,)]}
CASES = [(grid, ladder, tier) for grid, ladders in GRIDS.items() for ladder in ladders for tier in ladder]
TOKENS = (0, 1, 2, 5, 33, 200)

# Records


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize(("grid", "ladder", "tier"), CASES)
def test_linear_equals_the_reference(isa: str, grid: str, ladder: tuple[int, ...], tier: int) -> None:
    """Within |w| . (half a code of each activation), the bound of int8 activations."""
    for rows, cols in ((37, 200), (4, 64), (1, 2), (19, 1100), (6, 1085), (9, 150), (5, 40), (13, 96), (10, 176)):
        layout, segments = weight(rows, cols, ladder, grid)
        given = segments[: layout.segments_of(tier)]
        w = reference.dequantize(layout, tier, given, "weight")
        for tokens in TOKENS if cols == 200 else (1, 5):
            x = random_input(tokens, cols)
            y = kernels_of(isa).linear(layout, tier, given, x)
            assert_within(y, reference.linear(layout, tier, given, x), rounding(x) @ np.abs(w).T)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize(("grid", "ladder"), [("", (4,)), ("", (3, 4)), ("", (2, 8)), (MXFP4, (3, 4))])
def test_splits_that_no_layout_of_ours_has_are_read(
    isa: str, grid: str, ladder: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planes of one bit only, which are unpacked one by one."""
    monkeypatch.setattr(tiers, "plane_widths", lambda bits: (1,) * bits)
    made = random_record.__wrapped__((("weight", 9, 150),), ladder, grid=grid)  # not one that was made before
    layout, segments = made
    assert {plane.width for plane in layout.matrices["weight"].planes} == {1}
    for tier in ladder:
        w = reference.dequantize(layout, tier, segments, "weight")
        assert np.array_equal(kernels_of(isa).dequantize(layout, tier, segments, "weight"), w)
        for tokens in (1, 5):
            x = random_input(tokens, 150)
            y = kernels_of(isa).linear(layout, tier, segments, x)
            assert_within(y, x @ w.T, rounding(x) @ np.abs(w).T)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize(("grid", "ladder", "tier"), CASES)
def test_exact_activations_leave_float_rounding(isa: str, grid: str, ladder: tuple[int, ...], tier: int) -> None:
    layout, segments = weight(21, 1100, ladder, grid)
    for tokens in (1, 7):
        x = grid_input(tokens, 1100)
        expected = x.astype(np.float64) @ reference.dequantize(layout, tier, segments, "weight").astype(np.float64).T
        y = kernels_of(isa).linear(layout, tier, segments, x)
        assert_within(y, expected, 0.0)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
@pytest.mark.parametrize("tier", [2, 3, 4])
def test_groups_of_mxfp4_have_scales_of_their_own(isa: str, tier: int, tokens: int) -> None:
    """A product with one group is as exact as its scale, though other scales of the row are 2^15 times larger."""
    layout, segments = weight(21, 176, (2, 3, 4), MXFP4)
    w = reference.dequantize(layout, tier, segments, "weight").astype(np.float64)
    for first in range(0, 176, MX_BLOCK):
        x = np.zeros((tokens, 176), np.float32)
        x[:, first : first + MX_BLOCK] = grid_input(tokens, 256)[:, 64 : 64 + min(MX_BLOCK, 176 - first)]
        y, scale = kernels_of(isa).linear(layout, tier, segments, x), np.abs(x) @ np.abs(w).T
        assert (np.abs(y - x @ w.T) <= 1e-5 * scale).all()


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize(("grid", "ladder", "tier"), CASES)
def test_rows_equal_the_reference_bit_for_bit(isa: str, grid: str, ladder: tuple[int, ...], tier: int) -> None:
    layout, segments = weight(37, 200, ladder, grid)
    kernels = kernels_of(isa)
    expected = reference.dequantize(layout, tier, segments, "weight")
    ids = np.array([36, 0, 5, 5])
    assert np.array_equal(kernels.dequantize(layout, tier, segments, "weight"), expected)
    assert np.array_equal(kernels.embed(layout, tier, segments, ids), expected[ids])
    assert np.array_equal(reference.embed(layout, tier, segments, ids), expected[ids])
    assert kernels.embed(layout, tier, segments, ids[:0]).shape == (0, 200)
    # Scale indices of an odd number of blocks leave half a byte at the end of each row.
    for cols in (1085, 40, 96, 176):
        layout, segments = weight(3, cols, ladder, grid)
        dense = kernels.dequantize(layout, tier, segments, "weight")
        assert np.array_equal(dense, reference.dequantize(layout, tier, segments, "weight"))


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_activation_spoils_its_token_only(isa: str, bad: float) -> None:
    layout, segments = weight(37, 200, (2, 3, 4))
    x = random_input(3, 200)
    x[1, 150] = bad
    y = kernels_of(isa).linear(layout, 3, segments, x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("isa", COMPILED)
def test_tiny_and_huge_activations(isa: str) -> None:
    layout, segments = weight(37, 200, (4,))
    x = np.array([[0.0], [1e-42], [1e30]], np.float32).repeat(200, axis=1)
    y = kernels_of(isa).linear(layout, 4, segments, x)
    assert_within(y[:2], np.zeros((2, 37)), 1e-30)
    assert_within(y[2:], reference.linear(layout, 4, segments, x[2:]), 0.0)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tokens", [1, 33, 200])
def test_threads_and_company_do_not_change_a_token(isa: str, tokens: int, grid: str) -> None:
    layout, segments = weight(531, 1100, (2, 3, 4), grid)
    kernels = kernels_of(isa)
    x = random_input(tokens, 1100)
    results = with_threads(kernels, lambda: kernels.linear(layout, 3, segments, x))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[0][-1:], kernels.linear(layout, 3, segments, x[-1:]))


@pytest.mark.parametrize("isa", COMPILED[:1])
def test_callers_at_once_do_not_disturb_each_other(isa: str) -> None:
    layout, segments = weight(531, 1100, (2, 3, 4))
    kernels = kernels_of(isa)
    inputs = [random_input(1 + i % 3, 1100, seed=i) for i in range(200)]
    expected = [kernels.linear(layout, 4, segments, x) for x in inputs]
    before = kernels.threads()
    try:
        kernels.set_threads(3)
        with ThreadPoolExecutor(4) as callers:
            results = list(callers.map(lambda x: kernels.linear(layout, 4, segments, x), inputs))
    finally:
        kernels.set_threads(before)
    assert all(map(np.array_equal, results, expected))


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("grid", GRIDS)
def test_unaligned_segments_are_read(isa: str, grid: str) -> None:
    layout, segments = weight(37, 200, (2, 3, 4), grid)
    moved = [np.concatenate([np.zeros(1, np.uint8), segment])[1:] for segment in segments]
    x, kernels = random_input(5, 200), kernels_of(isa)
    assert np.array_equal(kernels.linear(layout, 4, moved, x), kernels.linear(layout, 4, segments, x))


@pytest.mark.parametrize("isa", ALL)
def test_products_refuse_what_does_not_fit(isa: str) -> None:
    layout, segments = weight(37, 200, (2, 3, 4))
    kernels, x = kernels_of(isa), random_input(2, 200)
    short = segments[0][: layout.segment_bytes[0] // 2]
    wrong = [
        lambda: kernels.linear(layout, 3, segments[:1], x),
        lambda: kernels.linear(layout, 2, [short], x),
        lambda: kernels.linear(layout, 2, [segments[0].view(np.int8)], x),
        lambda: kernels.linear(layout, 5, segments, x),
        lambda: kernels.linear(layout, 3, segments, np.ascontiguousarray(x[:, :-1])),
        lambda: kernels.linear(layout, 3, segments, x.astype(np.float64)),
        lambda: kernels.embed(layout, 3, segments, np.array([37])),
        lambda: kernels.embed(layout, 3, segments, np.array([-1])),
    ]
    for call in wrong:
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("isa", COMPILED)
def test_grids_that_do_not_fit_are_refused(isa: str) -> None:
    """As a layout says of itself that it has another grid than the one that it was made for."""
    kernels, x = kernels_of(isa), random_input(2, 200)
    for made, said, ladder, why in (
        ("", MXFP4, (2, 3, 4), "does not fit its shape"),
        (MXFP4, "", (2, 3, 4), "does not fit its shape"),
        ("", MXFP4, (2, 8), "4 bits at most"),
        ("", "nvfp4", (2, 3, 4), "nvfp4"),
    ):
        layout, segments = weight(37, 200, ladder, made)
        matrices = {"weight": replace(layout.matrices["weight"], grid=said)}
        with pytest.raises(ValueError, match=why):
            kernels.linear(replace(layout, matrices=matrices), 2, segments, x)


@pytest.mark.parametrize("isa", COMPILED)
def test_products_refuse_strided_arrays(isa: str) -> None:
    layout, segments = weight(37, 200, (2, 3, 4))
    with pytest.raises(ValueError, match="contiguous"):
        kernels_of(isa).linear(layout, 3, segments, random_input(200, 2).T)
    with pytest.raises(ValueError, match="contiguous"):
        kernels_of(isa).linear(layout, 2, [segments[0].repeat(2)[::2]], random_input(2, 200))


# Plain weights


def plain_weight(rows: int, cols: int, is_bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    """A weight as `matmul` takes it, and its values, float64."""
    values = random_input(rows, cols, seed=5)
    if not is_bf16:
        return values, values.astype(np.float64)
    return narrow(values), tiers.widen_bf16(narrow(values)).astype(np.float64)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("is_bf16", [False, True], ids=["float", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (7, 15), (3, 17), (37, 200), (131, 1100), (6, 1085)], ids=str)
def test_matmul_equals_the_reference(isa: str, shape: tuple[int, int], is_bf16: bool) -> None:
    """And both the product in double precision."""
    given, values = plain_weight(*shape, is_bf16)
    for tokens in (0, 1, 2, 5, 33):
        x = random_input(tokens, shape[1])
        y = kernels_of(isa).matmul(x, given)
        assert y.dtype == np.float32
        assert_within(y, reference.matmul(x, given), 0.0)
        assert_within(y, x @ values.T, 0.0)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("is_bf16", [False, True], ids=["float", "bf16"])
def test_threads_and_company_do_not_change_a_token_of_matmul(isa: str, is_bf16: bool) -> None:
    given, _ = plain_weight(531, 1085, is_bf16)
    kernels = kernels_of(isa)
    x = random_input(33, 1085)
    results = with_threads(kernels, lambda: kernels.matmul(x, given))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    for tokens in (slice(0, 1), slice(32, 33), slice(3, 8)):
        assert np.array_equal(results[0][tokens], kernels.matmul(x[tokens], given))


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("is_bf16", [False, True], ids=["float", "bf16"])
def test_matmul_refuses_other_columns(isa: str, is_bf16: bool) -> None:
    given, _ = plain_weight(37, 200, is_bf16)
    for cols in (1, 199, 201):
        with pytest.raises(ValueError, match="200 columns"):
            kernels_of(isa).matmul(random_input(2, cols), given)


@pytest.mark.parametrize("isa", COMPILED)
def test_matmul_refuses_arrays_that_it_cannot_read(isa: str) -> None:
    x, given = random_input(2, 200), random_input(37, 200)
    for x_, given_ in (
        (random_input(200, 2).T, given),
        (x.astype(np.float64), given),
        (x[0], given),
        (x, random_input(200, 37).T),
        (x, given.astype(np.float64)),
        (x, given.astype(np.int16)),
        (x, given[0]),
    ):
        with pytest.raises(ValueError, match="contiguous"):
            kernels_of(isa).matmul(x_, given_)
