"""Nested quantization: how near the tiers come, and what must not change them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from quantize_kit import (
    DESCENT,
    assert_same,
    at_tier,
    correlated,
    error,
    gaussian,
    grid,
    moments_of,
    one_torch_thread,
    quantized,
)

from dymoe_compile.quantize import quantize
from dymoe_compile.quantize.grid import tier_weights
from dymoe_compile.quantize.moments import Moments
from dymoe_compile.quantize.quantize import quantize_expert
from dymoe_runtime.bundle.tiers import (
    BLOCK,
    SCALE_SIZES,
    blocks_of,
    levels_of,
    tier_scales,
    unit_of,
)

LADDERS = [(2, 3, 4), (2, 3, 4, 8), (8,), (4,), (2,), (3, 5), (2, 6)]
# Steps are 8 % apart, so that a scale is off by up to this much of the weight.
HALF_STEP = 0.055


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.mark.parametrize("shape", [(5, 130), (1, 1), (7, 64), (3, 1), (2, 63), (1, 500)], ids=str)
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_quantized_matrix_has_the_types_and_shapes_of_the_format(
    ladder: tuple[int, ...], shape: tuple[int, int]
) -> None:
    matrix = quantized(gaussian(*shape), ladder)
    assert matrix.codes.dtype == np.uint8
    assert matrix.codes.shape == shape
    assert matrix.codes.flags["C_CONTIGUOUS"]
    assert matrix.codes.max() < 2 ** ladder[-1]
    assert tuple(matrix.scale_indices) == ladder
    assert all(
        s.dtype == np.uint8 and s.shape == (shape[0], blocks_of(shape[1])) for s in matrix.scale_indices.values()
    )
    assert matrix.multiplier.dtype == np.float32
    assert not (matrix.multiplier.view(np.uint32) & 0xFFFF).any()  # bf16 holds them
    assert matrix.multiplier.shape == (shape[0],)
    for tier in ladder:
        assert at_tier(matrix, ladder, tier).isfinite().all()


@pytest.mark.parametrize("cols", [1, 20, 64, 100, 192])
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_the_error_falls_with_the_tier(ladder: tuple[int, ...], cols: int) -> None:
    weight = gaussian(64, cols)
    errors = [error(weight, ladder, tier).sum().item() for tier in ladder]
    # A single column has blocks of one weight, which every tier can represent; then rounding of steps decides.
    assert all(low > high for low, high in itertools.pairwise(errors)) or cols == 1
    # The relative error of a Gaussian falls to about a third with every bit.
    total = weight.square().sum().item()
    assert all(e < 0.16 * total * 3.0 ** -(tier - 2) for e, tier in zip(errors, ladder, strict=True))


@pytest.mark.parametrize(
    ("ladder", "tier", "factor"),
    # Measured 1.028, 1.069, 1.014.
    [
        ((2, 3, 4), 2, 1.05),
        ((2, 3, 4), 3, 1.09),
        ((2, 3, 4), 4, 1.03),
        # Below eight bits levels are even, and nothing is clipped for the sake of lower tiers: 1.27, 1.31, 1.34.
        ((2, 3, 4, 8), 2, 1.30),
        ((2, 3, 4, 8), 3, 1.34),
        ((2, 3, 4, 8), 4, 1.37),
        ((2, 3, 4, 8), 8, 1.15),
        ((3, 5), 3, 1.26),
        ((3, 5), 5, 1.05),
    ],
)
def test_nesting_costs_little_against_quantizing_a_tier_alone(
    ladder: tuple[int, ...], tier: int, factor: float
) -> None:
    weight = gaussian(256, 512)
    alone = error(weight, (tier,), tier).sum()
    assert alone * 0.99 <= error(weight, ladder, tier).sum() <= alone * factor


@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 3, 4, 8), (2, 6), (4,)], ids=str)
def test_scales_are_the_stored_ones_nearest_to_least_squares(ladder: tuple[int, ...]) -> None:
    """At every tier, for the codes that it inherits."""
    weight = gaussian(30, 128)
    matrix = quantized(weight, ladder)
    w = weight.view(30, -1, BLOCK).numpy()
    for tier in ladder:
        shift = ladder[-1] - tier
        levels = levels_of(tier, ladder[-1])[matrix.codes >> shift].reshape(30, -1, BLOCK)
        fitted = (levels * w).sum(-1) / np.square(levels).sum(-1)
        unit = matrix.multiplier[:, None] * np.float32(unit_of(tier, ladder[-1]))
        off = np.abs(fitted[..., None] - unit[..., None] * SCALE_SIZES[1:])
        stored = tier_scales(matrix.scale_indices[tier], matrix.multiplier, tier, ladder[-1])
        assert (np.abs(stored - fitted) <= off.min(-1) + 1e-5 * fitted).all()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_codes_of_lower_tiers_are_the_floor_of_the_top_ones(ladder: tuple[int, ...]) -> None:
    """What a record gives for a tier is the top bits of the codes, on that tier's own grid."""
    weight = gaussian(9, 150)
    matrix = quantized(weight, ladder, moments_of(correlated(600, 150)))
    for tier in ladder:
        codes = matrix.codes // 2 ** (ladder[-1] - tier)
        scales = tier_scales(matrix.scale_indices[tier], matrix.multiplier, tier, ladder[-1])
        expected = scales.repeat(BLOCK, axis=1)[:, :150] * levels_of(tier, ladder[-1])[codes]
        assert np.array_equal(at_tier(matrix, ladder, tier).numpy(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_one_tier_is_better_than_plain_rounding_to_the_largest_magnitude(bits: int) -> None:
    weight = gaussian(64, 256)
    blocks = weight.view(64, -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / (2**bits / 2 - 0.5)
    plain = ((blocks / scale + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1) - (2**bits - 1) / 2) * scale
    # From six bits on scales are rounded up to a step, by 5 % on average and 11 % at most.
    assert error(weight, (bits,), bits).sum() <= (plain - blocks).square().sum() * (1.05 if bits < 6 else 1.2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_on_a_grid_come_back_up_to_the_rounding_of_steps(bits: int, seed: int) -> None:
    """The multiplier is one for the row, with room for all scales, so that steps are not those of the grid."""
    weight, codes = grid(bits, 16, 5, seed)
    matrix = quantized(weight, (bits,))
    assert np.array_equal(matrix.codes, codes)
    assert ((at_tier(matrix, (bits,), bits) - weight).abs() <= HALF_STEP * weight.abs()).all()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_rows_and_blocks_of_zeros_come_back_as_zeros(ladder: tuple[int, ...]) -> None:
    weight = gaussian(4, 192)
    weight[1] = 0.0
    weight[2, 64:128] = 0.0
    matrix = quantized(weight, ladder)
    for tier in ladder:
        values = at_tier(matrix, ladder, tier)
        assert (values[weight == 0] == 0).all()
        assert (values[0] != 0).any()
        assert (values[3] != 0).all()


def test_a_matrix_of_zeros_is_no_error() -> None:
    assert not at_tier(quantized(torch.zeros(3, 70), (2, 3, 4)), (2, 3, 4), 2).any()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_rows_do_not_influence_each_other(ladder: tuple[int, ...]) -> None:
    weight = gaussian(12, 150)
    scaled = weight * torch.logspace(-12, 12, 12)[:, None]
    together = quantized(scaled, ladder)
    for row in range(12):
        alone = quantized(scaled[row : row + 1], ladder)
        assert np.array_equal(together.codes[row], alone.codes[0])
        assert all(np.array_equal(together.scale_indices[t][row], alone.scale_indices[t][0]) for t in ladder)
        assert together.multiplier[row] == alone.multiplier[0]


def test_rows_of_any_size_are_quantized_equally_well() -> None:
    weight = gaussian(12, 150)
    scale = torch.logspace(-12, 12, 12)[:, None]
    for tier, bound in ((2, 0.2), (3, 0.06), (4, 0.02)):
        relative = error(weight * scale, (2, 3, 4), tier).sum(1) / (weight * scale).square().sum(1)
        assert relative.max() < bound


@pytest.mark.parametrize("power", [-20, -3, 1, 17])
@pytest.mark.parametrize("ladder", [(2, 3, 4), (8,), (2, 3, 4, 8)], ids=str)
def test_scaling_by_a_power_of_two_scales_the_result_exactly(ladder: tuple[int, ...], power: int) -> None:
    weight = gaussian(6, 100)
    matrix, scaled = quantized(weight, ladder), quantized(weight * 2.0**power, ladder)
    assert np.array_equal(matrix.codes, scaled.codes)
    for tier in ladder:
        assert torch.equal(at_tier(matrix, ladder, tier) * 2.0**power, at_tier(scaled, ladder, tier))


@pytest.mark.parametrize("ladder", [(2, 3, 4), (8,)], ids=str)
def test_a_column_of_padding_changes_nothing(ladder: tuple[int, ...]) -> None:
    """Columns beyond the last are not zeros that pull at the scale."""
    weight = gaussian(20, 64 + 7)
    matrix = quantized(weight, ladder)
    tail = quantized(weight[:, 64:].contiguous(), ladder)
    whole_tail = quantized(weight[:, 64:].repeat(1, 9), ladder)
    for tier in ladder:
        got = (at_tier(matrix, ladder, tier)[:, 64:] - weight[:, 64:]).square().sum()
        alone = (at_tier(tail, ladder, tier) - weight[:, 64:]).square().sum()
        # For a multiplier that serves another block too; a step of 8 bits is rounded up by up to 11 %.
        assert got <= alone * 1.25 + 1e-4
    assert np.array_equal(whole_tail.codes[:, :7], whole_tail.codes[:, 7:14])


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_single_column_is_nearly_exact_at_its_highest_tier(ladder: tuple[int, ...]) -> None:
    weight = gaussian(50, 1)
    values = at_tier(quantized(weight, ladder), ladder, ladder[-1])
    assert ((values - weight).abs() <= HALF_STEP * weight.abs()).all()


def test_signs_are_kept_at_every_tier() -> None:
    weight = gaussian(30, 200)
    matrix = quantized(weight, (2, 3, 4))
    for tier in (2, 3, 4):
        assert torch.equal(at_tier(matrix, (2, 3, 4), tier).sign(), weight.sign())


def test_half_precision_weights_are_quantized_by_value() -> None:
    weight = gaussian(4, 70).to(torch.bfloat16)
    assert_same(quantized(weight, (2, 3, 4)), quantized(weight.float(), (2, 3, 4)))


def test_strided_weights_are_quantized_by_value() -> None:
    weight = gaussian(128, 6).t()
    assert_same(quantized(weight, (2, 3, 4)), quantized(weight.contiguous(), (2, 3, 4)))


@pytest.mark.parametrize("ladder", [(2, 3, 4), (8,)], ids=str)
def test_the_arguments_are_left_as_they_are(ladder: tuple[int, ...]) -> None:
    weight, moments = gaussian(4, 128), moments_of(correlated(200, 128))
    before, hessian = weight.clone(), moments.hessian.clone()
    quantized(weight, ladder, moments)
    assert torch.equal(weight, before) and torch.equal(moments.hessian, hessian)


def test_single_fine_tiers_are_rounded_whatever_the_inputs() -> None:
    weight, moments = gaussian(6, 130), moments_of(correlated(300, 130))
    for bits in (6, 7, 8):
        assert_same(quantized(weight, (bits,), moments), quantized(weight, (bits,)))


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_the_lowest_tier_counts_most_for_its_size(ladder: tuple[int, ...]) -> None:
    weights = tier_weights(ladder)
    assert len(weights) == len(ladder) and weights[-1] == 1.0
    relative = [weight * 4.0 ** (ladder[-1] - tier) for weight, tier in zip(weights, ladder, strict=True)]
    assert relative == [*sorted(relative[:-1], reverse=True), 1.0]


@pytest.mark.parametrize("ladder", [(2, 3, 4), (4,), (2, 3, 4, 8), (8,)], ids=str)
def test_chunks_of_rows_do_not_change_the_result(ladder: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(37, 200)
    expected = quantized(weight, ladder)
    for chunk in (1, 256, 256 * 5, 256 * 36):
        monkeypatch.setattr(quantize, "WEIGHTS_AT_ONCE", chunk)
        assert_same(quantized(weight, ladder), expected)


def test_quantizing_twice_gives_the_same_with_any_number_of_threads() -> None:
    weight, moments = gaussian(64, 300), moments_of(correlated(400, 300))
    for given in (None, moments):
        expected = quantized(weight, (2, 3, 4), given)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(quantized(weight, (2, 3, 4), given), expected)


def test_an_expert_is_quantized_matrix_by_matrix() -> None:
    weights = {"gate": gaussian(5, 70, 1), "up": gaussian(5, 70, 2), "down": gaussian(70, 5, 3)}
    moments = {"gate": moments_of(correlated(100, 70)), "down": moments_of(correlated(9, 5))}
    expert = quantize_expert(weights, (2, 3, 4), DESCENT, moments)
    assert list(expert) == list(weights)
    for name, weight in weights.items():
        assert_same(expert[name], quantized(weight, (2, 3, 4), moments.get(name)))
    plain = quantize_expert(weights, (2, 3, 4), DESCENT)
    assert_same(plain["up"], expert["up"])
    assert not np.array_equal(plain["gate"].codes, expert["gate"].codes)


@pytest.mark.parametrize("size", [8, 20, 100])
@pytest.mark.parametrize("ladder", [(2, 3, 4), (8,)], ids=str)
def test_an_outlier_harms_no_other_block_of_its_row(ladder: tuple[int, ...], size: int) -> None:
    """One weight of 8, 20 or 100 standard deviations, as trained models have them in some rows."""
    weight = gaussian(32, 512)
    outlying = weight.clone()
    outlying[:, 70] = size
    others = torch.ones(512, dtype=torch.bool)
    others[64:128] = False
    # Scales are finest within a row whose blocks are alike; the coarse ones leave others a step too large at most.
    for tier in ladder:
        assert error(outlying, ladder, tier)[:, others].sum() < 2 * error(weight, ladder, tier)[:, others].sum()


@pytest.mark.parametrize("tiny", [1e-39, 1e-44])
def test_weights_too_small_for_float_harm_no_others(tiny: float) -> None:
    """Subnormal weights, as weight decay leaves them in experts that are never used."""
    weight = torch.zeros(2, 128)
    weight[0, :64] = tiny * gaussian(1, 64)[0]
    weight[0, 64:], weight[1] = gaussian(1, 64, 1)[0], tiny * gaussian(1, 128, 2)[0]
    matrix = quantized(weight, (2, 3, 4))
    values = at_tier(matrix, (2, 3, 4), 4)
    assert values.isfinite().all()
    assert (values[1].abs() < 1e-37).all()
    # The first step is the least scale of a block that is not all zeros.
    assert (values[0, :64].abs() <= 0.5 * SCALE_SIZES[1] * matrix.multiplier[0].item()).all()
    assert (values[0, 64:] - weight[0, 64:]).square().sum() < 0.02 * weight[0, 64:].square().sum()


@pytest.mark.parametrize("moments", [None, moments_of(correlated(300, 130))], ids=["plain", "moments"])
@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 8), (8,)], ids=str)
def test_zeros_tiny_and_huge_weights_give_numbers(ladder: tuple[int, ...], moments: Moments | None) -> None:
    weight = gaussian(6, 130)
    weight[0] = 0
    weight[1] *= 1e-30
    weight[2] *= 1e30
    weight[3, 64:128] = 0
    weight[4, 7] = 1e30
    matrix = quantized(weight, ladder, moments)
    assert np.isfinite(matrix.multiplier).all()
    for tier in ladder:
        values = at_tier(matrix, ladder, tier)
        assert values.isfinite().all()
        assert not values[0].any() and not values[3, 64:128].any()
        # Squares of these are no floats, so that all codes look as good; rows beside them are not harmed.
        for row in (1, 2):
            assert values[row].abs().max() < 1.1 * weight[row].abs().max()
        assert (values[5] - weight[5]).square().sum() < 0.3 * weight[5].square().sum()
    zeros = quantized(torch.zeros(3, 130), ladder, moments)
    assert not any(at_tier(zeros, ladder, tier).any() for tier in ladder)
