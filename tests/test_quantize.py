"""Nested quantization: how near the tiers come, and what must not change them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dymoe_compile import quantize
from dymoe_compile.quantize import quantize_expert, quantize_matrix
from dymoe_runtime.tiers import (
    BLOCK,
    QuantizedMatrix,
    blocks_of,
    dequantize,
    make_layout,
    pack_record,
    split_record,
    tier_scales,
)

LADDERS = [(2, 3, 4), (2, 3, 4, 8), (8,), (4,), (2,), (3, 5), (2, 6)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are small here; threads that wait for each other take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def at_tier(matrix: QuantizedMatrix, ladder: tuple[int, ...], tier: int) -> torch.Tensor:
    """The values of a tier, from a record as it is stored."""
    layout = make_layout({"m": matrix.codes.shape}, ladder)
    return dequantize(split_record(layout, pack_record(layout, {"m": matrix})), layout.matrices["m"], tier)


def error(
    weight: torch.Tensor, ladder: tuple[int, ...], tier: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error of each weight at `tier`."""
    return (at_tier(quantize_matrix(weight, ladder, importance), ladder, tier) - weight).square()


def assert_same(a: QuantizedMatrix, b: QuantizedMatrix) -> None:
    assert np.array_equal(a.codes, b.codes)
    assert list(a.steps) == list(b.steps)
    assert all(np.array_equal(a.steps[tier], b.steps[tier]) for tier in a.steps)
    assert torch.equal(a.multiplier, b.multiplier)


@pytest.mark.parametrize("shape", [(5, 130), (1, 1), (7, 64), (3, 1), (2, 63), (1, 500)], ids=str)
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_quantized_matrix_has_the_types_and_shapes_of_the_format(
    ladder: tuple[int, ...], shape: tuple[int, int]
) -> None:
    matrix = quantize_matrix(gaussian(*shape), ladder)
    assert matrix.codes.dtype == np.uint8
    assert matrix.codes.shape == shape
    assert matrix.codes.flags["C_CONTIGUOUS"]
    assert matrix.codes.max() < 2 ** ladder[-1]
    assert tuple(matrix.steps) == ladder
    assert all(s.dtype == np.uint8 and s.shape == (shape[0], blocks_of(shape[1])) for s in matrix.steps.values())
    assert matrix.multiplier.dtype == torch.bfloat16
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
    # Measured 1.095, 1.032, 1.038; 1.18, 1.042, 1.001 where the top is not clipped for the sake of the lower tiers.
    [
        ((2, 3, 4), 2, 1.12),
        ((2, 3, 4), 3, 1.05),
        ((2, 3, 4), 4, 1.05),
        ((2, 3, 4, 8), 2, 1.22),
        ((2, 3, 4, 8), 4, 1.06),
        ((2, 3, 4, 8), 8, 1.01),
    ],
)
def test_nesting_costs_little_against_quantizing_a_tier_alone(
    ladder: tuple[int, ...], tier: int, factor: float
) -> None:
    weight = gaussian(256, 512)
    alone = error(weight, (tier,), tier).sum()
    assert alone * 0.99 <= error(weight, ladder, tier).sum() <= alone * factor


