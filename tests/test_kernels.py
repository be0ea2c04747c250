"""The compiled kernels against the reference, for every instruction set of this machine."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dymoe_runtime import kernels, tiers
from dymoe_runtime.activations import ACTIVATIONS
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import reference
from dymoe_runtime.kernels.descent import Descent, Grid
from dymoe_runtime.kernels.job import Coming, Job
from dymoe_runtime.read_threads import PythonThreads, ReadThreads
from dymoe_runtime.tiers import BLOCK, STEPS, QuantizedMatrix, RecordLayout, levels_of

COMPILED = [name for name in kernels.available_isas() if name != "torch"]
LADDERS = [(2, 3, 4), (2, 3, 4, 8), (8,), (4,), (6,), (3, 4), (2, 4), (3,), (5, 8), (7,), (4, 6)]
CASES = [(ladder, tier) for ladder in LADDERS for tier in ladder]
TOKENS = (0, 1, 2, 5, 33, 200)
HIDDEN, INTERMEDIATE = 200, 77

pytestmark = pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The reference works on small tensors, for which the threads of torch crawl on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_matrix(rng: np.random.Generator, rows: int, cols: int, ladder: tuple[int, ...]) -> QuantizedMatrix:
    blocks = tiers.blocks_of(cols)
    return QuantizedMatrix(
        rng.integers(0, 2 ** ladder[-1], (rows, cols), dtype=np.uint8),
        {tier: rng.integers(0, 16, (rows, blocks), dtype=np.uint8) for tier in ladder},
        torch.from_numpy(rng.uniform(1e-5, 1e-4, rows)).to(torch.bfloat16).float().numpy(),
    )


@cache
def random_record(
    shapes: tuple[tuple[str, int, int], ...], ladder: tuple[int, ...]
) -> tuple[RecordLayout, list[np.ndarray]]:
    rng = np.random.default_rng(len(shapes) + sum(ladder))
    layout = tiers.make_layout({name: (rows, cols) for name, rows, cols in shapes}, ladder)
    matrices = {name: random_matrix(rng, rows, cols, ladder) for name, rows, cols in shapes}
    return layout, tiers.split_record(layout, tiers.pack_record(layout, matrices))


def weight(rows: int, cols: int, ladder: tuple[int, ...]) -> tuple[RecordLayout, list[np.ndarray]]:
    return random_record((("weight", rows, cols),), ladder)


def expert(ladder: tuple[int, ...]) -> tuple[RecordLayout, list[np.ndarray]]:
    shapes = (("gate", INTERMEDIATE, HIDDEN), ("up", INTERMEDIATE, HIDDEN), ("down", HIDDEN, INTERMEDIATE))
    return random_record(shapes, ladder)


def random_input(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def grid_input(tokens: int, cols: int) -> np.ndarray:
    """Activations that int8 holds exactly: integers up to 127 in each block, times a power of two."""
    x = np.random.default_rng(2).integers(-127, 128, (tokens, cols)).astype(np.float32)
    x[:, ::BLOCK] = 127.0
    return np.ldexp(x, np.arange(cols) // BLOCK % 5 - 2)


def rounding(x: np.ndarray) -> np.ndarray:
    """The most that int8 moves each activation: half a step of max|x| / 127 over its block."""
    blocks = tiers.blocks_of(x.shape[1])
    padded = np.pad(x, ((0, 0), (0, blocks * BLOCK - x.shape[1])))
    steps = np.abs(padded.reshape(len(x), blocks, BLOCK)).max(-1) / 127  # [T, blocks]
    return steps.repeat(BLOCK, axis=1)[:, : x.shape[1]] / 2


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> None:
    """`bound`, and float rounding besides."""
    slack = bound + 1e-5 * np.abs(expected).max() if expected.size else bound
    assert actual.shape == expected.shape
    assert (np.abs(actual - expected) <= slack).all()


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize(("ladder", "tier"), CASES)
def test_linear_equals_reference(isa: str, ladder: tuple[int, ...], tier: int) -> None:
    """Within |w| . (half a step of each activation), the bound of int8 activations."""
    for rows, cols in ((37, 200), (4, 64), (1, 1), (19, 1100), (6, 1085), (9, 150)):
        layout, segments = weight(rows, cols, ladder)
        given = segments[: layout.segments_of(tier)]
        w = reference.dequantize(layout, tier, given, "weight")
        for tokens in TOKENS if cols == 200 else (1, 5):
            x = random_input(tokens, cols)
            y = kernels.select(isa).linear(layout, tier, given, x)
            assert_within(y, reference.linear(layout, tier, given, x), rounding(x) @ np.abs(w).T)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("ladder", [(4,), (3, 4), (2, 8)], ids=str)
def test_splits_that_no_layout_of_ours_has_are_read(
    isa: str, ladder: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planes of one bit only, which are unpacked one by one."""
    monkeypatch.setattr(tiers, "plane_widths", lambda bits: (1,) * bits)
    layout, segments = weight(9, 150, ladder)
    for tier in ladder:
        w = reference.dequantize(layout, tier, segments, "weight")
        assert np.array_equal(kernels.select(isa).dequantize(layout, tier, segments, "weight"), w)
        for tokens in (1, 5):
            x = random_input(tokens, 150)
            y = kernels.select(isa).linear(layout, tier, segments, x)
            assert_within(y, x @ w.T, rounding(x) @ np.abs(w).T)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize(("ladder", "tier"), CASES)
