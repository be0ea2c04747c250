"""The gated delta rule: every instruction set of this machine against the reference, a call against its parts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from kernel_kit import ALL, COMPILED, kernels_of, random_input, reference, with_threads

from dymoe_runtime.kernels.prepared import DeltaArrays, DeltaWeights
from dymoe_runtime.spec import GatedDeltaSpec

SPECS = [  # key_heads, value_heads, key_dim, value_dim, taps
    GatedDeltaSpec(1, 1, 1, 1, 1),
    GatedDeltaSpec(2, 4, 16, 24, 4),
    GatedDeltaSpec(3, 3, 20, 7, 2),
    GatedDeltaSpec(1, 2, 5, 150, 3),
    GatedDeltaSpec(2, 4, 128, 128, 4),
]
TOKENS = (0, 1, 2, 3, 70)


class Case:
    """Random inputs and weights, and a state after some tokens."""

    def __init__(self, spec: GatedDeltaSpec, tokens: int) -> None:
        self.spec, heads = spec, spec.value_heads
        self.mixed, self.rates = random_input(tokens, spec.channels), random_input(tokens, 2 * heads, seed=1)
        self.weights = DeltaWeights(
            0.5 * random_input(spec.channels, spec.taps, seed=2),
            random_input(heads, seed=3),
            random_input(heads, seed=4),
        )
        self._state = DeltaArrays(
            random_input(spec.taps - 1, spec.channels, seed=5),
            random_input(heads, spec.key_dim, spec.value_dim, seed=6),
        )

    def state(self) -> DeltaArrays:
        """A copy of the state."""
        return DeltaArrays(*(array.copy() for array in self._state))

    def run(self, name: str, state: DeltaArrays, rows: slice = slice(None)) -> np.ndarray:
        return kernels_of(name).gated_delta(
            self.spec, self.mixed[rows].copy(), self.rates[rows].copy(), self.weights, state
        )


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the order and the rounding of float sums."""
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(initial=1.0))


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_delta_rule_equals_the_reference(isa: str, spec: GatedDeltaSpec, tokens: int) -> None:
    case = Case(spec, tokens)
    ours, theirs = case.state(), case.state()
    given = case.mixed.copy(), case.rates.copy()
    got, expected = case.run(isa, ours), case.run(reference.name, theirs)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert_close(got, expected)
    assert np.array_equal(ours.tail, theirs.tail)
    assert_close(ours.memory, theirs.memory)
    assert np.array_equal(case.mixed, given[0]) and np.array_equal(case.rates, given[1])


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_call_equals_its_parts(isa: str, spec: GatedDeltaSpec) -> None:
    """Token by token too, as in decoding."""
    case = Case(spec, 70)
    whole = case.state()
    expected = case.run(isa, whole)
    for cuts in ([0, 1, 3, 40, 70], range(71)):
        state = case.state()
        parts = [case.run(isa, state, slice(a, b)) for a, b in pairwise(cuts)]
        assert_close(np.concatenate(parts), expected)
        assert np.array_equal(state.tail, whole.tail)
        assert_close(state.memory, whole.memory)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("spec", [GatedDeltaSpec(2, 4, 128, 128, 4), GatedDeltaSpec(3, 3, 40, 140, 3)], ids=str)
def test_the_delta_rule_does_not_depend_on_threads(isa: str, spec: GatedDeltaSpec) -> None:
    for tokens in (1, 150):
        case = Case(spec, tokens)

        def call(case: Case = case) -> np.ndarray:
            state = case.state()
            return np.concatenate([case.run(isa, state).ravel(), state.memory.ravel(), state.tail.ravel()])

        results = with_threads(kernels_of(isa), call)
        assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("isa", ALL)
def test_what_is_written_is_recalled(isa: str) -> None:
    """With full updates and no fading, the value of the last equal key; with no updates, what was there before."""
    spec = GatedDeltaSpec(1, 1, 4, 8, 1)
    weights = DeltaWeights(
        np.ones((spec.channels, 1), np.float32), np.full(1, -30, np.float32), np.zeros(1, np.float32)
    )
    state = DeltaArrays(np.zeros((0, spec.channels), np.float32), np.zeros((1, 4, 8), np.float32))
    mixed = 20 + np.abs(random_input(3, spec.channels))  # far enough from zero for silu to change nothing
    mixed[:, :8] = -200.0
    for token, key in enumerate((1, 2, 1)):
        mixed[token, [key, 4 + key]] = 50.0
    rates = np.array([[50, 0], [50, 0], [-90, 0]], np.float32)
    got = kernels_of(isa).gated_delta(spec, mixed, rates, weights, state)
    expected = mixed[[0, 1, 0], 8:] / np.sqrt(np.float32(4))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("rate", [-1e4, 1e4])
def test_rates_far_out_stay_finite(isa: str, rate: float) -> None:
    spec = SPECS[1]
    case = Case(spec, 5)
    case.rates[:] = rate
    state = case.state()
    assert np.isfinite(case.run(isa, state)).all() and np.isfinite(state.memory).all()


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_input_that_is_not_finite_spoils_only_its_head(isa: str) -> None:
    spec = replace(SPECS[1], taps=1)
    case = Case(spec, 5)
    case.mixed[2, 2 * spec.keys + spec.value_dim] = np.nan  # a value of the second head
    got = case.run(isa, case.state()).reshape(5, spec.value_heads, spec.value_dim)
    assert np.isnan(got[2:, 1, 0]).all()
    assert np.isfinite(got[:2]).all() and np.isfinite(got[:, [0, 2, 3]]).all() and np.isfinite(got[:, 1, 1:]).all()


@pytest.mark.parametrize("isa", COMPILED)
def test_the_delta_rule_refuses_what_does_not_fit(isa: str) -> None:
    spec, case = SPECS[1], Case(SPECS[1], 3)
    gated_delta = kernels_of(isa).gated_delta
    good = {"mixed": case.mixed, "rates": case.rates, "weights": case.weights, "state": case.state()}
    conv, a_log, dt_bias = case.weights
    tail, memory = case.state()
    wrong: list[dict[str, object]] = [
        {"mixed": np.ascontiguousarray(case.mixed[:, :-1])},
        {"mixed": case.mixed.astype(np.float64)},
        {"rates": np.ascontiguousarray(case.rates[:, :-1])},
        {"rates": case.rates[:2]},
        {"weights": DeltaWeights(np.ascontiguousarray(conv.T), a_log, dt_bias)},
        {"weights": DeltaWeights(conv, a_log[:-1], dt_bias)},
        {"weights": DeltaWeights(conv, a_log, dt_bias[:-1])},
        {"state": DeltaArrays(tail[:-1], memory)},
        {"state": DeltaArrays(tail, memory[:-1])},
        {"state": DeltaArrays(tail, memory.astype(np.float64))},
    ]
    for change in wrong:
        arguments = {**good, **change}
        with pytest.raises(ValueError):
            gated_delta(spec, *arguments.values())
    for odd in ({"value_heads": 3}, {"taps": 17}):
        with pytest.raises(ValueError):
            replace(spec, **odd)
