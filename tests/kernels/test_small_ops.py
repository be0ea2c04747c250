"""What stands between the products: norms, rotation, activations and routing, compiled, by NumPy and by torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_kit import ALL, COMPILED, kernels_of, random_input, reference, with_threads

from dymoe_compile.checkpoint import torch_ops
from dymoe_runtime.spec import ACTIVATIONS, SCORES, RouterSpec, clamped_swiglu

CLAMPED = clamped_swiglu(1.702, 7.0)

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
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(1, 64), (5, 3, 20), (300, 128), (0, 64)], ids=str)
def test_layer_norm_equals_the_reference(isa: str, shape: tuple[int, ...], biased: bool) -> None:
    """Also where the mean is far from 0."""
    x, weight, bias = 3 + random_input(*shape, seed=3), random_input(shape[-1], seed=4), random_input(shape[-1])
    arguments = x, weight, bias if biased else None, 1e-5
    np.testing.assert_allclose(
        kernels_of(isa).layer_norm(*arguments), reference.layer_norm(*arguments), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_layer_norm_equals_torch(isa: str, biased: bool) -> None:
    x, weight, bias = random_input(5, 3, 20, seed=3), random_input(20, seed=4), random_input(20) if biased else None
    tensors = (None if vector is None else torch.from_numpy(vector) for vector in (weight, bias))
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (20,), *tensors, 1e-5).numpy()
    np.testing.assert_allclose(kernels_of(isa).layer_norm(x, weight, bias, 1e-5), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", COMPILED)
def test_norms_refuse_vectors_of_another_length(isa: str) -> None:
    x, good, short = random_input(3, 2, 8), np.ones(8, np.float32), np.ones(7, np.float32)
    with pytest.raises(ValueError, match="weight"):
        kernels_of(isa).norm(x, short, 1e-5)
    for name, vectors in (("weight", (short, None)), ("bias", (good, short))):
        with pytest.raises(ValueError, match=name):
            kernels_of(isa).layer_norm(x, *vectors, 1e-5)


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


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (7, 3, 20, 6), (300, 8, 128, 64)], ids=str)
def test_rotate_turns_the_first_columns_only(isa: str, shape: tuple[int, int, int, int]) -> None:
    *whole, turning = shape
    x, angles = random_input(*whole, seed=3), random_input(shape[0], turning, seed=4)
    table = np.cos(angles), np.sin(angles)
    first, second = x[..., : turning // 2], x[..., turning // 2 : turning]
    turned = np.concatenate([-second, first], axis=-1) * table[1][:, None]
    expected = np.concatenate([x[..., :turning] * table[0][:, None] + turned, x[..., turning:]], axis=-1)
    got = kernels_of(isa).rotate(x, *table)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert got is x


@pytest.mark.parametrize("isa", COMPILED)
def test_rotate_refuses_tables_that_do_not_fit(isa: str) -> None:
    x = random_input(3, 2, 8)
    for cosines, sines in (
        [(3, 0), (3, 0)],
        [(2, 4), (2, 4)],
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
@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
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
@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED, clamped_swiglu(1.0, 0.25)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_activate_equals_torch(isa: str, size: float, activation: str) -> None:
    gate, up = random_input(3, 77) * np.float32(size), random_input(3, 77, seed=1)
    expected = torch_ops.gated(activation, torch.from_numpy(gate), torch.from_numpy(up)).numpy()
    got = kernels_of(isa).activate(gate, up, activation)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("isa", ALL)
def test_activate_refuses_what_does_not_fit(isa: str) -> None:
    gate, kernels = random_input(3, 8), kernels_of(isa)
    for shape in ((3, 7), (2, 8), (1, 8), (8,), (8, 3)):
        with pytest.raises(ValueError, match="up"):
            kernels.activate(gate, random_input(*shape), "silu")
    for wrong in ("relu", "clamped_swiglu", "clamped_swiglu:1.0", "clamped_swiglu:1:x", "clamped_swiglu:1.0:7.0:1.0"):
        with pytest.raises(ValueError, match=wrong.partition(":")[0] if isa in COMPILED else None):
            kernels.activate(gate, gate, wrong)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_clamp_lets_nan_pass(isa: str) -> None:
    gate, up = np.array([[np.nan, 1, np.inf, -np.inf]], np.float32), np.array([[1, np.nan, 1, 1]], np.float32)
    got = kernels_of(isa).activate(gate, up, CLAMPED)
    assert np.isnan(got[0, :2]).all() and got[0, 2] == pytest.approx(14.0, rel=1e-4)


@pytest.mark.parametrize("isa", COMPILED)
def test_activate_refuses_arrays_that_it_cannot_read(isa: str) -> None:
    gate = random_input(3, 8)
    for wrong in (gate.astype(np.float64), random_input(8, 3).T):
        with pytest.raises(ValueError, match="contiguous"):
            kernels_of(isa).activate(gate, wrong, "silu")


# Routing


def router(experts: int, top_k: int, normalize: bool = True, **options: Any) -> RouterSpec:
    return replace(RouterSpec(experts, top_k, normalize), **options)


PLAIN = [router(8, 2), router(1, 1), router(8, 8), router(60, 4), router(64, 8)]
# One for each option, and those that families have together.
ROUTERS = {
    "bias": router(60, 4, selection_bias=True),
    "groups": router(64, 8, groups=8, top_groups=3),
    "groups_max": router(64, 8, groups=8, top_groups=3, group_score="max"),
    "groups_of_one": router(8, 4, groups=8, top_groups=4),
    "all_groups": router(64, 8, groups=4, top_groups=4, selection_bias=True),
    "scale": router(16, 3, scale=2.5),
    "eps": router(16, 3, eps=1e-2),
    "least_sum": router(16, 3, least_sum=0.9),
    "softcap": router(16, 3, softcap=2.0),
    "expert_scale": router(16, 3, expert_scale=True),
    "threshold": router(16, 4, threshold=0.6),
    "glm": router(64, 6, score="sigmoid", selection_bias=True, groups=8, top_groups=2, scale=2.5, eps=1e-20),
    "all": router(
        64,
        6,
        selection_bias=True,
        groups=8,
        top_groups=3,
        group_score="max",
        scale=0.5,
        eps=1e-3,
        least_sum=0.8,
        softcap=5.0,
        expert_scale=True,
        threshold=0.2,
    ),
}


def tensors_of(spec: RouterSpec) -> tuple[np.ndarray | None, np.ndarray | None]:
    """router_select and router_scale, if a router has them."""
    select = 0.3 * random_input(spec.experts, seed=5) if spec.selection_bias else None
    scale = 1 + 0.5 * random_input(spec.experts, seed=6) if spec.expert_scale else None
    return select, scale


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tokens", [0, 1, 33, 300])
@pytest.mark.parametrize("spec", PLAIN, ids=lambda spec: f"{spec.top_k}of{spec.experts}")
def test_route_equals_the_reference(isa: str, spec: RouterSpec, tokens: int, score: str, normalize: bool) -> None:
    logits, spec = 3 * random_input(tokens, spec.experts), replace(spec, score=score, normalize=normalize)
    given = logits.copy()
    experts, weights = kernels_of(isa).route(logits, spec)
    expected_experts, expected_weights = reference.route(logits, spec)
    assert (experts.dtype, weights.dtype) == (expected_experts.dtype, expected_weights.dtype) == (np.int64, np.float32)
    assert experts.shape == weights.shape == (tokens, spec.top_k)
    assert np.array_equal(experts, expected_experts)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    assert (np.diff(weights) <= 0).all()
    if normalize or score == "softmax_of_chosen" or (score == "softmax" and spec.top_k == spec.experts):
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert np.array_equal(logits, given)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ROUTERS)
def test_the_options_of_a_router_equal_the_reference(isa: str, name: str, score: str, normalize: bool) -> None:
    spec = replace(ROUTERS[name], score=score, normalize=normalize)
    logits, tensors = 3 * random_input(200, spec.experts), tensors_of(spec)
    experts, weights = kernels_of(isa).route(logits, spec, *tensors)
    expected_experts, expected_weights = reference.route(logits, spec, *tensors)
    assert np.array_equal(experts, expected_experts)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    assert (np.diff(weights) <= 0).all()


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
def test_route_equals_torch(isa: str, normalize: bool) -> None:
    logits = 3 * random_input(33, 60)
    expected, expected_experts = torch.from_numpy(logits).softmax(dim=-1).topk(4, dim=-1)
    expected = expected / expected.sum(dim=-1, keepdim=True) if normalize else expected
    experts, weights = kernels_of(isa).route(logits, router(60, 4, normalize))
    assert np.array_equal(experts, expected_experts.numpy())
    np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("isa", ALL)
def test_sparsemixer_weighs_an_expert_among_those_near_it(isa: str) -> None:
    """Those chosen before it do not count; the distance is relative to the larger one of logit and magnitude."""
    logits = np.array([[2, 4, 3, 1], [-2, -4, -3, -1], [0, 0, -1, -1]], np.float32)
    experts, weights = kernels_of(isa).route(logits, router(4, 2, False, score="sparsemixer", threshold=0.5))
    e = np.exp(1.0)
    shares = [(1 / (1 + 1 / e + e**-2), 1 / (1 + 1 / e)), (1 / (1 + 1 / e), 1 / (1 + 1 / e + e**-2)), (0.5, 1)]
    # The second expert of the last row is alone with its equal, which has been chosen, so it comes first.
    assert experts.tolist() == [[2, 1], [3, 0], [1, 0]]
    np.testing.assert_allclose(weights, [sorted(row, reverse=True) for row in shares], rtol=1e-5)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("score", [score for score in SCORES if score != "sparsemixer"])
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
def test_of_equal_logits_the_lower_expert_is_chosen(isa: str, normalize: bool, score: str) -> None:
    logits, spec = np.array([[1, 3, 3, 0, 3, 1], [2] * 6, [0, 0, 5, 0, 0, 0]], np.float32), router(6, 4, normalize)
    spec = replace(spec, score=score)
    experts, weights = kernels_of(isa).route(logits, spec)
    assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [2, 0, 1, 3]]
    np.testing.assert_allclose(weights, reference.route(logits, spec)[1], rtol=1e-5)


@pytest.mark.parametrize("isa", ALL)
def test_of_equal_groups_the_lower_one_is_chosen(isa: str) -> None:
    """By their two best experts, or by the best one."""
    logits = np.array([[0, 0, 2, 2, 2, 2, 1, 5]], np.float32)
    spec = router(8, 3, score="sigmoid", groups=4, top_groups=2)
    assert kernels_of(isa).route(logits, spec)[0].tolist() == [[2, 3, 4]]
    assert kernels_of(isa).route(logits, replace(spec, group_score="max"))[0].tolist() == [[7, 2, 3]]


@pytest.mark.parametrize("isa", ALL)
def test_experts_come_by_weight_even_if_others_were_chosen_first(isa: str) -> None:
    """What is added for the choice, and the factors of weights, change the order."""
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32))
    select, scale = np.array([1, 0, 0, 0], np.float32), np.array([1, 9, 1, 1], np.float32)
    chosen = kernels_of(isa).route(logits, router(4, 2, False, selection_bias=True), select)
    assert chosen[0].tolist() == [[3, 0]]
    np.testing.assert_allclose(chosen[1], [[0.4, 0.1]], rtol=1e-5)
    chosen = kernels_of(isa).route(logits, router(4, 3, False, expert_scale=True), None, scale)
    assert chosen[0].tolist() == [[1, 3, 2]]
    np.testing.assert_allclose(chosen[1], [[1.8, 0.4, 0.3]], rtol=1e-5)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("normalize", [False, True], ids=["share", "norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 5, 7])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_bad_logit_spoils_the_weights_of_its_token_only(
    isa: str, score: str, place: int, bad: float, normalize: bool
) -> None:
    """Its experts are some that there are, none twice."""
    logits, spec = random_input(3, 8), router(8, 4, normalize, score=score)
    good_experts, good_weights = kernels_of(isa).route(logits, spec)
    logits[1, place] = bad
    experts, weights = kernels_of(isa).route(logits, spec)
    assert np.isnan(weights[1]).all()
    assert len(set(experts[1].tolist()) & set(range(8))) == 4
    assert np.array_equal(experts[[0, 2]], good_experts[[0, 2]])
    assert np.array_equal(weights[[0, 2]], good_weights[[0, 2]])


@pytest.mark.parametrize("isa", ALL)
def test_route_refuses_more_experts_than_there_are(isa: str) -> None:
    for experts, top_k in ((8, 0), (8, 9), (9, 2)):
        with pytest.raises(ValueError, match=r"logits|experts"):
            kernels_of(isa).route(random_input(3, 8), router(experts, top_k))


@pytest.mark.parametrize("isa", COMPILED)
def test_route_refuses_what_does_not_fit(isa: str) -> None:
    logits, route = random_input(3, 8), kernels_of(isa).route
    for wrong in (logits.astype(np.float64), logits[0]):
        with pytest.raises(ValueError):
            route(wrong, router(8, 2))
    for groups, top_groups in ((3, 1), (0, 1), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match="groups"):
            route(logits, router(8, 2, groups=groups, top_groups=top_groups))
    with pytest.raises(ValueError, match="score"):
        route(logits, router(8, 2, score="tanh"))
    for tensor in (np.ones(7, np.float32), np.ones((1, 8), np.float32), np.ones(8)):
        for tensors in ((tensor, None), (None, tensor)):
            with pytest.raises(ValueError):
                route(logits, router(8, 2), *tensors)