def test_exact_activations_leave_float_rounding(isa: str, ladder: tuple[int, ...], tier: int) -> None:
    layout, segments = weight(21, 1100, ladder)
    for tokens in (1, 7):
        x = grid_input(tokens, 1100)
        expected = x.astype(np.float64) @ reference.dequantize(layout, tier, segments, "weight").astype(np.float64).T
        y = kernels.select(isa).linear(layout, tier, segments, x)
        assert_within(y, expected, 0.0)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_activations_of_any_size_equal_the_reference(isa: str, activation: str, size: float) -> None:
    """Far out too, where an exponential would overflow."""
    layout, segments = expert((2, 3, 4))
    gate = reference.dequantize(layout, 4, segments, "gate")
    x = grid_input(3, HIDDEN) * size / np.abs(grid_input(3, HIDDEN) @ gate.T).max()
    y, expected = (ffn(name, layout, 4, segments, x, activation) for name in (isa, "torch"))
    np.testing.assert_allclose(y, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("ladder", "tier"), [((2, 3, 4), t) for t in (2, 3, 4)] + [((5, 8), 8)])
def test_ffn_equals_reference(isa: str, ladder: tuple[int, ...], tier: int, activation: str) -> None:
    """Gate and up are exact for x on the grid, which leaves the rounding of the hidden vector."""
    layout, segments = expert(ladder)
    given = segments[: layout.segments_of(tier)]
    gate, up, down = (reference.dequantize(layout, tier, given, name) for name in ("gate", "up", "down"))
    for tokens in TOKENS:
        x = grid_input(tokens, HIDDEN) / 64
        hidden = reference.activate(x @ gate.T, x @ up.T, activation)
        y = ffn(isa, layout, tier, given, x, activation)
        bound = 1.01 * rounding(hidden) @ np.abs(down).T  # 1.01: float rounding can move the step
        assert_within(y, ffn("torch", layout, tier, given, x, activation), bound)


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_a_call_of_many_experts_equals_calls_of_one(isa: str) -> None:
    """At mixed tiers, for rows in any order, bit for bit; rows of no job stay as they are."""
    for x, jobs, tokens in (
        (random_input(1, HIDDEN), [(4, 0, 1), (2, 1, 1), (3, 3, 1)], [0, 0, 0, 0]),
        (random_input(1, HIDDEN), [(4, 0, 1)], [0]),
        (random_input(3, HIDDEN), [(2, 2, 1), (4, 0, 2)], [2, 0, 1]),
        (random_input(150, HIDDEN), [(3, 0, 150), (4, 150, 0), (2, 150, 90)], [*range(150), *range(0, 90)]),
    ):
        y = run_jobs(isa, jobs, x, tokens)
        expected = np.full((len(tokens), HIDDEN), 7.0, np.float32)
        for tier, first, count in jobs:
            rows = slice(first, first + count)
            alone = [ffn(isa, *expert_at(tier), x[token : token + 1]) for token in tokens[rows]]
            expected[rows] = np.concatenate([*alone, expected[:0]])
        if isa == "torch":  # whose products round differently with the number of tokens
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        else:
            assert np.array_equal(y, expected)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (1, 8, 2048), (70, 4, 100)], ids=str)
