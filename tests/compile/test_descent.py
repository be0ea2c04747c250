"""The descent, which chooses codes and scales: every instruction set of this machine against its reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_kit import ALL, COMPILED, kernels_of

from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.descent import Descent, DescentKernels, Grid
from dymoe_compile.quantize.descent_reference import ReferenceDescent
from dymoe_runtime.bundle import tiers
from dymoe_runtime.bundle.tiers import BLOCK, SCALE_SIZES, levels_of
from dymoe_runtime.kernels import REFERENCE


def descent_of(name: str) -> DescentKernels:
    return load_descent(kernels_of(name))


reference = descent_of(REFERENCE)


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The reference works on small tensors, for which the threads of torch crawl on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", COMPILED)
def test_compiled_kernels_come_with_a_compiled_descent(isa: str) -> None:
    assert not isinstance(descent_of(isa), ReferenceDescent)
    assert isinstance(reference, ReferenceDescent)


DESCENT_LADDERS = [(2, 3, 4), (2,), (4,), (3, 5), (2, 4, 8)]
FIT_LADDERS = [(2, 3, 4), (2, 4), (3,), (2, 3, 5), (5,), (2, 6)]


def grid(ladder: tuple[int, ...], rows: int, cols: int) -> tuple[torch.Tensor, Grid]:
    """A random matrix with blocks of zeros, and scales to start from, some of them zero."""
    g = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=g)
    weight[:: rows // 2 + 1, :BLOCK] = 0
    blocks, largest = tiers.blocks_of(cols), float(levels_of(ladder[-1], ladder[-1])[-1])
    starts = 3 * torch.rand(3, rows, blocks, generator=g) / largest
    starts[:, -1, -1] = 0
    starts[0, 0, 0] = 0
    weights = tuple(4.0 ** (tier - ladder[-1]) for tier in ladder)
    importance = torch.rand(cols, generator=g)
    importance[cols // 2] = 0
    return weight, Grid(ladder, weights, importance, starts)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (17, 2 * BLOCK + 7), (100, 300)], ids=str)
@pytest.mark.parametrize("ladder", FIT_LADDERS, ids=str)
@pytest.mark.parametrize("isa", ALL)
def test_fits_equal_the_reference(isa: str, ladder: tuple[int, ...], shape: tuple[int, int]) -> None:
    """Codes and scales; where rounding decided between starts, or between codes, a few may differ."""
    weight, given = grid(ladder, *shape)
    codes, scales = descent_of(isa).fit(weight, given)
    expected_codes, expected_scales = reference.fit(weight, given)
    assert codes.shape == weight.shape and int(codes.max()) < 2 ** ladder[-1]
    same = torch.isclose(scales, expected_scales, rtol=1e-4, atol=1e-7).all(0)
    assert (~same).sum() <= same.numel() // 50
    where = same.repeat_interleave(BLOCK, 1)[:, : shape[1]]
    assert (codes != expected_codes)[where].sum() <= weight.numel() // 1000


@pytest.mark.parametrize("isa", ALL)
def test_a_fit_takes_the_start_that_loses_least(isa: str) -> None:
    """Whichever place it has; and none of them is better than all together."""
    weight, given = grid((2, 3, 4), 40, 200)
    together = weighted_loss(weight, given, *descent_of(isa).fit(weight, given))
    alone = []
    for start in given.starts:
        single = replace(given, starts=start[None].contiguous())
        alone.append(weighted_loss(weight, given, *descent_of(isa).fit(weight, single)))
    assert torch.allclose(together, torch.stack(alone).amin(0), rtol=0.02, atol=1e-6)
    assert (together.sum() < torch.stack([loss.sum() for loss in alone])).all()


def weighted_loss(weight: torch.Tensor, given: Grid, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of each block, with the codes that its start led to, [rows, blocks]."""
    top, blocks, loss = given.ladder[-1], scales.shape[-1], torch.zeros(scales.shape[1:])
    for t, tier in enumerate(given.ladder):
        levels = torch.from_numpy(levels_of(tier, top))[(codes >> (top - tier)).int()]
        values = scales[t].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]] * levels
        error = torch.nn.functional.pad(given.importance * (values - weight).square(), (0, -weight.shape[1] % BLOCK))
        loss += given.weights[t] * error.view(len(weight), blocks, BLOCK).sum(-1)
    return loss


