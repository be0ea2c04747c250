"""Nested quantization: how near the tiers come, and what must not change them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dymoe_compile import quantize
from dymoe_compile.calibration import moments
from dymoe_compile.grid import multiplier_of, tier_weights, units_of
from dymoe_compile.quantize import Moments, quantize_expert, quantize_matrix
from dymoe_runtime.tiers import (
    BLOCK,
    STEPS,
    QuantizedMatrix,
    blocks_of,
    dequantize,
    levels_of,
    make_layout,
    pack_record,
    split_record,
    tier_scales,
    unit_of,
)

LADDERS = [(2, 3, 4), (2, 3, 4, 8), (8,), (4,), (2,), (3, 5), (2, 6)]
# Steps are 8 % apart, so that a scale is off by up to this much of the weight.
HALF_STEP = 0.055


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
    segments = split_record(layout, pack_record(layout, {"m": matrix}))
    return torch.from_numpy(dequantize(segments, layout.matrices["m"], tier))


def error(weight: torch.Tensor, ladder: tuple[int, ...], tier: int, moments: Moments | None = None) -> torch.Tensor:
    """Squared error of each weight at `tier`."""
    return (at_tier(quantize_matrix(weight, ladder, moments), ladder, tier) - weight).square()


def correlated(samples: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Inputs [samples, cols] of one distribution whatever the seed: columns correlated, some of them large."""
    mixing = gaussian(cols, cols, seed=1000 + cols) / cols**0.5
    mixing = torch.eye(cols) + 1.5 * mixing + 2 * gaussian(1, cols, seed=2000 + cols).T @ gaussian(1, cols, 3000) / cols
    sizes = torch.linspace(-1, 1, cols)[torch.randperm(cols, generator=torch.Generator().manual_seed(cols))].exp()
    return gaussian(samples, cols, seed) @ mixing * sizes


def moments_of(x: torch.Tensor) -> Moments:
    return Moments(x.T @ x, len(x))


def important(importance: torch.Tensor) -> Moments:
    """Moments of independent columns with these squares."""
    return Moments(torch.diag(importance), 10**6)


def weighted_error(matrix: QuantizedMatrix, weight: torch.Tensor, ladder: tuple[int, ...], h: torch.Tensor) -> list:
    """trace(E H E^T) of each tier."""
    errors = [at_tier(matrix, ladder, tier).double() - weight for tier in ladder]
    return [((e @ h.double()) * e).sum().item() for e in errors]


def assert_same(a: QuantizedMatrix, b: QuantizedMatrix) -> None:
    assert np.array_equal(a.codes, b.codes)
    assert list(a.steps) == list(b.steps)
    assert all(np.array_equal(a.steps[tier], b.steps[tier]) for tier in a.steps)
    assert np.array_equal(a.multiplier, b.multiplier)


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
    matrix = quantize_matrix(weight, ladder)
    w = weight.view(30, -1, BLOCK).numpy()
    for tier in ladder:
        shift = ladder[-1] - tier
        levels = levels_of(tier, ladder[-1])[matrix.codes >> shift].reshape(30, -1, BLOCK)
        fitted = (levels * w).sum(-1) / np.square(levels).sum(-1)
        unit = matrix.multiplier[:, None] * np.float32(unit_of(tier, ladder[-1]))
        off = np.abs(fitted[..., None] - unit[..., None] * STEPS[1:])
        stored = tier_scales(matrix.steps[tier], matrix.multiplier, tier, ladder[-1])
        assert (np.abs(stored - fitted) <= off.min(-1) + 1e-5 * fitted).all()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_codes_of_lower_tiers_are_the_floor_of_the_top_ones(ladder: tuple[int, ...]) -> None:
    """What a record gives for a tier is the top bits of the codes, on that tier's own grid."""
    weight = gaussian(9, 150)
    matrix = quantize_matrix(weight, ladder, moments_of(correlated(600, 150)))
    for tier in ladder:
        codes = matrix.codes // 2 ** (ladder[-1] - tier)
        scales = tier_scales(matrix.steps[tier], matrix.multiplier, tier, ladder[-1])
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