def test_combining_equals_the_reference_bit_for_bit(isa: str, shape: tuple[int, int, int]) -> None:
    tokens, ranks, width = shape
    rng = np.random.default_rng(0)
    y = rng.standard_normal((tokens * ranks + 1, width), np.float32)
    rows = rng.integers(-1, len(y), (tokens, ranks))
    gates = rng.random((tokens, ranks), np.float32)
    assert np.array_equal(kernels.select(isa).combine(y, rows, gates), reference.combine(y, rows, gates))


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize(("ladder", "tier"), CASES)
def test_rows_equal_reference_bit_for_bit(isa: str, ladder: tuple[int, ...], tier: int) -> None:
    layout, segments = weight(37, 200, ladder)
    fast = kernels.select(isa)
    expected = reference.dequantize(layout, tier, segments, "weight")
    ids = np.array([36, 0, 5, 5])
    assert np.array_equal(fast.dequantize(layout, tier, segments, "weight"), expected)
    assert np.array_equal(fast.embed(layout, tier, segments, ids), expected[ids])
    assert np.array_equal(reference.embed(layout, tier, segments, ids), expected[ids])
    assert fast.embed(layout, tier, segments, ids[:0]).shape == (0, 200)
    # Steps of an odd number of blocks leave half a byte at the end of each row.
    layout, segments = weight(3, 1085, ladder)
    dense = fast.dequantize(layout, tier, segments, "weight")
    assert np.array_equal(dense, reference.dequantize(layout, tier, segments, "weight"))


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_activation_spoils_its_token_only(isa: str, bad: float) -> None:
    layout, segments = weight(37, 200, (2, 3, 4))
    x = random_input(3, 200)
    x[1, 150] = bad
    y = kernels.select(isa).linear(layout, 3, segments, x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("isa", COMPILED)
def test_tiny_and_huge_activations(isa: str) -> None:
    layout, segments = weight(37, 200, (4,))
    x = np.array([[0.0], [1e-42], [1e30]], np.float32).repeat(200, axis=1)
    y = kernels.select(isa).linear(layout, 4, segments, x)
    assert_within(y[:2], np.zeros((2, 37)), 1e-30)
    assert_within(y[2:], reference.linear(layout, 4, segments, x[2:]), 0.0)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("tokens", [1, 33, 200])
def test_threads_and_company_do_not_change_a_token(isa: str, tokens: int) -> None:
    layout, segments = weight(531, 1100, (2, 3, 4))
    fast = kernels.select(isa)
    x = random_input(tokens, 1100)
    results = with_threads(isa, lambda: fast.linear(layout, 3, segments, x))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[0][-1:], fast.linear(layout, 3, segments, x[-1:]))


