"""What the tests of whole layers share: small specifications with every option of a layer, and random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from kernel_kit import random_matrix

from dymoe_runtime.bundle.bundle import dense_kind, dense_layout
from dymoe_runtime.bundle.tiers import RecordLayout, make_layout, pack_record, split_record
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.spec import (
    AttentionSpec,
    GatedDeltaSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    Rope,
    RouterSpec,
    SharedSpec,
    clamped_swiglu,
)

HIDDEN, VOCABULARY = 48, 97
ATTENTION = AttentionSpec(heads=4, kv_heads=2, head_dim=16, rope=Rope(), qk_norm="head")
ROUTER = RouterSpec(experts=6, top_k=2, normalize=True)
SIGMOID = replace(ROUTER, score="sigmoid", selection_bias=True, top_k=3, scale=2.5, eps=0.1)
MOE = MoeSpec(ROUTER, width=40)
SHARED = MoeSpec(ROUTER, 40, SharedSpec(24, scale=0.5))
DENSE = MlpSpec(56)
DELTA = GatedDeltaSpec(key_heads=2, value_heads=4, key_dim=12, value_dim=20, taps=3)
YARN = Rope(500.0, "yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.2)
LONGROPE = Rope(
    500.0,
    "longrope",
    original_max_position_embeddings=12,
    attention_factor=1.1,
    short_factors=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7),
    long_factors=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
    long_attention_factor=1.3,
)
LLAMA3 = Rope(kind="llama3", factor=8.0, original_max_position_embeddings=64)


def model(*layers: LayerSpec, activation: str = "silu", **rest: Any) -> ModelSpec:
    width = max((layer.feed_forward.width for layer in layers if isinstance(layer.feed_forward, MlpSpec)), default=0)
    return ModelSpec("toy", VOCABULARY, HIDDEN, 512, 1e-5, layers, activation, dense_width=width, **rest)


def of_mixers(*mixers: AttentionSpec | GatedDeltaSpec, moe: MoeSpec = MOE, activation: str = "silu") -> ModelSpec:
    return model(*(LayerSpec(mixer, moe) for mixer in mixers), activation=activation)


def of_moe(moe: MoeSpec, activation: str = "silu") -> ModelSpec:
    return of_mixers(ATTENTION, replace(ATTENTION, window=7), ATTENTION, moe=moe, activation=activation)


# Each option of a layer occurs here.
MODELS: dict[str, ModelSpec] = {
    "plain": of_moe(MOE),
    "biases": of_mixers(replace(ATTENTION, bias=True), replace(ATTENTION, output_bias=True, qk_norm="none")),
    "all experts and one key": of_mixers(
        replace(ATTENTION, kv_heads=1), moe=MoeSpec(replace(ROUTER, top_k=6, normalize=False), 40), activation="gelu"
    ),
    "full norm and clip": of_mixers(replace(ATTENTION, qk_norm="full", clip=0.5, kv_heads=4), ATTENTION),
    "ropes": of_mixers(
        *(replace(ATTENTION, rope=rope) for rope in (YARN, LLAMA3, Rope(500.0, "linear", factor=2.0), Rope(dims=8))),
        replace(ATTENTION, rope=Rope(kind="proportional", dims=4), window=5),
    ),
    "no rope": of_mixers(replace(ATTENTION, rope=None, qk_norm="none"), ATTENTION),
    "heads": of_mixers(replace(ATTENTION, head_dim=20), replace(ATTENTION, heads=6, kv_heads=3, head_dim=24)),
    "norm after rope": of_mixers(replace(ATTENTION, norm_after_rope=True), replace(ATTENTION, value_norm=True)),
    "chunks and temperature": of_mixers(
        replace(ATTENTION, chunk=6),
        replace(ATTENTION, rope=None, temperature=(4.0, 0.5)),
        moe=MoeSpec(replace(ROUTER, score="sigmoid", top_k=1, normalize=False, scales_input=True), 40, SharedSpec(40)),
    ),
    "sinks": of_mixers(
        replace(ATTENTION, sinks=True, bias=True, output_bias=True, window=5),
        replace(ATTENTION, sinks=True, rope=YARN),
        moe=MoeSpec(replace(ROUTER, score="softmax_of_chosen", bias=True), 40, biases=True),
        activation=clamped_swiglu(1.702, 7.0),
    ),
    "gates": of_mixers(
        replace(ATTENTION, gate="element"),
        replace(ATTENTION, gate="head", gate_activation="softplus"),
        replace(ATTENTION, gate="head"),
    ),
    "scale": of_mixers(replace(ATTENTION, scale=0.1), replace(ATTENTION, scale=1.0, temperature=(2.0, 0.1))),
    "delta": of_mixers(DELTA, ATTENTION, DELTA, moe=replace(MOE, shared=SharedSpec(24, gated=True))),
    "delta alone": model(LayerSpec(DELTA, DENSE), LayerSpec(replace(DELTA, value_heads=2, taps=4), MOE)),
    "dense layers": model(LayerSpec(ATTENTION, DENSE), LayerSpec(ATTENTION, MOE), LayerSpec(DELTA, MlpSpec(40))),
    "groups": model(
        LayerSpec(replace(ATTENTION, rope=Rope(dims=8)), DENSE),
        *[LayerSpec(ATTENTION, MoeSpec(replace(SIGMOID, groups=3, top_groups=2), 40, SharedSpec(56)))] * 2,
    ),
    "one best of a group": of_moe(
        MoeSpec(replace(ROUTER, groups=2, group_score="max", softcap=1.5, scale=2.0, least_sum=0.8), 40)
    ),
    "norms of outputs": model(
        LayerSpec(replace(ATTENTION, qk_norm="full"), MOE, pre_norms=False, post_norms=True),
        LayerSpec(ATTENTION, DENSE, post_norms=True, scalar=True),
        LayerSpec(DELTA, MOE, post_norms=True, residual_scale=0.5),
    ),
    "own norms": model(
        *[
            LayerSpec(
                replace(ATTENTION, value_norm=True, scale=1.0, window=window),
                MoeSpec(
                    replace(ROUTER, expert_scale=True, plain_norm=True), 40, SharedSpec(72, own_norms=True, scale=0.5)
                ),
                post_norms=True,
                scalar=True,
            )
            for window in (7, None)
        ],
        activation="gelu_pytorch_tanh",
    ),
    "layer norm": model(
        LayerSpec(replace(ATTENTION, rope=LONGROPE), replace(MOE, shared=SharedSpec(24, own_norms=True))),
        LayerSpec(replace(ATTENTION, rope=LONGROPE, window=5), DENSE, post_norms=True),
        norm="layer_bias",
        head_bias=True,
    ),
    "sparsemixer": model(
        *[LayerSpec(ATTENTION, MoeSpec(replace(ROUTER, score="sparsemixer", normalize=False, threshold=0.8), 40))] * 2,
        norm="layer_bias",
    ),
    "parallel": model(
        LayerSpec(ATTENTION, DENSE, parallel=True),
        LayerSpec(replace(ATTENTION, rope=None, bias=True), SHARED, parallel=True),
        LayerSpec(ATTENTION, SHARED, residual_scale=0.5),
        LayerSpec(DELTA, SHARED, residual_scale=0.3, parallel=True),
        norm="layer",
    ),
    "parallel without a shared expert": model(
        *[LayerSpec(ATTENTION, MoeSpec(replace(SIGMOID, plain_norm=True), 40), parallel=True)] * 2
    ),
    "parallel and scaled inputs": model(
        *[
            LayerSpec(
                ATTENTION,
                MoeSpec(replace(ROUTER, score="sigmoid", top_k=1, scales_input=True), 40, SharedSpec(40, gated=True)),
                parallel=True,
            )
        ]
        * 2
    ),
    "residual scale": model(
        LayerSpec(replace(ATTENTION, scale=0.2), MOE, residual_scale=0.3), LayerSpec(ATTENTION, MOE, residual_scale=0.3)
    ),
}


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A tensor that is not quantized: norms and scales around 1, small biases, routers that tell experts apart."""
    around = 1.0 if name.endswith("norm") or name.endswith((".scalar", ".router_scale")) else 0.0
    size = 0.3 if len(shape) == 2 or "sinks" in name or name.endswith("shared_gate") else 0.1
    return (around + rng.standard_normal(shape) * size).astype(np.float32)