def grid(bits: int, rows: int, blocks: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Weights on a grid of the format, and the codes of it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, blocks * BLOCK), np.uint8)
    codes[:, ::BLOCK] = 0  # every block has the largest magnitude of its scale
    steps = rng.integers(1, 16, (rows, blocks), np.uint8)
    multiplier = torch.from_numpy(rng.uniform(0.01, 3.0, rows)).to(torch.bfloat16).float().numpy()
    scales = tier_scales(steps, multiplier, bits, bits).repeat(BLOCK, axis=1)
    return torch.from_numpy(scales * levels_of(bits, bits)[codes]), codes


def positive_definite(cols: int, seed: int) -> Moments:
    x = gaussian(4 * cols, cols, seed) @ (torch.eye(cols) + gaussian(cols, cols, seed + 1) / cols**0.5)
    return moments_of(x)


@pytest.mark.parametrize("with_moments", [False, True], ids=["identity", "definite"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_while_scales_are_free_weights_on_a_grid_stay_where_they_are(bits: int, seed: int, with_moments: bool) -> None:
    """The fit finds the grid and the descent has nothing to improve, whatever the inputs."""
    weight, codes = grid(bits, 16, 5, seed)
    hessian = positive_definite(5 * BLOCK, seed).ridged() if with_moments else None
    descending = quantize._Descending(weight, (bits,), hessian)
    for _ in range(2):
        descending._sweep(None)
        assert np.array_equal(descending._codes.numpy(), codes)
        assert torch.allclose(descending._values(0), weight, rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_on_a_grid_come_back_up_to_the_rounding_of_steps(bits: int, seed: int) -> None:
    """The multiplier is one for the row, with room for all scales, so that steps are not those of the grid."""
    weight, codes = grid(bits, 16, 5, seed)
    matrix = quantize_matrix(weight, (bits,))
    assert np.array_equal(matrix.codes, codes)
    assert ((at_tier(matrix, (bits,), bits) - weight).abs() <= HALF_STEP * weight.abs()).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_weights_on_a_grid_come_back_no_worse_than_by_rounding_its_steps(bits: int, seed: int) -> None:
    """With inputs of any moments: the descent from the grid itself ends below where it starts."""
    weight, codes = grid(bits, 16, 5, seed)
    moments = positive_definite(5 * BLOCK, seed)
    matrix = quantize_matrix(weight, (bits,), moments)
    sizes = matrix.multiplier[:, None] * np.float32(unit_of(bits, bits)) * STEPS[1:]
    levels = levels_of(bits, bits)[codes]
    true = (weight.numpy() / levels)[:, ::BLOCK]
    nearest = np.take_along_axis(sizes, np.abs(sizes[:, None] - true[..., None]).argmin(-1), axis=1)
    start = torch.from_numpy(nearest.repeat(BLOCK, axis=1) * levels).sub(weight).double()
    h = moments.ridged().double()
    (got,) = weighted_error(matrix, weight, (bits,), h)
    assert got <= ((start @ h) * start).sum().item() * 1.001


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
        # For a multiplier that serves another block too; a step of 8 bits is rounded up by up to 11 %.
        assert got <= alone * 1.25 + 1e-4
    assert np.array_equal(whole_tail.codes[:, :7], whole_tail.codes[:, 7:14])


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_single_column_is_nearly_exact_at_its_highest_tier(ladder: tuple[int, ...]) -> None:
    weight = gaussian(50, 1)
    values = at_tier(quantize_matrix(weight, ladder), ladder, ladder[-1])
    assert ((values - weight).abs() <= HALF_STEP * weight.abs()).all()


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


@pytest.mark.parametrize("ladder", [(2, 3, 4), (8,)], ids=str)
def test_the_arguments_are_left_as_they_are(ladder: tuple[int, ...]) -> None:
    weight, moments = gaussian(4, 128), moments_of(correlated(200, 128))
    before, hessian = weight.clone(), moments.hessian.clone()
    quantize_matrix(weight, ladder, moments)
    assert torch.equal(weight, before) and torch.equal(moments.hessian, hessian)


# What moments of the inputs do.


@pytest.mark.parametrize("cols", [64, 100, 320])
@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4), (3,), (2, 3, 4, 8)], ids=str)
def test_correlated_inputs_lower_their_error_at_every_tier(ladder: tuple[int, ...], cols: int) -> None:
    """Against quantizing without moments, for the inputs that the moments are of."""
    weight, moments = gaussian(48, cols), moments_of(correlated(6 * cols, cols))
    with_them = weighted_error(quantize_matrix(weight, ladder, moments), weight, ladder, moments.hessian)
    without = weighted_error(quantize_matrix(weight, ladder), weight, ladder, moments.hessian)
    # Four tiers leave each a little less to gain.
    assert all(a < (0.9 if len(ladder) < 4 else 0.97) * b for a, b in zip(with_them, without, strict=True))