def with_threads(isa: str, call: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """What a call gives with one, two and three threads."""
    fast = kernels.select(isa)
    before = fast.threads()
    try:
        results = []
        for count in (1, 2, 3):
            fast.set_threads(count)
            results.append(call())
    finally:
        fast.set_threads(before)
    return results


def test_callers_at_once_do_not_disturb_each_other() -> None:
    layout, segments = weight(531, 1100, (2, 3, 4))
    fast = kernels.select(COMPILED[0])
    inputs = [random_input(1 + i % 3, 1100, seed=i) for i in range(200)]
    expected = [fast.linear(layout, 4, segments, x) for x in inputs]
    before = fast.threads()
    try:
        fast.set_threads(3)
        with ThreadPoolExecutor(4) as callers:
            results = list(callers.map(lambda x: fast.linear(layout, 4, segments, x), inputs))
    finally:
        fast.set_threads(before)
    assert all(map(np.array_equal, results, expected))


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_wrong_arguments_raise_value_error(isa: str) -> None:
    layout, segments = weight(37, 200, (2, 3, 4))
    fast = kernels.select(isa)
    x = random_input(2, 200)
    short = segments[0][: layout.segment_bytes[0] // 2]
    wrong = [
        lambda: fast.linear(layout, 3, segments[:1], x),
        lambda: fast.linear(layout, 2, [short], x),
        lambda: fast.linear(layout, 2, [segments[0].view(np.int8)], x),
        lambda: fast.linear(layout, 5, segments, x),
        lambda: fast.linear(layout, 3, segments, np.ascontiguousarray(x[:, :-1])),
        lambda: fast.linear(layout, 3, segments, x.astype(np.float64)),
        lambda: fast.embed(layout, 3, segments, np.array([37])),
        lambda: fast.embed(layout, 3, segments, np.array([-1])),
        lambda: ffn(isa, *expert_at(2), x, "relu"),
        lambda: ffn(isa, *expert_at(2), np.ascontiguousarray(x[:, :-1])),
        lambda: run_jobs(isa, [(4, 0, 3)], x, [0, 0, 2]),
        lambda: run_jobs(isa, [(4, 0, 3)], x, [0, -1, 1]),
        lambda: run_jobs(isa, [(4, 2, 2)], x, [0, 0, 0]),
        lambda: run_jobs(isa, [(4, -1, 2)], x, [0, 0, 0]),
        lambda: fast.combine(x, np.array([[0, 2]]), np.ones((1, 2), np.float32)),
        lambda: fast.combine(x, np.array([[0]]), np.ones((1, 2), np.float32)),
    ]
    for call in wrong:
        with pytest.raises(ValueError):
            call()


def ffn(
    isa: str,
    layout: RecordLayout,
    tier: int,
    segments: list[np.ndarray],
    x: np.ndarray,
    activation: str = "silu",
) -> np.ndarray:
    """One expert for all tokens."""
    y = np.empty_like(x)
    chosen = kernels.select(isa)
    chosen.moe([Job(chosen.prepare(layout, tier, segments), 0, len(x))], x, np.arange(len(x)), y, activation)
    return y


def run_jobs(isa: str, jobs: list[tuple[int, int, int]], x: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Jobs (tier, first row, rows) of the expert of `expert_at`, into rows of sevens."""
    y = np.full((len(tokens), x.shape[1]), 7.0, np.float32)
    layout, segments = expert((2, 3, 4))
    chosen = kernels.select(isa)
    at = {tier: chosen.prepare(layout, tier, segments[: layout.segments_of(tier)]) for tier in layout.ladder}
    chosen.moe([Job(at[tier], first, count) for tier, first, count in jobs], x, np.array(tokens), y)
    return y


def expert_at(tier: int) -> tuple[RecordLayout, int, list[np.ndarray]]:
    layout, segments = expert((2, 3, 4))
    return layout, tier, segments[: layout.segments_of(tier)]


@pytest.mark.parametrize("isa", COMPILED)
def test_strided_arrays_raise_value_error(isa: str) -> None:
    layout, segments = weight(37, 200, (2, 3, 4))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.select(isa).linear(layout, 3, segments, random_input(200, 2).T)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.select(isa).linear(layout, 2, [segments[0].repeat(2)[::2]], random_input(2, 200))


def test_unaligned_segments() -> None:
    layout, segments = weight(37, 200, (2, 3, 4))
    moved = [np.concatenate([np.zeros(1, np.uint8), segment])[1:] for segment in segments]
    x = random_input(5, 200)
    for isa in COMPILED:
        fast = kernels.select(isa)
        assert np.array_equal(fast.linear(layout, 4, moved, x), fast.linear(layout, 4, segments, x))


# Descent: the choice of codes and scales.

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
@pytest.mark.parametrize("isa", kernels.available_isas())
def test_fits_equal_the_reference(isa: str, ladder: tuple[int, ...], shape: tuple[int, int]) -> None:
    """Codes and scales; where rounding decided between starts, or between codes, a few may differ."""
    weight, given = grid(ladder, *shape)
    codes, scales = kernels.select(isa).fit(weight, given)
    expected_codes, expected_scales = reference.fit(weight, given)
    assert codes.shape == weight.shape and int(codes.max()) < 2 ** ladder[-1]
    same = torch.isclose(scales, expected_scales, rtol=1e-4, atol=1e-7).all(0)
    assert (~same).sum() <= same.numel() // 50
    where = same.repeat_interleave(BLOCK, 1)[:, : shape[1]]
    assert (codes != expected_codes)[where].sum() <= weight.numel() // 1000


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_a_fit_takes_the_start_that_loses_least(isa: str) -> None:
    """Whichever place it has; and none of them is better than all together."""
    weight, given = grid((2, 3, 4), 40, 200)
    together = weighted_loss(weight, given, *kernels.select(isa).fit(weight, given))
    alone = []
    for start in given.starts:
        single = replace(given, starts=start[None].contiguous())
        alone.append(weighted_loss(weight, given, *kernels.select(isa).fit(weight, single)))
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


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_a_fit_that_does_not_match_its_matrix_is_refused(isa: str) -> None:
    weight, given = grid((2, 3, 4), 4, 130)
    wrong = {"weights": (1.0,), "importance": given.importance[:-1], "starts": given.starts[:, :, :-1]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            kernels.select(isa).fit(weight, replace(given, **{name: value}))


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
        kernels.select(isa).descend(Descent(*given, last))
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
    # From the smallest to the largest of these is what the steps can tell apart.
    scales = torch.tensor([1.5 / levels_of(tier, top)[-1].item() for tier in ladder])[:, None, None] * (
        1 + torch.rand(tiers_, rows, blocks, generator=g)
    )
    units = None
    if on_grid:
        units = scales.amax(-1) / 200
        steps = torch.randint(1, 16, scales.shape, generator=g)
        scales = units[:, :, None] * torch.from_numpy(STEPS)[steps]
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
@pytest.mark.parametrize("on_grid", [False, True], ids=["free", "steps"])
@pytest.mark.parametrize("ladder", DESCENT_LADDERS, ids=str)
def test_descent_equals_the_reference(ladder: tuple[int, ...], on_grid: bool, rows: int) -> None:
    """One visit of the last block, whatever its width; no other columns are touched."""
    for width, last in itertools.product((1, 7, 63, 64), (True, False)):
        before = problem(ladder, rows, BLOCK + width, on_grid, seed=rows + width)
        expected = before.copy()
        expected.descend("torch", 1, last)
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


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("on_grid", [False, True], ids=["free", "steps"])
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
        steps = state.scales / state.units[:, :, None]
        assert (steps[..., None] - torch.from_numpy(STEPS[1:])).abs().amin(-1).max() < 1e-3


@pytest.mark.parametrize("isa", kernels.available_isas())
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


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("on_grid", [False, True], ids=["free", "steps"])
def test_a_block_of_zeros_keeps_its_scale_of_zero(on_grid: bool, isa: str) -> None:
    state = problem((2, 3, 4), 17, BLOCK + 20, on_grid)
    state.weight[5, BLOCK:] = 0
    state.scales[:, 5, 1] = 0
    state.error = state.recomputed_error().float()
    others = state.scales[:, :5, 1].clone()
    state.descend(isa, 1)
    assert (state.scales[:, 5, 1] == 0).all() and (state.error[:, 5, BLOCK:] == 0).all()
    assert (state.scales[:, :5, 1] > 0).all() and not torch.equal(state.scales[:, :5, 1], others)


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("columns", [[3], [0, 19], list(range(20))], ids=["one", "ends", "all"])
def test_columns_that_no_input_uses_do_no_harm(columns: list[int], isa: str) -> None:
    """Zero rows and columns of H."""
    state = problem((2, 3, 4), 17, BLOCK + 20, on_grid=False)
    unused = [BLOCK + column for column in columns]
    state.hessian[unused] = 0
    state.hessian[:, unused] = 0
    before = state.losses()
    expected = state.copy()
    expected.descend("torch", 1)
    state.descend(isa, 1)
    assert state.error.isfinite().all() and (state.scales > 0).all()
    assert (state.losses() <= before * (1 + 1e-5)).all()
    assert_same_descent(state, expected)


@pytest.mark.parametrize("isa", COMPILED)
def test_threads_do_not_change_a_descent(isa: str) -> None:
    before = problem((2, 3, 4), 531, BLOCK, on_grid=True)
    fast, threads = kernels.select(isa), kernels.select(isa).threads()
    results = []
    try:
        for count in (1, 2, 3):
            fast.set_threads(count)
            results.append(before.copy())
            results[-1].descend(isa, 0)
    finally:
        fast.set_threads(threads)
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


def test_module_functions_use_the_best_isa() -> None:
    layout, segments = weight(37, 200, (4,))
    x, ids = random_input(2, 200), np.array([1, 2])
    best = kernels.select(kernels.isa())
    assert kernels.isa() == os.environ.get("DYMOE_ISA", kernels.available_isas()[0])
    assert np.array_equal(kernels.linear(layout, 4, segments, x), best.linear(layout, 4, segments, x))
    assert np.array_equal(kernels.embed(layout, 4, segments, ids), best.embed(layout, 4, segments, ids))
    assert np.array_equal(kernels.matmul(x, x), best.matmul(x, x))
    assert np.array_equal(kernels.activate(x, x, "gelu"), best.activate(x, x, "gelu"))
    for ours, theirs in zip(kernels.choose(x, 8, True), best.choose(x, 8, True), strict=True):
        assert np.array_equal(ours, theirs)


def test_unknown_isa_lists_those_available() -> None:
    with pytest.raises(DymoeError, match=f"'sparc' .* {', '.join(kernels.available_isas())}$"):
        kernels.select("sparc")


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


def test_isa_from_the_environment() -> None:
    code = "from dymoe_runtime import kernels; print(kernels.isa())"
    assert run_python(code, DYMOE_ISA="torch").strip() == "torch"
    expected = f"DymoeError: DYMOE_ISA=sparc: expected one of {', '.join(kernels.available_isas())}"
    assert expected in run_python(code, DYMOE_ISA="sparc")


FORK = """
import os
import numpy as np
from dymoe_runtime import kernels, tiers
layout = tiers.make_layout({"weight": (512, 2048)}, (4,))
segments = [np.ones(n, np.uint8) for n in layout.segment_bytes]
x = np.ones((3, 2048), np.float32)
kernels.set_threads(2)
y = kernels.linear(layout, 4, segments, x)
child = os.fork()
same = np.array_equal(y, kernels.linear(layout, 4, segments, x)) and kernels.threads() == 2
if child == 0:
    os._exit(0 if same else 1)
print("child", os.waitpid(child, 0)[1], "parent", same)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_its_own_threads() -> None:
    assert "child 0 parent True" in run_python(FORK, DYMOE_ISA=COMPILED[0])


# What stands between the products


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("shape", [(1, 64), (5, 3, 20), (300, 128), (0, 64)], ids=str)
def test_norm_equals_the_reference(isa: str, shape: tuple[int, ...]) -> None:
    x, weight = random_input(*shape, seed=3), random_input(shape[-1], seed=4)
    got = kernels.select(isa).norm(x, weight, 1e-5)
    np.testing.assert_allclose(got, reference.norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 64), (300, 8, 128)], ids=str)
def test_rotate_equals_the_reference(isa: str, shape: tuple[int, int, int]) -> None:
    x, angles = random_input(*shape, seed=3), random_input(shape[0], shape[2], seed=4)
    table = np.cos(angles), np.sin(angles)
    expected = reference.rotate(x.copy(), *table)
    np.testing.assert_allclose(kernels.select(isa).rotate(x, *table), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", COMPILED)
def test_norm_and_rotate_refuse_what_does_not_fit(isa: str) -> None:
    x = random_input(3, 2, 8)
    with pytest.raises(ValueError):
        kernels.select(isa).norm(x, np.ones(7, np.float32), 1e-5)
    for cosines, sines in (
        [(3, 4), (3, 4)],
        [(3, 16), (3, 16)],
        [(3, 3), (2, 8)],
        [(3, 8), (3, 6)],
        [(3, 3), (3, 3)],
        [(3, 10), (3, 10)],
    ):
        with pytest.raises(ValueError):
            kernels.select(isa).rotate(x, np.ones(cosines, np.float32), np.ones(sines, np.float32))


def plain_weight(rows: int, cols: int, narrow: bool) -> tuple[np.ndarray, np.ndarray]:
    """A weight as `matmul` takes it, and its values, float64."""
    weight = torch.from_numpy(random_input(rows, cols, seed=5))
    if not narrow:
        return weight.numpy(), weight.double().numpy()
    stored = weight.to(torch.bfloat16)
    return stored.view(torch.int16).numpy().view(np.uint16), stored.double().numpy()


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("narrow", [False, True], ids=["float", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (7, 15), (3, 17), (37, 200), (131, 1100), (6, 1085)], ids=str)
def test_matmul_equals_the_reference(isa: str, shape: tuple[int, int], narrow: bool) -> None:
    """And both the product in double precision."""
    weight, values = plain_weight(*shape, narrow)
    for tokens in (0, 1, 2, 5, 33):
        x = random_input(tokens, shape[1])
        y = kernels.select(isa).matmul(x, weight)
        assert y.dtype == np.float32
        assert_within(y, reference.matmul(x, weight), 0.0)
        assert_within(y, x @ values.T, 0.0)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("narrow", [False, True], ids=["float", "bf16"])
def test_threads_and_company_do_not_change_a_token_of_matmul(isa: str, narrow: bool) -> None:
    weight, _ = plain_weight(531, 1085, narrow)
    fast = kernels.select(isa)
    x = random_input(33, 1085)
    results = with_threads(isa, lambda: fast.matmul(x, weight))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    for tokens in (slice(0, 1), slice(32, 33), slice(3, 8)):
        assert np.array_equal(results[0][tokens], fast.matmul(x[tokens], weight))


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("narrow", [False, True], ids=["float", "bf16"])
def test_matmul_refuses_other_columns(isa: str, narrow: bool) -> None:
    weight, _ = plain_weight(37, 200, narrow)
    for cols in (1, 199, 201):
        with pytest.raises(ValueError, match="200 columns"):
            kernels.select(isa).matmul(random_input(2, cols), weight)


@pytest.mark.parametrize("isa", COMPILED)
def test_matmul_refuses_arrays_that_it_cannot_read(isa: str) -> None:
    x, weight = random_input(2, 200), random_input(37, 200)
    for x_, weight_ in (
        (random_input(200, 2).T, weight),
        (x.astype(np.float64), weight),
        (x[0], weight),
        (x, random_input(200, 37).T),
        (x, weight.astype(np.float64)),
        (x, weight.astype(np.int16)),
        (x, weight[0]),
    ):
        with pytest.raises(ValueError, match="contiguous"):
            kernels.select(isa).matmul(x_, weight_)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 77), (150, 1085)], ids=str)