class RandomDense:
    """Random dense weights of a model; the matrices of its layers are quantized to 8 bits."""

    pause = None

    def __init__(self, spec: ModelSpec, kernels: Kernels, seed: int = 0) -> None:
        self._kernels = kernels
        rng = np.random.default_rng(seed)
        self._tensors: dict[str, np.ndarray] = {}
        self._records: dict[str, tuple[RecordLayout, np.ndarray]] = {}
        for name, shape in spec.each_tensor():
            if name.startswith("layers.") and len(shape) == 2 and dense_kind(name, shape) is not None:
                layout = dense_layout((shape[0], shape[1]), 8)
                matrix = random_matrix(rng, shape[0], shape[1], layout.ladder, 50.0)
                self._records[name] = layout, pack_record(layout, {"weight": matrix})
            else:
                self._tensors[name] = random_tensor(name, shape, rng)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self._tensors["embed"][ids]

    def vector(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def optional(self, name: str) -> np.ndarray | None:
        return self._tensors.get(name)

    def record(self, name: str) -> tuple[RecordLayout, np.ndarray] | None:
        return self._records.get(name)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        if name in self._records:
            layout, data = self._records[name]
            y = self._kernels.linear(layout, layout.ladder[0], [data], x)
        else:
            y = self._kernels.matmul(x, self._tensors[name])
        bias = self._tensors.get(f"{name}_bias")
        return y if bias is None else y + bias


def random_expert(spec: ModelSpec, ladder: tuple[int, ...], seed: int) -> tuple[RecordLayout, list[np.ndarray]]:
    """The record of a random expert whose outputs are about as large as its inputs: layout and segments."""
    rng = np.random.default_rng(seed)
    layout = make_layout(spec.expert_shapes, ladder, vectors=spec.expert_vectors)
    matrices = {
        name: random_matrix(rng, rows, cols, ladder, 200.0) for name, (rows, cols) in spec.expert_shapes.items()
    }
    vectors = {name: random_tensor(name, (rows,), rng) for name, rows in spec.expert_vectors.items()}
    return layout, split_record(layout, pack_record(layout, matrices, vectors))