@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 3, 4, 8), (2, 6)], ids=str)
def test_the_scales_of_lower_tiers_are_fitted_to_the_codes_they_inherit(ladder: tuple[int, ...]) -> None:
    """Within half a step of the least-squares scale."""
    weight = gaussian(30, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
    matrix = quantize_matrix(weight, ladder, importance)
    q, w = importance.view(-1, BLOCK), weight.view(30, -1, BLOCK)
    for tier in ladder[:-1]:
        shift = ladder[-1] - tier
        levels = torch.from_numpy(matrix.codes >> shift).float().view(30, -1, BLOCK) - (2**tier - 1) / 2
        fitted = (q * levels * w).sum(-1) / (q * levels * levels).sum(-1)
        steps = fitted / (matrix.multiplier.float()[:, None] * 2**shift)
        assert ((torch.from_numpy(matrix.steps[tier]) - steps.clamp(1, 255)).abs() <= 0.5001).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_one_tier_is_better_than_plain_rounding_to_the_largest_magnitude(bits: int) -> None:
    weight = gaussian(64, 256)
    blocks = weight.view(64, -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / (2**bits / 2 - 0.5)
    plain = ((blocks / scale + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1) - (2**bits - 1) / 2) * scale
    # 1 % for steps of 8 bits.
    assert error(weight, (bits,), bits).sum() <= (plain - blocks).square().sum() * 1.01


def grid(bits: int, rows: int, blocks: int, seed: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray, torch.Tensor]:
    """Weights on a grid of the format, and the codes, steps and multipliers of it.

    The largest step of a row is 253: then the multiplier that leaves room for rounding up is the row's own.
    """
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, blocks * BLOCK), np.uint8)
    codes[:, ::BLOCK] = 0  # every block has the largest magnitude of its scale
    steps = rng.integers(1, 254, (rows, blocks), np.uint8)
    steps[:, 0] = 253
    multiplier = torch.from_numpy(rng.uniform(0.01, 3.0, rows)).to(torch.bfloat16)
    scales = tier_scales(torch.from_numpy(steps), multiplier, bits, bits).repeat_interleave(BLOCK, 1)
    return scales * (torch.from_numpy(codes).float() - (2**bits - 1) / 2), codes, steps, multiplier


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_weights_on_a_grid_of_the_format_come_back_exactly(bits: int, seed: int) -> None:
    weight, codes, steps, multiplier = grid(bits, 16, 5, seed)
    matrix = quantize_matrix(weight, (bits,))
    assert np.array_equal(matrix.codes, codes)
    assert np.array_equal(matrix.steps[bits], steps)
    assert torch.equal(matrix.multiplier, multiplier)
    assert torch.equal(at_tier(matrix, (bits,), bits), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_on_any_uniform_grid_come_back_up_to_the_rounding_of_steps(bits: int) -> None:
    """A grid whose scale is no step of the row's multiplier is off by at most half a step."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (20, 3 * BLOCK))
    codes[:, ::BLOCK] = 0
    scales = np.repeat(rng.uniform(0.5, 1.0, (20, 3)), BLOCK, axis=1)
    levels = codes - (2**bits - 1) / 2
    weight = torch.from_numpy(scales * levels).float()
    matrix = quantize_matrix(weight, (bits,))
    assert np.array_equal(matrix.codes, codes)
    half_step = matrix.multiplier.float()[:, None] / 2 * torch.from_numpy(np.abs(levels)).float()
    assert ((at_tier(matrix, (bits,), bits) - weight).abs() <= half_step * 1.001).all()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_rows_and_blocks_of_zeros_come_back_as_zeros(ladder: tuple[int, ...]) -> None:
    weight = gaussian(4, 192)
    weight[1] = 0.0
    weight[2, 64:128] = 0.0
    matrix = quantize_matrix(weight, ladder)
    for tier in ladder:
        values = at_tier(matrix, ladder, tier)
        assert (values[weight == 0] == 0).all()
        assert (values[0] != 0).any()
        assert (values[3] != 0).all()


def test_a_matrix_of_zeros_is_no_error() -> None:
    assert not at_tier(quantize_matrix(torch.zeros(3, 70), (2, 3, 4)), (2, 3, 4), 2).any()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_rows_do_not_influence_each_other(ladder: tuple[int, ...]) -> None:
    weight = gaussian(12, 150)
    scaled = weight * torch.logspace(-12, 12, 12)[:, None]
    together = quantize_matrix(scaled, ladder)
    for row in range(12):
        alone = quantize_matrix(scaled[row : row + 1], ladder)
        assert np.array_equal(together.codes[row], alone.codes[0])
        assert all(np.array_equal(together.steps[t][row], alone.steps[t][0]) for t in ladder)
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
    matrix, scaled = quantize_matrix(weight, ladder), quantize_matrix(weight * 2.0**power, ladder)
    assert np.array_equal(matrix.codes, scaled.codes)
    for tier in ladder:
        assert torch.equal(at_tier(matrix, ladder, tier) * 2.0**power, at_tier(scaled, ladder, tier))


@pytest.mark.parametrize("ladder", [(2, 3, 4), (8,)], ids=str)
def test_a_column_of_padding_changes_nothing(ladder: tuple[int, ...]) -> None:
    """Columns beyond the last are not zeros that pull at the scale."""
    weight = gaussian(20, 64 + 7)
    matrix = quantize_matrix(weight, ladder)
    tail = quantize_matrix(weight[:, 64:].contiguous(), ladder)
    whole_tail = quantize_matrix(weight[:, 64:].repeat(1, 9), ladder)
    for tier in ladder:
        got = (at_tier(matrix, ladder, tier)[:, 64:] - weight[:, 64:]).square().sum()
        alone = (at_tier(tail, ladder, tier) - weight[:, 64:]).square().sum()
        # 3 % for a multiplier that serves another block too.
        assert got <= alone * 1.03 + 1e-4
    assert np.array_equal(whole_tail.codes[:, :7], whole_tail.codes[:, 7:14])


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_single_column_is_nearly_exact_at_its_highest_tier(ladder: tuple[int, ...]) -> None:
    weight = gaussian(50, 1)
    values = at_tier(quantize_matrix(weight, ladder), ladder, ladder[-1])
    assert ((values - weight).abs() <= weight.abs() / 127).all()


def test_signs_are_kept_at_every_tier() -> None:
    weight = gaussian(30, 200)
    matrix = quantize_matrix(weight, (2, 3, 4))
    for tier in (2, 3, 4):
        assert torch.equal(at_tier(matrix, (2, 3, 4), tier).sign(), weight.sign())


def test_half_precision_weights_are_quantized_by_value() -> None:
    weight = gaussian(4, 70).to(torch.bfloat16)
    assert_same(quantize_matrix(weight, (2, 3, 4)), quantize_matrix(weight.float(), (2, 3, 4)))


def test_strided_weights_are_quantized_by_value() -> None:
    weight = gaussian(128, 6).t()
    assert_same(quantize_matrix(weight, (2, 3, 4)), quantize_matrix(weight.contiguous(), (2, 3, 4)))


def test_the_weight_is_left_as_it_is() -> None:
    weight = gaussian(4, 128)
    before = weight.clone()
    quantize_matrix(weight, (2, 3, 4), torch.rand(128, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4), (3,)], ids=str)
def test_importance_lowers_the_weighted_error_at_every_tier(ladder: tuple[int, ...]) -> None:
    weight = gaussian(64, 256)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)).mul(8).exp2()
    for tier in ladder:
        with_it = (error(weight, ladder, tier, importance) * importance).sum()
        without = (error(weight, ladder, tier) * importance).sum()
        assert with_it < 0.99 * without


def test_only_the_proportions_of_importance_matter() -> None:
    weight = gaussian(8, 100)
    importance = torch.rand(100, generator=torch.Generator().manual_seed(1)) + 0.1
    assert_same(
        quantize_matrix(weight, (2, 3, 4), importance), quantize_matrix(weight, (2, 3, 4), importance * 2.0**-30)
    )


@pytest.mark.parametrize("value", [0.0, 1.0, 3.0])
def test_equal_importance_is_none(value: float) -> None:
    weight = gaussian(8, 100)
    got = quantize_matrix(weight, (2, 3, 4), torch.full((100,), value))
    expected = quantize_matrix(weight, (2, 3, 4))
    assert (got.codes == expected.codes).mean() > 0.99
    assert torch.allclose(at_tier(got, (2, 3, 4), 2), at_tier(expected, (2, 3, 4), 2), atol=0.03)


def test_columns_of_no_importance_are_not_neglected() -> None:
    weight = gaussian(64, 256)
    importance = torch.zeros(256)
    importance[::2] = 1.0
    unimportant = error(weight, (2, 3, 4), 4, importance)[:, 1::2].sum() / weight[:, 1::2].square().sum()
    assert unimportant < 0.05


@pytest.mark.parametrize("ladder", [(2, 3, 4), (8,)], ids=str)
def test_chunks_of_rows_do_not_change_the_result(ladder: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(37, 200)
    importance = torch.rand(200, generator=torch.Generator().manual_seed(1))
    expected = quantize_matrix(weight, ladder, importance)
    for chunk in (1, 256, 256 * 5, 256 * 36):
        monkeypatch.setattr(quantize, "CHUNK_WEIGHTS", chunk)
        assert_same(quantize_matrix(weight, ladder, importance), expected)


def test_quantizing_twice_gives_the_same_with_any_number_of_threads() -> None:
    weight = gaussian(64, 300)
    expected = quantize_matrix(weight, (2, 3, 4))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same(quantize_matrix(weight, (2, 3, 4)), expected)


def test_an_expert_is_quantized_matrix_by_matrix() -> None:
    weights = {"gate": gaussian(5, 70, 1), "up": gaussian(5, 70, 2), "down": gaussian(70, 5, 3)}
    importance = {"gate": torch.rand(70, generator=torch.Generator().manual_seed(1))}
    expert = quantize_expert(weights, (2, 3, 4), importance)
    assert list(expert) == list(weights)
    for name, weight in weights.items():
        assert_same(expert[name], quantize_matrix(weight, (2, 3, 4), importance.get(name)))


@pytest.mark.parametrize("tiny", [1e-39, 1e-44])
def test_weights_too_small_for_float_harm_no_others(tiny: float) -> None:
    """Subnormal weights, as weight decay leaves them in experts that are never used."""
    weight = torch.zeros(2, 128)
    weight[0, :64] = tiny * gaussian(1, 64)[0]
    weight[0, 64:], weight[1] = gaussian(1, 64, 1)[0], tiny * gaussian(1, 128, 2)[0]
    matrix = quantize_matrix(weight, (2, 3, 4))
    values = at_tier(matrix, (2, 3, 4), 4)
    assert values.isfinite().all()
    assert (values[1].abs() < 1e-37).all()
    # One step is the least scale of a block that is not all zeros.
    assert (values[0, :64].abs() <= 7.5 * matrix.multiplier[0].item()).all()
    assert (values[0, 64:] - weight[0, 64:]).square().sum() < 0.02 * weight[0, 64:].square().sum()
