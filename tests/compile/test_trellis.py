"""The descent on the trellis grid: every instruction set of this machine against its reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from kernel_kit import ALL, COMPILED, kernels_of
from quantize_kit import gaussian

from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.descent import Descent
from dymoe_compile.quantize.grid import TRELLIS_GAINS
from dymoe_compile.quantize.moments import Moments, moments
from dymoe_compile.quantize.quantize import quantize_matrix
from dymoe_compile.quantize.trellis_reference import USUAL_COST, USUAL_ERRORS, cheapest_path
from dymoe_runtime.bundle.tiers import (
    SCALE_SIZES,
    TRELLIS,
    TRELLIS_RING,
    TRELLIS_ROWS,
    TRELLIS_UNITS,
    dequantize,
    make_layout,
    pack_record,
    split_record,
    trellis_levels,
)
from dymoe_runtime.kernels import REFERENCE

LADDERS = [(2, 3, 4), (2, 4), (3, 4), (2,), (3,), (4,)]
# The reference takes a millisecond for each column of a group, so that few shapes have many columns.
SHAPES = [*((rows, 5) for rows in (1, 2, 3, 7, 8, 33, 128, 131, 260)), *((rows, 64) for rows in (1, 8, 33))]
BESIDE = 3  # columns of a matrix on either side of the block that is visited
ZERO = 2  # row of zeros


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The threads of torch crawl on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Problem:
    """A matrix on the trellis grid, what it should be, and what its errors cost. Only one block is visited."""

    weight: torch.Tensor  # [rows, cols]
    ladder: tuple[int, ...]
    hessian: torch.Tensor
    scales: torch.Tensor  # [tiers, rows]: of the block
    codes: torch.Tensor
    error: torch.Tensor  # before the first visit 0 in the block, and anything beside it
    units: torch.Tensor | None = None

    @property
    def columns(self) -> slice:
        return slice(BESIDE, self.weight.shape[1] - BESIDE)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(4.0 ** (tier - self.ladder[-1]) for tier in self.ladder)

    def visit(self, isa: str, first: bool = False, last: bool = False) -> None:
        slope = (self.error @ self.hessian[:, self.columns]).contiguous()
        given = (self.ladder, self.weights, self.columns, self.hessian, slope, self.units)
        weight = self.weight if first else None
        block = Descent(*given, self.scales, self.error, self.codes, last, grid=TRELLIS, weight=weight)
        load_descent(kernels_of(isa)).descend(block)

    def snap(self) -> None:
        """Choose units, round the scales to what can be stored, and take the error of that."""
        self.units = self.scales / 1.7
        sizes = self.units[:, :, None] * torch.from_numpy(SCALE_SIZES[1:])
        nearest = (sizes - self.scales[:, :, None]).abs().argmin(-1, keepdim=True)
        self.scales = sizes.gather(-1, nearest)[:, :, 0].contiguous()
        self.error = self.recomputed_error().float()

    def recomputed_error(self) -> torch.Tensor:
        """scale * level - weight in the block, [tiers, rows, cols]."""
        codes, error = self.codes[:, self.columns].numpy(), self.error.double()
        levels = np.stack([trellis_levels(codes >> (self.ladder[-1] - tier), tier) for tier in self.ladder])
        values = self.scales[:, :, None].double() * torch.from_numpy(levels)
        error[:, :, self.columns] = values - self.weight[:, self.columns]
        return error

    def losses(self) -> torch.Tensor:
        """What each group of rows costs: the sum over tiers of weight * trace(E H E^T), [groups]."""
        error = self.recomputed_error()
        rows = torch.einsum("t,trc->r", torch.tensor(self.weights).double(), (error @ self.hessian.double()) * error)
        return torch.stack([group.sum() for group in rows.split(TRELLIS_ROWS)])

    def copy(self) -> Problem:
        return replace(self, scales=self.scales.clone(), codes=self.codes.clone(), error=self.error.clone())


def problem(ladder: tuple[int, ...], rows: int, cols: int) -> Problem:
    """A random matrix for correlated inputs, with columns beside its block that have errors already."""
    g, width = torch.Generator().manual_seed(rows * cols), cols + 2 * BESIDE
    weight = torch.randn(rows, width, generator=g)
    inputs = torch.randn(3 * width, width, generator=g) @ torch.randn(width, width, generator=g) / width**0.5
    inputs += 0.5 * torch.randn(3 * width, width, generator=g)
    hessian = inputs.T @ inputs / len(inputs)
    scales = 0.06 + 0.04 * torch.rand(len(ladder), rows, generator=g)
    error = 0.3 * torch.randn(len(ladder), rows, width, generator=g)
    if rows > ZERO:
        weight[ZERO], scales[:, ZERO], error[:, ZERO] = 0, 0, 0
    codes = torch.randint(0, 2 ** ladder[-1], (rows, width), generator=g, dtype=torch.uint8)
    made = Problem(weight, ladder, (hessian + hessian.T) / 2, scales, codes, error)
    error[:, :, made.columns] = 0
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_visit_equals_the_reference(ladder: tuple[int, ...], shape: tuple[int, int]) -> None:
    """All codes, because sums have the same order in both, but for the costs that decide between two whole columns."""
    state = problem(ladder, *shape)
    for visit in ("first", "middle", "last"):
        if visit == "last":
            state.snap()
        expected = state.copy()
        expected.visit(REFERENCE, visit == "first", visit == "last")
        assert_error_kept(expected, state)
        results = [state.copy() for _ in COMPILED]
        for isa, actual in zip(COMPILED, results, strict=True):
            actual.visit(isa, visit == "first", visit == "last")
            assert torch.equal(actual.codes, expected.codes)
            assert torch.allclose(actual.scales, expected.scales, rtol=1e-5, atol=0)
            assert torch.allclose(actual.error, expected.error, rtol=0, atol=1e-5)
            assert_error_kept(actual, state)
            # Instruction sets agree to the last bit.
            assert torch.equal(actual.scales, results[0].scales) and torch.equal(actual.error, results[0].error)
        # In the last visit, or in a small matrix, there may be nothing left to improve.
        assert visit == "last" or state.weight.numel() < 1000 or not torch.equal(expected.codes, state.codes)
        state = expected


def assert_error_kept(after: Problem, before: Problem) -> None:
    """The error is that of codes and scales, and nothing beside the block has changed."""
    assert torch.allclose(after.error.double(), after.recomputed_error(), rtol=0, atol=1e-5)
    beside = torch.ones(after.weight.shape[1], dtype=torch.bool)
    beside[after.columns] = False
    assert torch.equal(after.codes[:, beside], before.codes[:, beside])
    assert torch.equal(after.error[:, :, beside], before.error[:, :, beside])
    zero = after.weight[:, after.columns].abs().amax(-1) == 0
    assert torch.equal(after.scales > 0, (~zero).expand_as(after.scales))
    assert int(after.codes.max()) < 2 ** after.ladder[-1]


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_visits_never_raise_the_joint_loss_of_a_group(ladder: tuple[int, ...], isa: str) -> None:
    """Visit after visit; only rounding the scales may, between two of them."""
    state = problem(ladder, 131, 12)
    state.visit(isa, first=True)
    free, stored = [state.losses()], []
    for _ in range(2):
        state.visit(isa)
        free.append(state.losses())
    state.snap()
    for last in (False, False, True):
        stored.append(state.losses())
        state.visit(isa, last=last)
    stored.append(state.losses())
    for losses in (free, stored):
        assert all((after <= before * (1 + 1e-5)).all() for before, after in itertools.pairwise(losses))
    assert (free[-1] < free[0]).all()
    assert state.units is not None
    sizes = (state.scales / state.units.clamp_min(1e-30))[:, torch.arange(131) != ZERO]
    assert (sizes[..., None] - torch.from_numpy(SCALE_SIZES[1:])).abs().amin(-1).max() < 1e-4


@pytest.mark.parametrize("before", [None, (0, 0, 0), (3, 1, 2)], ids=str)
def test_no_path_is_cheaper_than_the_cheapest(before: tuple[int, ...] | None) -> None:
    """Of five symbols, after any three or after these."""
    numbers = np.random.default_rng(0).integers(0, 1000, (5, 16))
    starts = [before] if before else itertools.product(range(4), repeat=3)
    costs = {}
    for start, path in itertools.product(starts, itertools.product(range(4), repeat=5)):
        all_ = (*start, *path)
        entries = [all_[i] + 4 * (all_[i - 1] ^ all_[i - 3]) for i in range(3, 8)]
        costs[all_] = sum(int(numbers[i, entry]) for i, entry in enumerate(entries))
    best = min(costs, key=lambda key: costs[key])
    found = cheapest_path(numbers, None if before is None else np.array(before, np.uint8))
    assert tuple(found) == best[3:]


@pytest.mark.parametrize("rows", [3, 4, 5], ids="{} rows".format)
@pytest.mark.parametrize("isa", ALL)
def test_the_codes_of_a_column_are_the_best(isa: str, rows: int) -> None:
    """Of all codes that agree with them in the rows where the ring closes, but for the rounding of costs."""
    g = torch.Generator().manual_seed(rows)
    cols = 64 + 2 * BESIDE
    weight, scales = torch.randn(rows, cols, generator=g), torch.full((1, rows), 0.07)
    codes = torch.zeros(rows, cols, dtype=torch.uint8)
    state = Problem(weight, (2,), torch.eye(cols), scales.clone(), codes, torch.zeros(1, rows, cols))
    state.visit(isa, first=True)

    every = np.array(list(itertools.product(range(4), repeat=rows)), np.uint8).T  # [rows, 4^rows]
    values = scales[0, :, None] * torch.from_numpy(trellis_levels(every, 2))
    costs = (values[:, :, None] - weight[:, None, state.columns]).square().sum(0)  # [4^rows, cols]
    found = state.codes[:, state.columns].long()
    places = torch.tensor([4 ** (rows - 1 - row) for row in range(rows)])
    cost = costs.gather(0, (places[:, None] * found).sum(0)[None])[0]
    closing = slice(1, 4) if rows >= TRELLIS_RING else slice(0)
    others = (torch.from_numpy(every)[closing, :, None] != found[closing, None, :]).any(0)
    best = costs.masked_fill(others, torch.inf).amin(0)
    # What a row usually costs is USUAL_COST steps of rounding.
    usual = USUAL_ERRORS[2] * (0.07 / TRELLIS_UNITS[2]) ** 2
    assert (cost <= best + rows * usual / float(USUAL_COST)).all()
    assert (cost <= best * (1 + 1e-5)).float().mean() > 0.9


def values_of(weight: torch.Tensor, ladder: tuple[int, ...], inputs: Moments | None = None) -> dict[int, torch.Tensor]:
    """What a matrix becomes at each tier."""
    matrix = quantize_matrix(weight, ladder, load_descent(kernels_of(ALL[-1])), inputs, grid=TRELLIS)
    layout = make_layout({"m": tuple(weight.shape)}, ladder, grid=TRELLIS)
    segments = split_record(layout, pack_record(layout, {"m": matrix}))
    return {tier: torch.from_numpy(dequantize(segments, layout.matrices["m"], tier)) for tier in ladder}


@pytest.mark.parametrize("size", [0, 1e-20, 1e-3, 0.1, 30, 1e6])
def test_a_row_of_another_size_harms_no_others(size: float) -> None:
    """Whether it is almost zero or an outlier, and whatever its pair is."""
    weight, row = gaussian(128, 128), 5
    other = weight.clone()
    other[row] *= size
    plain, changed = (values_of(w, (2, 3, 4)) for w in (weight, other))
    for tier, values in plain.items():
        found = changed[tier]
        before, after = ((w - v).square().sum(-1) for w, v in ((weight, values), (other, found)))
        others = torch.arange(128) != row
        assert after[others].sum() < 1.15 * before[others].sum()
        # Small rows count less, but not so little that rounding decides their codes.
        assert size == 1e-20 or after[row] <= 8 * size**2 * before[row]


def test_six_bits_are_finer_than_four() -> None:
    weight = gaussian(128, 128)
    errors = {tier: float((v - weight).square().mean()) for tier, v in values_of(weight, (2, 4, 6)).items()}
    assert errors[6] < errors[4] / 6 < errors[2] / 36


def test_tiers_yield_more_than_the_nearest_codes_by_their_gain() -> None:
    """The values of the nearest codes are as large as the weights' projection on them."""
    weight, ladder = gaussian(128, 256), (2, 3, 4)
    inputs = moments(gaussian(1000, 256, seed=1), torch.ones(1000, 1))
    for tier, values in values_of(weight, ladder, inputs).items():
        gain = TRELLIS_GAINS[tier]
        found = float((values * values).sum() / (weight * values).sum())
        assert found == pytest.approx(gain, abs=0.4 * (gain - 1) + 0.001)  # the tiers are fitted together