@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4), (2, 3, 4, 8)], ids=str)
def test_the_error_of_the_outputs_falls_with_the_tier(ladder: tuple[int, ...]) -> None:
    weight, moments = gaussian(48, 200), moments_of(correlated(1200, 200))
    errors = weighted_error(quantize_matrix(weight, ladder, moments), weight, ladder, moments.hessian)
    for (tier, low), (higher, high) in itertools.pairwise(zip(ladder, errors, strict=True)):
        assert high < low / 2.5 ** (higher - tier)


@pytest.mark.parametrize("factor", [1.5, 3, 8])
def test_outputs_of_inputs_that_were_not_seen_are_nearer(factor: float) -> None:
    """Held back: moments of some inputs, errors of others."""
    weight = gaussian(64, 192)
    seen, unseen = correlated(int(factor * 192), 192, seed=1), correlated(2000, 192, seed=2)
    held_out = unseen.T @ unseen
    with_them = weighted_error(quantize_matrix(weight, (2, 3, 4), moments_of(seen)), weight, (2, 3, 4), held_out)
    without = weighted_error(quantize_matrix(weight, (2, 3, 4)), weight, (2, 3, 4), held_out)
    assert all(a < 0.9 * b for a, b in zip(with_them, without, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_sweep_takes_columns_to_come_for_exact(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the last columns, which it chooses anew, does not reach the codes of the first."""
    monkeypatch.setattr(quantize, "PULL", BLOCK)
    ladder, weight = (2, 3, 4), gaussian(40, 4 * BLOCK)
    hessian = moments_of(correlated(1000, 4 * BLOCK)).ridged()

    def codes_of_the_first_columns(spoilt: bool) -> torch.Tensor:
        state = quantize._Descending(weight, ladder, hessian)
        if spoilt:
            state._codes[:, 3 * BLOCK :] = 0
            state._take_error()
        units = multiplier_of(state._scales, ladder)[None] * units_of(ladder)[:, None]
        state._sweep(None if first else units.contiguous())
        return state._codes[:, :BLOCK]

    same = torch.equal(codes_of_the_first_columns(False), codes_of_the_first_columns(True))
    assert same == first


def test_the_way_back_reuses_the_products_of_the_way_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one pass keeps and the next adds is, in every group, the whole error times the Hessian."""
    monkeypatch.setattr(quantize, "PULL", BLOCK)
    ladder, weight = (2, 3, 4), gaussian(40, 4 * BLOCK)
    hessian = moments_of(correlated(1000, 4 * BLOCK)).ridged()
    state = quantize._Descending(weight, ladder, hessian)
    state._sweep(None)
    units = multiplier_of(state._scales, ladder)[None] * units_of(ladder)[:, None]
    state._snap(units)
    state._sweep(units)
    state._backward = True
    assert sorted(state._visited) == list(range(0, 4 * BLOCK, BLOCK))
    whole = state._error @ hessian
    for start in state._visited.copy():
        group = slice(start, start + BLOCK)
        slopes = state._slopes(group, free=False, last=True)
        assert torch.allclose(slopes, whole[:, :, group], rtol=0.02, atol=0.02 * whole.abs().max().item())
    assert not state._visited


def test_a_sweep_never_raises_the_joint_loss() -> None:
    """With free scales and with stored ones; only snapping to steps may."""
    ladder, weight = (2, 3, 4), gaussian(40, 300)
    hessian = moments_of(correlated(1000, 300)).ridged()
    state = quantize._Descending(weight, ladder, hessian)

    def loss() -> float:
        errors = torch.stack([state._values(t) - weight for t in range(3)]).double()
        costs = ((errors @ hessian.double()) * errors).sum((1, 2))
        return (torch.tensor(tier_weights(ladder)) * costs).sum().item()

    def sweep(units: torch.Tensor | None) -> None:
        before = loss()
        state._sweep(units, last=True)
        state._backward = units is not None and not state._backward
        # Slopes may be summed in bf16, which leaves a little of what could be gained.
        assert loss() <= before * 1.0005

    start = loss()
    for _ in range(2):
        sweep(None)
    units = (multiplier_of(state._scales, ladder)[None] * units_of(ladder)[:, None]).contiguous()
    state._snap(units)
    for _ in range(2):
        sweep(units)
    assert loss() < 0.9 * start


@pytest.mark.parametrize("samples", [1, 2, 191])
def test_too_few_samples_are_none(samples: int) -> None:
    weight, moments = gaussian(8, 192), moments_of(correlated(samples, 192))
    assert not moments.enough
    assert_same(quantize_matrix(weight, (2, 3, 4), moments), quantize_matrix(weight, (2, 3, 4)))
    assert moments_of(correlated(192, 192)).enough


def test_no_samples_at_all_are_no_error() -> None:
    moments = Moments(torch.zeros(70, 70), 0)
    assert_same(quantize_matrix(gaussian(3, 70), (2, 3, 4), moments), quantize_matrix(gaussian(3, 70), (2, 3, 4)))


@pytest.mark.parametrize("power", [20, -20, 60, -60])
def test_only_the_proportions_of_moments_matter(power: int) -> None:
    """To the last bit by a power of two."""
    weight, moments = gaussian(16, 100), moments_of(correlated(300, 100))
    scaled = Moments(moments.hessian * 2.0**power, moments.samples)
    assert_same(quantize_matrix(weight, (2, 3, 4), moments), quantize_matrix(weight, (2, 3, 4), scaled))


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_moments_of_any_size_serve_as_well(factor: float) -> None:
    weight, moments = gaussian(16, 200), moments_of(correlated(600, 200))
    got = quantize_matrix(weight, (2, 3, 4), Moments(moments.hessian * factor, moments.samples))
    expected = quantize_matrix(weight, (2, 3, 4), moments)
    assert (got.codes == expected.codes).mean() > 0.98
    errors = (weighted_error(matrix, weight, (2, 3, 4), moments.hessian) for matrix in (got, expected))
    assert all(a == pytest.approx(b, rel=0.01) for a, b in zip(*errors, strict=True))


@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4), (3,)], ids=str)
def test_columns_with_large_inputs_come_out_nearer(ladder: tuple[int, ...]) -> None:
    weight = gaussian(64, 256)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)).mul(8).exp2()
    for tier in ladder:
        with_it = (error(weight, ladder, tier, important(importance)) * importance).sum()
        without = (error(weight, ladder, tier) * importance).sum()
        assert with_it < 0.99 * without


