"""Routed experts: every instruction set of this machine against the reference, a call against its parts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from kernel_kit import (
    ALL,
    COMPILED,
    HIDDEN,
    WIDTH,
    Record,
    assert_within,
    expert,
    expert_at,
    grid_input,
    kernels_of,
    random_input,
    random_matrix,
    reference,
    rounding,
)

from dymoe_runtime.bundle import tiers
from dymoe_runtime.bundle.tiers import MXFP4, TRELLIS, Part
from dymoe_runtime.kernels.interface import ffn
from dymoe_runtime.kernels.prepared import ExpertRows, PreparedExpert
from dymoe_runtime.kernels.reads import PendingReads, ReadThreads
from dymoe_runtime.memory import address_of
from dymoe_runtime.spec import ACTIVATIONS, clamped_swiglu
from dymoe_runtime.store.read_threads import PythonThreads

CLAMPED = clamped_swiglu(1.702, 7.0)
TOKENS = (0, 1, 2, 5, 33, 200)
NATIVE_READS = [kernels_of(COMPILED[0]).reads] if COMPILED else []


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_activations_of_any_size_equal_the_reference(isa: str, activation: str, size: float) -> None:
    """Far out too, where an exponential would overflow."""
    layout, tier, segments = expert_at(4)
    gate = reference.dequantize(layout, tier, segments, "gate")
    x = grid_input(3, HIDDEN) * size / np.abs(grid_input(3, HIDDEN) @ gate.T).max()
    y, expected = (ffn(kernels, layout, tier, segments, x, activation) for kernels in (kernels_of(isa), reference))
    np.testing.assert_allclose(y, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
@pytest.mark.parametrize(
    ("grid", "ladder", "tier"),
    [(grid, (2, 3, 4), t) for grid in ("", MXFP4, TRELLIS) for t in (2, 3, 4)] + [("", (5, 8), 8)],
)
def test_ffn_equals_the_reference(isa: str, grid: str, ladder: tuple[int, ...], tier: int, activation: str) -> None:
    """Gate and up are exact for x on the grid, which leaves the rounding of the hidden vector."""
    layout, segments = expert(ladder, grid)
    given = segments[: layout.segments_of(tier)]
    gate, up, down = (reference.dequantize(layout, tier, given, name) for name in ("gate", "up", "down"))
    for tokens in TOKENS:
        x = grid_input(tokens, HIDDEN) / 64
        hidden = reference.activate(x @ gate.T, x @ up.T, activation)
        y = ffn(kernels_of(isa), layout, tier, given, x, activation)
        bound = 1.01 * rounding(hidden) @ np.abs(down).T  # 1.01: float rounding can move a code
        assert_within(y, ffn(reference, layout, tier, given, x, activation), bound)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("grid", ["", MXFP4, TRELLIS])
def test_a_call_of_many_experts_equals_calls_of_one(isa: str, grid: str) -> None:
    """At mixed tiers, for rows in any order, bit for bit; rows of no part stay as they are."""
    for x, parts, tokens in (
        (random_input(1, HIDDEN), [(4, 0, 1), (2, 1, 1), (3, 3, 1)], [0, 0, 0, 0]),
        (random_input(1, HIDDEN), [(4, 0, 1)], [0]),
        (random_input(3, HIDDEN), [(2, 2, 1), (4, 0, 2)], [2, 0, 1]),
        (random_input(150, HIDDEN), [(3, 0, 150), (4, 150, 0), (2, 150, 90)], [*range(150), *range(0, 90)]),
    ):
        y = run_parts(isa, parts, x, tokens, grid)
        expected = np.full((len(tokens), HIDDEN), 7.0, np.float32)
        for tier, first, count in parts:
            rows = slice(first, first + count)
            one = partial(ffn, kernels_of(isa), *expert_at(tier, grid), activation="silu")
            alone = [one(x=x[token : token + 1]) for token in tokens[rows]]
            expected[rows] = np.concatenate([*alone, expected[:0]])
        if kernels_of(isa).batch_invariant:
            assert np.array_equal(y, expected)
        else:
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@cache
def biased_expert() -> Record:
    """An expert like that of `expert_at`, with biases about as large as its products. Read only."""
    rng, shapes = np.random.default_rng(5), {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    lengths = {f"{name}_bias": rows for name, (rows, _) in shapes.items()}
    layout = tiers.make_layout(shapes, (2, 3, 4), vectors=lengths)
    matrices = {name: random_matrix(rng, *shape, layout.ladder, 100.0) for name, shape in shapes.items()}
    vectors = {name: rng.standard_normal(length, np.float32) for name, length in lengths.items()}
    return layout, tiers.split_record(layout, tiers.pack_record(layout, matrices, vectors))


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
@pytest.mark.parametrize("tier", [2, 3, 4])
def test_biases_of_experts_equal_the_reference(isa: str, tier: int, activation: str) -> None:
    """For many tokens and for one."""
    layout, segments = biased_expert()
    given, kernels = segments[: layout.segments_of(tier)], kernels_of(isa)
    gate, up, down = (reference.dequantize(layout, tier, given, name) for name in ("gate", "up", "down"))
    gate_bias, up_bias, _ = (tiers.vector_of(given, part) for part in layout.vectors.values())
    for tokens in TOKENS:
        x = grid_input(tokens, HIDDEN) / 64
        hidden = reference.activate(x @ gate.T + gate_bias, x @ up.T + up_bias, activation)
        y, bound = ffn(kernels, layout, tier, given, x, activation), 1.01 * rounding(hidden) @ np.abs(down).T
        assert_within(y, ffn(reference, layout, tier, given, x, activation), bound)
        if tokens:
            one = kernels.moe_token(
                [kernels.prepare(layout, tier, given)], x[:1], np.ones((1, 1), np.float32), activation
            )
            assert np.array_equal(one, y[:1])


@pytest.mark.parametrize("isa", ALL)
def test_places_of_an_expert_hold_its_biases(isa: str) -> None:
    (layout, segments), kernels, x = biased_expert(), kernels_of(isa), random_input(1, HIDDEN)
    places = [(address_of(segment), segment.size) for segment in segments]
    weights = np.ones((1, 1), np.float32)
    at, of = kernels.prepare_at(layout, 3, places), kernels.prepare(layout, 3, segments)
    assert np.array_equal(kernels.moe_token([at], x, weights, "silu"), kernels.moe_token([of], x, weights, "silu"))
    plain = kernels.prepare(replace(layout, vectors={}), 3, segments)
    assert not np.allclose(kernels.moe_token([plain], x, weights, "silu"), kernels.moe_token([of], x, weights, "silu"))


@pytest.mark.parametrize("isa", COMPILED)
def test_biases_that_do_not_fit_are_refused(isa: str) -> None:
    (layout, segments), kernels = biased_expert(), kernels_of(isa)
    part = layout.vectors["up_bias"]

    def prepare(part: Part, segments: list[np.ndarray]) -> None:
        kernels.prepare(replace(layout, vectors={**layout.vectors, "up_bias": part}), 2, segments)

    prepare(part, segments[:1])
    wrong = [
        (replace(part, nbytes=part.nbytes + 4), segments),
        (replace(part, nbytes=part.nbytes + 1), segments),
        (replace(part, offset=part.offset + 1), segments),
        (replace(part, offset=-4), segments),
        (replace(part, segment=1), segments[:1]),
        (part, [segments[0][: part.offset + part.nbytes - 1]]),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="up_bias"):
            prepare(*arguments)


def run_parts(
    isa: str, parts: list[tuple[int, int, int]], x: np.ndarray, tokens: list[int], grid: str = ""
) -> np.ndarray:
    """Parts (tier, first row, rows) of the expert of `expert_at`, into rows of sevens."""
    y = np.full((len(tokens), x.shape[1]), 7.0, np.float32)
    kernels = kernels_of(isa)
    at = {tier: kernels.prepare(*expert_at(tier, grid)) for tier in (2, 3, 4)}
    kernels.moe([ExpertRows(at[tier], first, count) for tier, first, count in parts], x, np.array(tokens), y, "silu")
    return y


@pytest.mark.parametrize("isa", ALL)
def test_compiled_kernels_are_batch_invariant(isa: str) -> None:
    assert kernels_of(isa).batch_invariant == (isa in COMPILED)


@pytest.mark.parametrize("isa", ALL)
def test_experts_refuse_what_does_not_fit(isa: str) -> None:
    kernels, x = kernels_of(isa), random_input(2, HIDDEN)
    wrong = [
        lambda: ffn(kernels, *expert_at(2), x, "relu"),
        lambda: ffn(kernels, *expert_at(2), np.ascontiguousarray(x[:, :-1]), "silu"),
        lambda: run_parts(isa, [(4, 0, 3)], x, [0, 0, 2]),
        lambda: run_parts(isa, [(4, 0, 3)], x, [0, -1, 1]),
        lambda: run_parts(isa, [(4, 2, 2)], x, [0, 0, 0]),
        lambda: run_parts(isa, [(4, -1, 2)], x, [0, 0, 0]),
        lambda: kernels.combine(x, np.array([[0, 2]]), np.ones((1, 2), np.float32)),
        lambda: kernels.combine(x, np.array([[0]]), np.ones((1, 2), np.float32)),
    ]
    for call in wrong:
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (1, 8, 2048), (70, 4, 100)], ids=str)
def test_combining_equals_the_reference_bit_for_bit(isa: str, shape: tuple[int, int, int]) -> None:
    tokens, ranks, width = shape
    rng = np.random.default_rng(0)
    y = rng.standard_normal((tokens * ranks + 1, width), np.float32)
    rows = rng.integers(-1, len(y), (tokens, ranks))
    weights = rng.random((tokens, ranks), np.float32)
    assert np.array_equal(kernels_of(isa).combine(y, rows, weights), reference.combine(y, rows, weights))


# One token


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("grid", ["", MXFP4, TRELLIS])
def test_one_token_equals_moe_and_combine(isa: str, grid: str) -> None:
    kernels = kernels_of(isa)
    experts = [kernels.prepare(*expert_at(tier, grid)) for tier in (4, 2, 3)]
    x, weights = random_input(1, HIDDEN), np.array([[0.5, 0.3, 0.2]], np.float32)
    y = np.empty((3, HIDDEN), np.float32)
    kernels.moe([ExpertRows(e, row, 1) for row, e in enumerate(experts)], x, np.zeros(3, np.int64), y, "gelu")
    combined = kernels.combine(y, np.arange(3)[None], weights)
    assert np.array_equal(kernels.moe_token(experts, x, weights, "gelu"), combined)


@pytest.mark.parametrize("isa", ALL)
def test_one_token_refuses_what_does_not_fit(isa: str) -> None:
    kernels = kernels_of(isa)
    experts = [kernels.prepare(*expert_at(tier)) for tier in (4, 2, 3)]
    x, weights = random_input(1, HIDDEN), np.array([[0.5, 0.3, 0.2]], np.float32)
    wrong: list[tuple[list[PreparedExpert], np.ndarray, np.ndarray, str]] = [
        ([], x, weights, "silu"),
        (experts, x, weights[:, :2], "silu"),
        (experts, np.concatenate([x, x]), weights, "silu"),
        (experts, x, weights, "relu"),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError):
            kernels.moe_token(*arguments)


@pytest.mark.parametrize("isa", COMPILED)
def test_an_expert_of_other_kernels_is_refused(isa: str) -> None:
    kernels, unprepared = kernels_of(isa), reference.prepare(*expert_at(2))
    x, y = random_input(1, HIDDEN), np.empty((1, HIDDEN), np.float32)
    with pytest.raises(ValueError, match="prepared"):
        kernels.moe_token([unprepared], x, np.ones((1, 1), np.float32), "silu")
    with pytest.raises(ValueError, match="prepared"):
        kernels.moe([ExpertRows(unprepared, 0, 1)], x, np.zeros(1, np.int64), y, "silu")


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("make", [PythonThreads, *NATIVE_READS])
def test_pending_experts_of_a_token_run_as_their_reads_end(
    isa: str, make: Callable[[int], ReadThreads], tmp_path: Path
) -> None:
    """To the same numbers as if all had been resident."""
    layout, segments = expert((2, 3, 4))
    kernels, tiers = kernels_of(isa), (4, 2, 3, 4)
    resident = [kernels.prepare(*expert_at(tier)) for tier in tiers]
    x, weights = random_input(1, HIDDEN), np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)
    expected = kernels.moe_token(resident, x, weights, "silu")
    np.concatenate(segments).tofile(tmp_path / "record")
    fd, reads = os.open(tmp_path / "record", os.O_RDONLY), make(2)
    for late in ((0,), (1, 3), (0, 1, 2, 3)):
        experts, tickets = list(resident), []
        for rank in late:
            memory = [np.zeros_like(segment) for segment in segments[: layout.segments_of(tiers[rank])]]
            experts[rank] = kernels.prepare(layout, tiers[rank], memory)
            if rank == 3:  # after the others have come
                reads.submit(-1, 0, [], 0, partial(time.sleep, 0.1))
                reads.submit(-1, 0, [], 0, partial(time.sleep, 0.1))
            tickets.append((rank, reads.submit(fd, 0, [(m.ctypes.data, m.size) for m in memory], 0, None)))
        pending = PendingReads(reads, tickets)
        assert np.array_equal(kernels.moe_token(experts, x, weights, "silu", pending), expected)
        assert pending.wait_s > 0 and (3 not in late or pending.wait_s > 0.05)
    assert reads.close(10.0)
    os.close(fd)


@pytest.mark.parametrize("isa", COMPILED)
def test_pending_experts_must_be_experts_of_the_call(isa: str) -> None:
    kernels = kernels_of(isa)
    assert kernels.reads is not None
    reads, experts = kernels.reads(1), [kernels.prepare(*expert_at(2))] * 2
    x, weights = random_input(1, HIDDEN), np.array([[0.6, 0.4]], np.float32)
    first, second = (reads.submit(-1, 0, [], 0, None) for _ in range(2))
    for wrong in ([(2, first)], [(-1, first)], [(0, first), (0, second)], [(0, first), (1, first)]):
        with pytest.raises(ValueError, match="pending"):
            kernels.moe_token(experts, x, weights, "silu", PendingReads(reads, wrong))
    assert reads.close(10.0)