def test_activate_equals_the_reference(isa: str, shape: tuple[int, int], size: float, activation: str) -> None:
    """With any number of threads; what is given stays as it is."""
    gate, up = random_input(*shape) * np.float32(size), random_input(*shape, seed=1)
    given = gate.copy(), up.copy()
    expected = reference.activate(gate, up, activation)
    results = with_threads(isa, lambda: kernels.select(isa).activate(gate, up, activation))
    assert results[0].dtype == np.float32
    np.testing.assert_allclose(results[0], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(initial=0.0))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(gate, given[0]) and np.array_equal(up, given[1])


@pytest.mark.parametrize("isa", [*COMPILED, "torch"])
def test_activate_refuses_what_does_not_fit(isa: str) -> None:
    gate = random_input(3, 8)
    for shape in ((3, 7), (2, 8), (1, 8), (8,), (8, 3)):
        with pytest.raises(ValueError, match="up"):
            kernels.select(isa).activate(gate, random_input(*shape), "silu")
    with pytest.raises(ValueError, match="relu"):
        kernels.select(isa).activate(gate, gate, "relu")
    for wrong in (gate.astype(np.float64), random_input(8, 3).T) if isa != "torch" else ():
        with pytest.raises(ValueError, match="contiguous"):
            kernels.select(isa).activate(gate, wrong, "silu")


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("norm_topk", [False, True], ids=["share", "norm"])
@pytest.mark.parametrize("shape", [(0, 8, 2), (1, 1, 1), (5, 8, 8), (33, 60, 4), (300, 64, 8)], ids=str)
def test_choose_equals_the_reference(isa: str, shape: tuple[int, int, int], norm_topk: bool) -> None:
    tokens, count, top_k = shape
    logits = 3 * random_input(tokens, count)
    given = logits.copy()
    experts, gates = kernels.select(isa).choose(logits, top_k, norm_topk)
    expected_experts, expected_gates = reference.choose(logits, top_k, norm_topk)
    assert experts.dtype == np.int64 and gates.dtype == np.float32
    assert experts.shape == gates.shape == (tokens, top_k)
    assert np.array_equal(experts, expected_experts)
    np.testing.assert_allclose(gates, expected_gates, rtol=1e-5)
    assert (np.diff(gates) <= 0).all()
    if norm_topk or top_k == count:
        np.testing.assert_allclose(gates.sum(-1), 1.0, rtol=1e-5)
    assert np.array_equal(logits, given)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("norm_topk", [False, True], ids=["share", "norm"])
