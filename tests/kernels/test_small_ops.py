"""What stands between the products: norms, rotation, activations and routing, compiled, by NumPy and by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_kit import ALL, COMPILED, kernels_of, random_input, reference, with_threads

from dymoe_compile.checkpoint import torch_ops
from dymoe_runtime.spec import ACTIVATIONS

# Norms


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("shape", [(1, 64), (5, 3, 20), (300, 128), (0, 64)], ids=str)
def test_norm_equals_the_reference(isa: str, shape: tuple[int, ...]) -> None:
    x, weight = random_input(*shape, seed=3), random_input(shape[-1], seed=4)
    got = kernels_of(isa).norm(x, weight, 1e-5)
    np.testing.assert_allclose(got, reference.norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ALL)
def test_norm_equals_torch(isa: str) -> None:
    x, weight = random_input(5, 3, 20, seed=3), random_input(20, seed=4)
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x), (20,), torch.from_numpy(weight), 1e-5).numpy()
    np.testing.assert_allclose(kernels_of(isa).norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", COMPILED)
def test_norm_refuses_a_weight_of_another_length(isa: str) -> None:
    with pytest.raises(ValueError, match="weight"):
        kernels_of(isa).norm(random_input(3, 2, 8), np.ones(7, np.float32), 1e-5)


# Rotation


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 64), (300, 8, 128)], ids=str)
def test_rotate_equals_the_reference(isa: str, shape: tuple[int, int, int]) -> None:
    x, angles = random_input(*shape, seed=3), random_input(shape[0], shape[2], seed=4)
    table = np.cos(angles), np.sin(angles)
    expected = reference.rotate(x.copy(), *table)
    got = kernels_of(isa).rotate(x, *table)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert got is x


@pytest.mark.parametrize("isa", COMPILED)
def test_rotate_refuses_tables_that_do_not_fit(isa: str) -> None:
    x = random_input(3, 2, 8)
    for cosines, sines in (
        [(3, 4), (3, 4)],
        [(3, 16), (3, 16)],
        [(3, 3), (2, 8)],
        [(3, 8), (3, 6)],
        [(3, 3), (3, 3)],
        [(3, 10), (3, 10)],
    ):
        with pytest.raises(ValueError):
            kernels_of(isa).rotate(x, np.ones(cosines, np.float32), np.ones(sines, np.float32))


# Activations


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 77), (150, 1085)], ids=str)
def test_activate_equals_the_reference(isa: str, shape: tuple[int, int], size: float, activation: str) -> None:
    """With any number of threads; what is given stays as it is."""
    gate, up = random_input(*shape) * np.float32(size), random_input(*shape, seed=1)
    given = gate.copy(), up.copy()
    expected = reference.activate(gate, up, activation)
    kernels = kernels_of(isa)
    results = with_threads(kernels, lambda: kernels.activate(gate, up, activation))
    assert results[0].dtype == np.float32
    np.testing.assert_allclose(results[0], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(initial=0.0))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(gate, given[0]) and np.array_equal(up, given[1])


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_activate_equals_torch(isa: str, size: float, activation: str) -> None:
    gate, up = random_input(3, 77) * np.float32(size), random_input(3, 77, seed=1)
    expected = torch_ops.ACTIVATIONS[activation](torch.from_numpy(gate)).numpy() * up
    got = kernels_of(isa).activate(gate, up, activation)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("isa", ALL)
def test_activate_refuses_what_does_not_fit(isa: str) -> None:
    gate, kernels = random_input(3, 8), kernels_of(isa)
    for shape in ((3, 7), (2, 8), (1, 8), (8,), (8, 3)):
        with pytest.raises(ValueError, match="up"):
            kernels.activate(gate, random_input(*shape), "silu")
    with pytest.raises(ValueError, match="relu"):
        kernels.activate(gate, gate, "relu")


@pytest.mark.parametrize("isa", COMPILED)
def test_activate_refuses_arrays_that_it_cannot_read(isa: str) -> None:
    gate = random_input(3, 8)
    for wrong in (gate.astype(np.float64), random_input(8, 3).T):
        with pytest.raises(ValueError, match="contiguous"):
            kernels_of(isa).activate(gate, wrong, "silu")


# Routing


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
@pytest.mark.parametrize("shape", [(0, 8, 2), (1, 1, 1), (5, 8, 8), (33, 60, 4), (300, 64, 8)], ids=str)
def test_route_equals_the_reference(isa: str, shape: tuple[int, int, int], normalize: bool) -> None:
    tokens, count, top_k = shape
    logits = 3 * random_input(tokens, count)
    given = logits.copy()
    experts, weights = kernels_of(isa).route(logits, top_k, normalize)
    expected_experts, expected_weights = reference.route(logits, top_k, normalize)
    assert (experts.dtype, weights.dtype) == (expected_experts.dtype, expected_weights.dtype) == (np.int64, np.float32)
    assert experts.shape == weights.shape == (tokens, top_k)
    assert np.array_equal(experts, expected_experts)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    assert (np.diff(weights) <= 0).all()
    if normalize or top_k == count:
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert np.array_equal(logits, given)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
def test_route_equals_torch(isa: str, normalize: bool) -> None:
    logits = 3 * random_input(33, 60)
    expected, expected_experts = torch.from_numpy(logits).softmax(dim=-1).topk(4, dim=-1)
    expected = expected / expected.sum(dim=-1, keepdim=True) if normalize else expected
    experts, weights = kernels_of(isa).route(logits, 4, normalize)
    assert np.array_equal(experts, expected_experts.numpy())
    np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
def test_of_equal_logits_the_lower_expert_is_chosen(isa: str, normalize: bool) -> None:
    logits = np.array([[1, 3, 3, 0, 3, 1], [2, 2, 2, 2, 2, 2], [0, 0, 5, 0, 0, 0]], np.float32)
    experts, weights = kernels_of(isa).route(logits, 4, normalize)
    assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [2, 0, 1, 3]]
    np.testing.assert_allclose(weights, reference.route(logits, 4, normalize)[1], rtol=1e-5)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5, 7])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_bad_logit_spoils_the_weights_of_its_token_only(isa: str, place: int, bad: float, normalize: bool) -> None:
    """Its experts are some that there are, none twice."""
    logits = random_input(3, 8)
    good_experts, good_weights = kernels_of(isa).route(logits, 4, normalize)
    logits[1, place] = bad
    experts, weights = kernels_of(isa).route(logits, 4, normalize)
    assert np.isnan(weights[1]).all()
    assert len(set(experts[1].tolist()) & set(range(8))) == 4
    assert np.array_equal(experts[[0, 2]], good_experts[[0, 2]])
    assert np.array_equal(weights[[0, 2]], good_weights[[0, 2]])


@pytest.mark.parametrize("isa", ALL)
def test_route_refuses_more_experts_than_there_are(isa: str) -> None:
    for top_k in (0, 9):
        with pytest.raises(ValueError, match="weights"):
            kernels_of(isa).route(random_input(3, 8), top_k, True)


@pytest.mark.parametrize("isa", COMPILED)
def test_route_refuses_arrays_that_it_cannot_read(isa: str) -> None:
    logits = random_input(3, 8)
    for wrong in (logits.astype(np.float64), logits[0]):
        with pytest.raises(ValueError):
            kernels_of(isa).route(wrong, 2, True)