@pytest.mark.parametrize("value", [0.0, 1.0, 3.0])
def test_equal_and_independent_inputs_are_as_none(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "PULL_DTYPE", torch.float32)  # rounded slopes may move a row's multiplier
    weight = gaussian(8, 100)
    got = quantize_matrix(weight, (2, 3, 4), important(torch.full((100,), value)))
    expected = quantize_matrix(weight, (2, 3, 4))
    assert (got.codes == expected.codes).mean() > 0.98
    assert (at_tier(got, (2, 3, 4), 2) - at_tier(expected, (2, 3, 4), 2)).square().sum() < 1e-3 * weight.square().sum()


def test_columns_without_inputs_are_not_neglected() -> None:
    weight = gaussian(64, 256)
    importance = torch.zeros(256)
    importance[::2] = 1.0
    unused = error(weight, (2, 3, 4), 4, important(importance))[:, 1::2].sum() / weight[:, 1::2].square().sum()
    assert unused < 0.05


@pytest.mark.parametrize("unused", [[5], [0, 63, 64, 69], list(range(64, 70)), list(range(70))], ids=str)
def test_columns_of_zeros_in_the_moments_do_no_harm(unused: list[int]) -> None:
    x = correlated(300, 70)
    x[:, unused] = 0
    weight, moments = gaussian(6, 70), moments_of(x)
    matrix = quantize_matrix(weight, (2, 3, 4), moments)
    for tier, bound in ((2, 0.3), (3, 0.1), (4, 0.04)):
        values = at_tier(matrix, (2, 3, 4), tier)
        assert values.isfinite().all()
        assert (values - weight)[:, unused].square().sum() < bound * weight[:, unused].square().sum() + 0.1