def test_of_equal_logits_the_lower_expert_is_chosen(isa: str, norm_topk: bool) -> None:
    logits = np.array([[1, 3, 3, 0, 3, 1], [2, 2, 2, 2, 2, 2], [0, 0, 5, 0, 0, 0]], np.float32)
    experts, gates = kernels.select(isa).choose(logits, 4, norm_topk)
    assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [2, 0, 1, 3]]
    np.testing.assert_allclose(gates, reference.choose(logits, 4, norm_topk)[1], rtol=1e-5)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("norm_topk", [False, True], ids=["share", "norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5, 7])
def test_a_bad_logit_spoils_the_gates_of_its_token_only(isa: str, place: int, bad: float, norm_topk: bool) -> None:
    """Its experts are some that there are, none twice."""
    logits = random_input(3, 8)
    good_experts, good_gates = kernels.select(isa).choose(logits, 4, norm_topk)
    logits[1, place] = bad
    experts, gates = kernels.select(isa).choose(logits, 4, norm_topk)
    assert np.isnan(gates[1]).all()
    assert len(set(experts[1].tolist()) & set(range(8))) == 4
    assert np.array_equal(experts[[0, 2]], good_experts[[0, 2]])
    assert np.array_equal(gates[[0, 2]], good_gates[[0, 2]])


@pytest.mark.parametrize("isa", [*COMPILED, "torch"])
def test_choose_refuses_what_does_not_fit(isa: str) -> None:
    logits = random_input(3, 8)
    for top_k in (0, 9):
        with pytest.raises(ValueError, match="gates"):
            kernels.select(isa).choose(logits, top_k, True)
    for wrong in (logits.astype(np.float64), logits[0]) if isa != "torch" else ():
        with pytest.raises(ValueError):
            kernels.select(isa).choose(wrong, 2, True)


@pytest.mark.parametrize("isa", [*COMPILED, "torch"])
def test_one_token_equals_moe_and_combine(isa: str) -> None:
    layout, segments = expert((2, 3, 4))
    chosen = kernels.select(isa)
    at = [chosen.prepare(layout, tier, segments[: layout.segments_of(tier)]) for tier in (4, 2, 3)]
    x, gates = random_input(1, layout.matrices["gate"].cols), np.array([[0.5, 0.3, 0.2]], np.float32)
    y = np.empty((3, x.shape[1]), np.float32)
    chosen.moe([Job(e, row, 1) for row, e in enumerate(at)], x, np.zeros(3, np.int64), y)
    assert np.array_equal(chosen.moe_token(at, x, gates), chosen.combine(y, np.arange(3)[None], gates))
    if isa != "torch":
        unprepared = reference.prepare(layout, 2, segments[:1])
        with pytest.raises(ValueError, match="prepared"):
            chosen.moe_token([unprepared], x, gates[:, :1])
        with pytest.raises(ValueError, match="prepared"):
            chosen.moe([Job(unprepared, 0, 1)], x, np.zeros(1, np.int64), y[:1])
    for experts, tokens, mass in ([], x, gates), (at, x, gates[:, :2]), (at, np.concatenate([x, x]), gates):
        with pytest.raises(ValueError):
            chosen.moe_token(experts, tokens, mass)


@pytest.mark.parametrize("isa", [*COMPILED, "torch"])
@pytest.mark.parametrize("threads", [PythonThreads, *([] if kernels.native is None else [kernels.native.Reads])])
def test_experts_of_a_token_run_as_they_come(isa: str, threads: Callable[[int], ReadThreads], tmp_path: Path) -> None:
    """To the same numbers as if all had been there."""
    layout, segments = expert((2, 3, 4))
    chosen = kernels.select(isa)
    tiers = (4, 2, 3, 4)
    there = [chosen.prepare(layout, tier, segments[: layout.segments_of(tier)]) for tier in tiers]
    x, gates = random_input(1, layout.matrices["gate"].cols), np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)
    np.concatenate(segments).tofile(tmp_path / "record")
    fd, reads = os.open(tmp_path / "record", os.O_RDONLY), threads(2)
    for late in ((0,), (1, 3), (0, 1, 2, 3)):
        experts, tickets = list(there), []
        for rank in late:
            memory = [np.zeros_like(segment) for segment in segments[: layout.segments_of(tiers[rank])]]
            experts[rank] = chosen.prepare(layout, tiers[rank], memory)
            if rank == 3:  # after the others have come
                reads.submit(-1, 0, [], 0, partial(time.sleep, 0.1))
                reads.submit(-1, 0, [], 0, partial(time.sleep, 0.1))
            tickets.append((rank, reads.submit(fd, 0, [(m.ctypes.data, m.size) for m in memory], 0, None)))
        coming = Coming(reads, tickets)
        assert np.array_equal(chosen.moe_token(experts, x, gates, coming=coming), chosen.moe_token(there, x, gates))
        assert coming.wait_s > 0 and (3 not in late or coming.wait_s > 0.05)
    reads.close(10.0)
    os.close(fd)


@pytest.mark.skipif(kernels.native is None, reason="compiled kernels are missing")
def test_experts_that_come_must_be_experts_of_the_call() -> None:
    layout, segments = expert((2, 3, 4))
    chosen, reads = kernels.select(COMPILED[0]), kernels.native.Reads(1)
    at = [chosen.prepare(layout, 2, segments[:1])] * 2
    x, gates = random_input(1, layout.matrices["gate"].cols), np.array([[0.6, 0.4]], np.float32)
    first, second = (reads.submit(-1, 0, [], 0, None) for _ in range(2))
    for wrong in ([(2, first)], [(-1, first)], [(0, first), (0, second)], [(0, first), (1, first)]):
        with pytest.raises(ValueError, match="coming"):
            chosen.moe_token(at, x, gates, coming=Coming(reads, wrong))
    reads.close(10.0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_pinned_threads_stay_on_processors_of_their_own() -> None:
    """In a process of its own, for what is pinned stays so."""
    script = """
import os
import numpy as np
from pathlib import Path
from dymoe_runtime import kernels
x, weight = np.ones((4096, 512), np.float32), np.ones(512, np.float32)
kernels.set_threads(3)
before = {task.name for task in Path("/proc/self/task").iterdir()}
assert kernels.pin_threads()
kernels.norm(x, weight, 1e-5)
workers = {task.name for task in Path("/proc/self/task").iterdir()} - before
print(*[len(os.sched_getaffinity(int(task))) for task in workers], len(os.sched_getaffinity(0)))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert out == ["1", "1", str(len(os.sched_getaffinity(0)))]