@pytest.mark.parametrize("isa", ALL)
def test_a_fit_that_does_not_match_its_matrix_is_refused(isa: str) -> None:
    weight, given = grid((2, 3, 4), 4, 130)
    wrong = {"weights": (1.0,), "importance": given.importance[:-1], "starts": given.starts[:, :, :-1]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            descent_of(isa).fit(weight, replace(given, **{name: value}))


@dataclass
class Problem:
    """A matrix on a grid, what it should be, and what its errors cost."""

    weight: torch.Tensor  # [rows, cols]
    ladder: tuple[int, ...]
    weights: tuple[float, ...]
    hessian: torch.Tensor
    units: torch.Tensor | None
    scales: torch.Tensor  # [tiers, rows, blocks]
    codes: torch.Tensor
    error: torch.Tensor

    def descend(self, isa: str, index: int, last: bool = True) -> None:
        """One visit of block `index`."""
        columns = slice(index * BLOCK, min((index + 1) * BLOCK, self.weight.shape[1]))
        slope = (self.error.float() @ self.hessian[:, columns].float()).contiguous()
        scales = self.scales[:, :, index].contiguous()
        given = (self.ladder, self.weights, columns, self.hessian, slope, self.units, scales, self.error, self.codes)
        descent_of(isa).descend(Descent(*given, last))
        self.scales[:, :, index] = scales

    def recomputed_error(self) -> torch.Tensor:
        """scale * level - weight, [tiers, rows, cols]."""
        top, cols = self.ladder[-1], self.weight.shape[1]
        levels = [torch.from_numpy(levels_of(tier, top))[(self.codes >> (top - tier)).int()] for tier in self.ladder]
        scales = self.scales.double().repeat_interleave(BLOCK, -1)[:, :, :cols]
        return torch.stack(levels).double() * scales - self.weight

    def losses(self) -> torch.Tensor:
        """What each row costs: the sum over tiers of weight * E H E^T, [rows]."""
        error = self.recomputed_error()
        return torch.einsum("t,trc->r", torch.tensor(self.weights).double(), (error @ self.hessian.double()) * error)

    def copy(self) -> Problem:
        return replace(self, scales=self.scales.clone(), codes=self.codes.clone(), error=self.error.clone())


def problem(ladder: tuple[int, ...], rows: int, cols: int, on_grid: bool, seed: int = 0) -> Problem:
    """A random matrix, rounded badly, for correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    top, tiers_, blocks = ladder[-1], len(ladder), tiers.blocks_of(cols)
    weight = torch.randn(rows, cols, generator=g)
    inputs = torch.randn(3 * cols, cols, generator=g) @ torch.randn(cols, cols, generator=g) / cols**0.5
    inputs += 0.5 * torch.randn(3 * cols, cols, generator=g)
    hessian = inputs.T @ inputs / len(inputs)
    # From the smallest to the largest of these is what scale indices can tell apart.
    scales = torch.tensor([1.5 / levels_of(tier, top)[-1].item() for tier in ladder])[:, None, None] * (
        1 + torch.rand(tiers_, rows, blocks, generator=g)
    )
    units = None
    if on_grid:
        units = scales.amax(-1) / 200
        indices = torch.randint(1, 16, scales.shape, generator=g)
        scales = units[:, :, None] * torch.from_numpy(SCALE_SIZES)[indices]
    table = torch.from_numpy(levels_of(top, top))
    apart = (table[-1] - table[0]) / (2**top - 1)
    levels = weight / scales[-1].repeat_interleave(BLOCK, -1)[:, :cols] + apart * torch.randn(rows, cols, generator=g)
    codes = torch.bucketize(levels, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    weights = tuple(4.0 ** (tier - top) for tier in ladder)
    made = Problem(weight, ladder, weights, hessian, units, scales, codes, torch.empty(0))
    return replace(made, error=made.recomputed_error().float())


def assert_same_descent(actual: Problem, expected: Problem) -> None:
    """Equal codes, scales and errors; where rounding decided between codes, codes as good."""
    size = expected.weight.abs().max()
    same = (actual.codes == expected.codes).all(1)
    assert (~same).sum() <= len(same) // 16
    assert torch.allclose(actual.scales[:, same], expected.scales[:, same], rtol=1e-4, atol=1e-7)
    assert torch.allclose(actual.error[:, same], expected.error[:, same], rtol=0, atol=1e-4 * size)
    assert torch.allclose(actual.losses(), expected.losses(), rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("on_grid", [False, True], ids=["free", "on grid"])
@pytest.mark.parametrize("ladder", DESCENT_LADDERS, ids=str)
def test_descent_equals_the_reference(ladder: tuple[int, ...], on_grid: bool, rows: int) -> None:
    """One visit of the last block, whatever its width; no other columns are touched."""
    for width, last in itertools.product((1, 7, 63, 64), (True, False)):
        before = problem(ladder, rows, BLOCK + width, on_grid, seed=rows + width)
        expected = before.copy()
        expected.descend(REFERENCE, 1, last)
        first = None
        for isa in COMPILED:
            actual = before.copy()
            actual.descend(isa, 1, last)
            assert_same_descent(actual, expected)
            assert torch.equal(actual.codes[:, :BLOCK], before.codes[:, :BLOCK])
            assert torch.equal(actual.error[:, :, :BLOCK], before.error[:, :, :BLOCK])
            first = first or actual
            # Lanes never meet, so that instruction sets agree to the last bit.
            assert torch.equal(actual.codes, first.codes)
            assert torch.equal(actual.scales, first.scales) and torch.equal(actual.error, first.error)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("on_grid", [False, True], ids=["free", "on grid"])
@pytest.mark.parametrize("ladder", DESCENT_LADDERS, ids=str)
def test_descent_never_raises_the_joint_loss_of_a_row(ladder: tuple[int, ...], on_grid: bool, isa: str) -> None:
    """Sweep after sweep; and the error that is kept is that of the codes and scales."""
    state = problem(ladder, 17, 2 * BLOCK + 7, on_grid)
    losses = [state.losses()]
    for sweep, index in itertools.product(range(3), range(3)):
        state.descend(isa, index, last=sweep == 2)
        losses.append(state.losses())
        assert torch.allclose(state.error.double(), state.recomputed_error(), rtol=0, atol=1e-5)
        assert int(state.codes.max()) < 2 ** ladder[-1]
    assert all((after <= before * (1 + 1e-5)).all() for before, after in itertools.pairwise(losses))
    assert (losses[-1] < 0.5 * losses[0]).all()
    if on_grid:
        assert state.units is not None
        sizes = state.scales / state.units[:, :, None]
        assert (sizes[..., None] - torch.from_numpy(SCALE_SIZES[1:])).abs().amin(-1).max() < 1e-3


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("ladder", DESCENT_LADDERS, ids=str)
def test_descent_chooses_the_best_code_of_a_column(ladder: tuple[int, ...], isa: str) -> None:
    """Of a matrix of one column nothing else changes, so that trying all codes finds the same."""
    state = problem(ladder, 33, 1, on_grid=False)
    state.hessian.fill_(0.7)
    state.descend(isa, 0, last=False)
    found = state.losses()
    for code in range(2 ** ladder[-1]):
        state.codes.fill_(code)
        assert (found <= state.losses() * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("on_grid", [False, True], ids=["free", "on grid"])
def test_a_block_of_zeros_keeps_its_scale_of_zero(on_grid: bool, isa: str) -> None:
    state = problem((2, 3, 4), 17, BLOCK + 20, on_grid)
    state.weight[5, BLOCK:] = 0
    state.scales[:, 5, 1] = 0
    state.error = state.recomputed_error().float()
    others = state.scales[:, :5, 1].clone()
    state.descend(isa, 1)
    assert (state.scales[:, 5, 1] == 0).all() and (state.error[:, 5, BLOCK:] == 0).all()
    assert (state.scales[:, :5, 1] > 0).all() and not torch.equal(state.scales[:, :5, 1], others)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("columns", [[3], [0, 19], list(range(20))], ids=["one", "ends", "all"])
def test_columns_that_no_input_uses_do_no_harm(columns: list[int], isa: str) -> None:
    """Zero rows and columns of H."""
    state = problem((2, 3, 4), 17, BLOCK + 20, on_grid=False)
    unused = [BLOCK + column for column in columns]
    state.hessian[unused] = 0
    state.hessian[:, unused] = 0
    before = state.losses()
    expected = state.copy()
    expected.descend(REFERENCE, 1)
    state.descend(isa, 1)
    assert state.error.isfinite().all() and (state.scales > 0).all()
    assert (state.losses() <= before * (1 + 1e-5)).all()
    assert_same_descent(state, expected)


@pytest.mark.parametrize("isa", COMPILED)
def test_threads_do_not_change_a_descent(isa: str) -> None:
    before = problem((2, 3, 4), 531, BLOCK, on_grid=True)
    kernels = kernels_of(isa)
    threads = kernels.threads()
    results = []
    try:
        for count in (1, 2, 3):
            kernels.set_threads(count)
            results.append(before.copy())
            results[-1].descend(isa, 0)
    finally:
        kernels.set_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.scales, results[0].scales) and torch.equal(other.error, results[0].error)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("name", ["error", "codes", "hessian", "units"])
def test_descent_refuses_tensors_that_it_cannot_read(name: str, isa: str) -> None:
    state = problem((2, 3, 4), 4, BLOCK, on_grid=True)
    strided = getattr(state, name).repeat_interleave(2, -1)[..., ::2]
    with pytest.raises(ValueError, match=name):
        replace(state, **{name: strided}).descend(isa, 0)
    with pytest.raises(ValueError, match=name):
        replace(state, **{name: getattr(state, name).to(torch.float64)}).descend(isa, 0)