@pytest.mark.parametrize("moments", [None, moments_of(correlated(300, 130))], ids=["plain", "moments"])
@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 8), (8,)], ids=str)
def test_zeros_tiny_and_huge_weights_give_numbers(ladder: tuple[int, ...], moments: Moments | None) -> None:
    weight = gaussian(6, 130)
    weight[0] = 0
    weight[1] *= 1e-30
    weight[2] *= 1e30
    weight[3, 64:128] = 0
    weight[4, 7] = 1e30
    matrix = quantize_matrix(weight, ladder, moments)
    assert np.isfinite(matrix.multiplier).all()
    for tier in ladder:
        values = at_tier(matrix, ladder, tier)
        assert values.isfinite().all()
        assert not values[0].any() and not values[3, 64:128].any()
        # Squares of these are no floats, so that all codes look as good; rows beside them are not harmed.
        for row in (1, 2):
            assert values[row].abs().max() < 1.1 * weight[row].abs().max()
        assert (values[5] - weight[5]).square().sum() < 0.3 * weight[5].square().sum()
    zeros = quantize_matrix(torch.zeros(3, 130), ladder, moments)
    assert not any(at_tier(zeros, ladder, tier).any() for tier in ladder)


def test_single_fine_tiers_are_rounded_whatever_the_inputs() -> None:
    weight, moments = gaussian(6, 130), moments_of(correlated(300, 130))
    for bits in (6, 7, 8):
        assert_same(quantize_matrix(weight, (bits,), moments), quantize_matrix(weight, (bits,)))


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_the_lowest_tier_counts_most_for_its_size(ladder: tuple[int, ...]) -> None:
    weights = tier_weights(ladder)
    assert len(weights) == len(ladder) and weights[-1] == 1.0
    relative = [weight * 4.0 ** (ladder[-1] - tier) for weight, tier in zip(weights, ladder, strict=True)]
    assert relative == [*sorted(relative[:-1], reverse=True), 1.0]


@pytest.mark.parametrize("ladder", [(2, 3, 4), (4,), (2, 3, 4, 8), (8,)], ids=str)
def test_chunks_of_rows_do_not_change_the_result(ladder: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(37, 200)
    expected = quantize_matrix(weight, ladder)
    for chunk in (1, 256, 256 * 5, 256 * 36):
        monkeypatch.setattr(quantize, "WEIGHTS_AT_ONCE", chunk)
        assert_same(quantize_matrix(weight, ladder), expected)


def test_quantizing_twice_gives_the_same_with_any_number_of_threads() -> None:
    weight, moments = gaussian(64, 300), moments_of(correlated(400, 300))
    for given in (None, moments):
        expected = quantize_matrix(weight, (2, 3, 4), given)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(quantize_matrix(weight, (2, 3, 4), given), expected)


def test_an_expert_is_quantized_matrix_by_matrix() -> None:
    weights = {"gate": gaussian(5, 70, 1), "up": gaussian(5, 70, 2), "down": gaussian(70, 5, 3)}
    moments = {"gate": moments_of(correlated(100, 70)), "down": moments_of(correlated(9, 5))}
    expert = quantize_expert(weights, (2, 3, 4), moments)
    assert list(expert) == list(weights)
    for name, weight in weights.items():
        assert_same(expert[name], quantize_matrix(weight, (2, 3, 4), moments.get(name)))
    plain = quantize_expert(weights, (2, 3, 4))
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
    matrix = quantize_matrix(weight, (2, 3, 4))
    values = at_tier(matrix, (2, 3, 4), 4)
    assert values.isfinite().all()
    assert (values[1].abs() < 1e-37).all()
    # The first step is the least scale of a block that is not all zeros.
    assert (values[0, :64].abs() <= 0.5 * STEPS[1] * matrix.multiplier[0].item()).all()
    assert (values[0, 64:] - weight[0, 64:]).square().sum() < 0.02 * weight[0, 64:].square().sum()


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 100])
def test_moments_are_the_gated_sum_of_outer_products(cols: int) -> None:
    generator = torch.Generator().manual_seed(cols)
    x, gates = torch.randn(50, cols, generator=generator), torch.rand(50, 1, generator=generator)
    found = moments(x, gates)
    expected = torch.einsum("ti,tj,t->ij", x.double(), x.double(), gates[:, 0].double())
    torch.testing.assert_close(found.hessian.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.samples == 50
