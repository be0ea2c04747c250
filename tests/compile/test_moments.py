"""What moments of the inputs do for a matrix, and how the descent goes about it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

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
    nearest_steps,
    one_torch_thread,
    positive_definite,
    quantized,
    weighted_error,
)

from dymoe_compile.quantize import quantize
from dymoe_compile.quantize.descent import Descent, Grid
from dymoe_compile.quantize.grid import tier_weights
from dymoe_compile.quantize.moments import Moments, moments
from dymoe_compile.quantize.quantize import quantize_matrix
from dymoe_runtime.bundle.tiers import BLOCK


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def important(importance: torch.Tensor) -> Moments:
    """Moments of independent columns with these squares."""
    return Moments(torch.diag(importance), 10**6)


@pytest.mark.parametrize("cols", [64, 100, 320])
@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4), (3,), (2, 3, 4, 8)], ids=str)
def test_correlated_inputs_lower_their_error_at_every_tier(ladder: tuple[int, ...], cols: int) -> None:
    """Against quantizing without moments, for the inputs that the moments are of."""
    weight, moments = gaussian(48, cols), moments_of(correlated(6 * cols, cols))
    with_them = weighted_error(quantized(weight, ladder, moments), weight, ladder, moments.hessian)
    without = weighted_error(quantized(weight, ladder), weight, ladder, moments.hessian)
    # Four tiers leave each a little less to gain.
    assert all(a < (0.9 if len(ladder) < 4 else 0.97) * b for a, b in zip(with_them, without, strict=True))


@pytest.mark.parametrize("ladder", [(2, 3, 4), (2, 4), (2, 3, 4, 8)], ids=str)
def test_the_error_of_the_outputs_falls_with_the_tier(ladder: tuple[int, ...]) -> None:
    weight, moments = gaussian(48, 200), moments_of(correlated(1200, 200))
    errors = weighted_error(quantized(weight, ladder, moments), weight, ladder, moments.hessian)
    for (tier, low), (higher, high) in itertools.pairwise(zip(ladder, errors, strict=True)):
        assert high < low / 2.5 ** (higher - tier)


@pytest.mark.parametrize("factor", [1.5, 3, 8])
def test_outputs_of_inputs_that_were_not_seen_are_nearer(factor: float) -> None:
    """Held back: moments of some inputs, errors of others."""
    weight = gaussian(64, 192)
    seen, unseen = correlated(int(factor * 192), 192, seed=1), correlated(2000, 192, seed=2)
    held_out = unseen.T @ unseen
    with_them = weighted_error(quantized(weight, (2, 3, 4), moments_of(seen)), weight, (2, 3, 4), held_out)
    without = weighted_error(quantized(weight, (2, 3, 4)), weight, (2, 3, 4), held_out)
    assert all(a < 0.9 * b for a, b in zip(with_them, without, strict=True))


@pytest.mark.parametrize("samples", [1, 2, 191])
def test_too_few_samples_count_as_none(samples: int) -> None:
    weight, moments = gaussian(8, 192), moments_of(correlated(samples, 192))
    assert not moments.enough
    assert_same(quantized(weight, (2, 3, 4), moments), quantized(weight, (2, 3, 4)))
    assert moments_of(correlated(192, 192)).enough


def test_no_samples_at_all_are_no_error() -> None:
    moments = Moments(torch.zeros(70, 70), 0)
    assert_same(quantized(gaussian(3, 70), (2, 3, 4), moments), quantized(gaussian(3, 70), (2, 3, 4)))


@pytest.mark.parametrize("power", [20, -20, 60, -60])
def test_only_the_proportions_of_moments_matter(power: int) -> None:
    """To the last bit by a power of two."""
    weight, moments = gaussian(16, 100), moments_of(correlated(300, 100))
    scaled = Moments(moments.hessian * 2.0**power, moments.samples)
    assert_same(quantized(weight, (2, 3, 4), moments), quantized(weight, (2, 3, 4), scaled))


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_moments_of_any_size_serve_as_well(factor: float) -> None:
    weight, moments = gaussian(16, 200), moments_of(correlated(600, 200))
    got = quantized(weight, (2, 3, 4), Moments(moments.hessian * factor, moments.samples))
    expected = quantized(weight, (2, 3, 4), moments)
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
def test_equal_and_independent_inputs_count_as_no_moments(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "PULL_DTYPE", torch.float32)  # rounded slopes may move a row's multiplier
    weight = gaussian(8, 100)
    got = quantized(weight, (2, 3, 4), important(torch.full((100,), value)))
    expected = quantized(weight, (2, 3, 4))
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
    matrix = quantized(weight, (2, 3, 4), moments)
    for tier, bound in ((2, 0.3), (3, 0.1), (4, 0.04)):
        values = at_tier(matrix, (2, 3, 4), tier)
        assert values.isfinite().all()
        assert (values - weight)[:, unused].square().sum() < bound * weight[:, unused].square().sum() + 0.1


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 100])
def test_moments_are_the_weighted_sum_of_outer_products(cols: int) -> None:
    generator = torch.Generator().manual_seed(cols)
    x, weights = torch.randn(50, cols, generator=generator), torch.rand(50, 1, generator=generator)
    found = moments(x, weights)
    expected = torch.einsum("ti,tj,t->ij", x.double(), x.double(), weights[:, 0].double())
    torch.testing.assert_close(found.hessian.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.samples == 50


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_weights_on_a_grid_come_back_no_worse_than_by_rounding_its_steps(bits: int, seed: int) -> None:
    """With inputs of any moments: the descent from the grid itself ends below where it starts."""
    weight, codes = grid(bits, 16, 5, seed)
    moments = positive_definite(5 * BLOCK, seed)
    matrix = quantized(weight, (bits,), moments)
    start = torch.from_numpy(nearest_steps(weight, codes, matrix, bits)).sub(weight).double()
    h = moments.ridged().double()
    (got,) = weighted_error(matrix, weight, (bits,), h)
    assert got <= ((start @ h) * start).sum().item() * 1.001


# The sweeps of the descent, as its kernels see them


class Watched:
    """The kernels of a descent, with what a test does before and after each block: of sweep 0, 1, ..."""

    def __init__(self, matrix_blocks: int) -> None:
        self._blocks, self._visits = matrix_blocks, 0

    def fit(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        return DESCENT.fit(weight, grid)

    def descend(self, block: Descent) -> None:
        sweep, nth = divmod(self._visits, self._blocks)
        self._visits += 1
        self.before(block, sweep, nth)
        DESCENT.descend(block)
        self.after(block, sweep, nth)

    def before(self, block: Descent, sweep: int, nth: int) -> None:
        """Look at a block that is about to be visited, the nth of its sweep."""

    def after(self, block: Descent, sweep: int, nth: int) -> None:
        """Look at it afterwards."""


@pytest.mark.parametrize("with_moments", [False, True], ids=["identity", "definite"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_while_scales_are_free_weights_on_a_grid_stay_where_they_are(bits: int, seed: int, with_moments: bool) -> None:
    """The fit finds the grid and the descent has nothing to improve, whatever the inputs, nor has another one."""
    weight, codes = grid(bits, 16, 5, seed)
    checked = []

    class Checking(Watched):
        def after(self, block: Descent, sweep: int, nth: int) -> None:
            if sweep:
                return
            for _ in range(2):
                levels = block.levels(block.codes[:, block.columns], 0)
                assert np.array_equal(block.codes[:, block.columns].numpy(), codes[:, block.columns])
                assert torch.allclose(block.scales[0][:, None] * levels, weight[:, block.columns], rtol=1e-4, atol=0)
                slope = block.error @ block.hessian[:, block.columns]
                DESCENT.descend(replace(block, slope=slope.contiguous()))
            checked.append(nth)

    inputs = positive_definite(5 * BLOCK, seed) if with_moments else None
    quantize_matrix(weight, (bits,), Checking(5), inputs)
    assert checked == list(range(5))


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_sweep_takes_columns_to_come_for_exact(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the last columns, which it chooses anew, does not reach the codes of the first."""
    monkeypatch.setattr(quantize, "PULL", BLOCK)
    weight, inputs = gaussian(40, 4 * BLOCK), moments_of(correlated(1000, 4 * BLOCK))
    last = slice(3 * BLOCK, 4 * BLOCK)

    class Spoiling(Watched):
        """Spoils the last columns before a sweep, the first or the second, and keeps what it makes of the first."""

        def __init__(self, spoilt: bool) -> None:
            super().__init__(4)
            self.spoilt, self.kept = spoilt, torch.empty(0)

        def fit(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
            codes, scales = super().fit(weight, grid)
            if self.spoilt and first:
                codes[:, last] = 0
            return codes, scales

        def after(self, block: Descent, sweep: int, nth: int) -> None:
            if (sweep, nth) == (0 if first else 1, 0):
                self.kept = block.codes[:, :BLOCK].clone()
            if self.spoilt and not first and (sweep, nth) == (0, 3):
                block.error[:, :, last] += 1

    def codes_of_the_first_columns(spoilt: bool) -> torch.Tensor:
        descent = Spoiling(spoilt)
        quantize_matrix(weight, (2, 3, 4), descent, inputs)
        return descent.kept

    same = torch.equal(codes_of_the_first_columns(False), codes_of_the_first_columns(True))
    assert same == first


def test_once_scales_are_stored_every_block_sees_the_whole_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way there, and on the way back, which reuses the products of the way there."""
    monkeypatch.setattr(quantize, "PULL", BLOCK)
    seen = []

    class Checking(Watched):
        def before(self, block: Descent, sweep: int, nth: int) -> None:
            if block.units is None:
                assert sweep == 0
                return
            whole = block.error @ block.hessian
            expected = whole[:, :, block.columns]
            assert torch.allclose(block.slope, expected, rtol=0.02, atol=0.02 * whole.abs().max().item())
            seen.append((sweep, block.columns.start))

    quantize_matrix(gaussian(40, 4 * BLOCK), (2, 3, 4), Checking(4), moments_of(correlated(1000, 4 * BLOCK)))
    starts = list(range(0, 4 * BLOCK, BLOCK))
    assert seen == [(1, start) for start in starts] + [(2, start) for start in reversed(starts)]


def test_a_sweep_never_raises_the_joint_loss() -> None:
    """With free scales and with stored ones; only rounding scales to stored ones may."""
    ladder, cols = (2, 3, 4), 300
    losses: list[float] = []

    class Measuring(Watched):
        def before(self, block: Descent, sweep: int, nth: int) -> None:
            if nth == 0:
                self.measure(block)

        def after(self, block: Descent, sweep: int, nth: int) -> None:
            if nth == 4:
                self.measure(block)

        def measure(self, block: Descent) -> None:
            errors = block.error.double()
            costs = ((errors @ block.hessian.double()) * errors).sum((1, 2))
            losses.append((torch.tensor(tier_weights(ladder)) * costs).sum().item())

    quantize_matrix(gaussian(40, cols), ladder, Measuring(5), moments_of(correlated(1000, cols)))
    assert len(losses) == 2 * quantize.SWEEPS
    for before, after in zip(losses[::2], losses[1::2], strict=True):
        # Slopes may be summed in bf16, which leaves a little of what could be gained.
        assert after <= before * 1.0005
    assert losses[-1] < 0.9 * losses[0]
