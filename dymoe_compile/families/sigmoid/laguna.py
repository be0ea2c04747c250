"""Laguna: heads, window and rotary embedding by layer, a softplus gate of the attention, a sigmoid router."""

from __future__ import annotations

from collections.abc import Sequence

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import (
    FULL,
    SLIDING,
    attention_kinds,
    dense_by_list,
    layers_of,
    layers_with,
    window_of,
)
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import AttentionSpec, ModelSpec, Rope, SharedSpec

WINDOW = 512
THETA = {FULL: 500_000.0, SLIDING: 10_000.0}
# The share of columns that turn if a configuration gives no rope at all.
PARTIAL = {FULL: 0.5, SLIDING: 1.0}
GATES: dict[object, str] = {True: "head", "per-head": "head", "per-element": "element"}


def spec(config: Config) -> ModelSpec:
    """Return the model that a Laguna config.json describes."""
    config.fixed("norm_topk_prob", True)
    config.fixed("moe_router_use_sigmoid", True)
    config.fixed("moe_apply_router_weight_on_input", False)
    config.fixed("swa_attention_sink_enabled", False)
    config.fixed("qkv_bias", False)
    moe = moe_of(
        config,
        config.integer("moe_intermediate_size"),
        normalize=True,
        shared=SharedSpec(config.integer("shared_expert_intermediate_size", default=512)),
        score="sigmoid",
        selection_bias=True,
        scale=config.number("moe_routed_scaling_factor", default=1.0),
        softcap=max(0.0, config.number("moe_router_logit_softcapping", default=0.0, above=-1.0)),
    )
    # Before `mlp_layer_types`, there was a list of dense layers.
    older = config.get("mlp_only_layers", default=None)
    dense = dense_by_list(config, default=(0,) if older is None else config.integers("mlp_only_layers"))
    layers = layers_with(_mixers(config), moe, dense, config.integer("intermediate_size"))
    return model_of(config, layers, norm_eps=1e-6)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Laguna model."""
    return common_names(shared=("shared_expert", "shared_experts")).replace_dense(
        attn__gate=(LAYER + "self_attn.g_proj.weight",),
        router_select=tuple(f"{LAYER}mlp.{block}.e_score_correction_bias" for block in ("experts", "gate")),
    )


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer."""
    head_dim, window = head_dim_of(config, 128), window_of(config, WINDOW)
    kinds = attention_kinds(config, window, default=[FULL] * layers_of(config))
    ropes = {kind: _rope(config, head_dim, kind) for kind in set(kinds)}
    return [
        attention_of(
            config,
            ropes[kind],
            heads=heads,
            head_dim=head_dim,
            qk_norm="head",
            window=window if kind == SLIDING else None,
            gate=_gate(config),
            gate_activation="softplus",
            **biases_of(config),
        )
        for kind, heads in zip(kinds, _heads(config), strict=False)
    ]


def _heads(config: Config) -> Sequence[int]:
    """Return the heads of each layer; raise DymoeError if a layer has none."""
    count = layers_of(config)
    heads = config.integers("num_attention_heads_per_layer") or (config.integer("num_attention_heads"),) * count
    if len(heads) < count or min(heads) == 0:
        raise DymoeError(f"config.json: 'num_attention_heads_per_layer' must give each of {count} layers some heads")
    return heads


def _rope(config: Config, head_dim: int, kind: str) -> Rope:
    """Return the rotary embedding of the layers of type `kind`."""
    given = config.get("rope_parameters", default=None) is not None
    return rope_of(config, head_dim, THETA[kind], partial=1.0 if given else PARTIAL[kind], layer_type=kind)


def _gate(config: Config) -> str:
    """Return whether the gate has a value for each head or for each element.

    `gating_types` repeats for each layer what `gating` says. Raises DymoeError if it does not.
    """
    gating, by_layer = config.get("gating", default=True), config.get("gating_types", default=[])
    gate = GATES.get(gating) if isinstance(gating, (bool, str)) else None
    repeated = {GATES.get(str(kind).replace("_", "-")) for kind in by_layer} if isinstance(by_layer, list) else {None}
    if gate is None or repeated - {gate}:
        raise DymoeError(
            f"config.json: 'gating' is {str(gating)[:40]!r} with 'gating_types' {str(by_layer)[:40]}, expected "
            "per-head or per-element, and the same one in all layers"
        )
    return gate
