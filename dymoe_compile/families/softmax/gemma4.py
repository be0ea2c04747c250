"""Gemma 4 with experts, and a dense MLP beside them. Layers with a window and layers without one differ in heads.

Keys of layers without a window are their values too. The router reads the residual stream through a norm of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dymoe_compile.families.parts.blocks import activation_of, attention_of, biases_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import FULL, SLIDING, attention_kinds, each_nth, layers_with, window_of
from dymoe_compile.families.parts.names import LAYER, Names, Stacked, Templates, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_compile.families.parts.sources import ones, scaled_columns
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import MATRICES, AttentionSpec, ModelSpec, SharedSpec

ALIASES = ("gemma4_text",)
WINDOW = 512
# The ropes of a config.json that has none.
ROPES: dict[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def spec(config: Config) -> ModelSpec:
    """Return the model that the language part of a Gemma 4 config.json describes."""
    _check_variant(config)
    moe = moe_of(
        config,
        config.integer("moe_intermediate_size"),
        normalize=True,
        shared=SharedSpec(config.integer("intermediate_size", default=9216), own_norms=True),
        top_k=("top_k_experts",),
        plain_norm=True,
        expert_scale=True,
    )
    return model_of(
        config,
        layers_with(_mixers(config), moe, post_norms=True, scalar=True),
        norm_eps=1e-6,
        tied=True,
        activation=activation_of(config, "hidden_activation", default="gelu_pytorch_tanh"),
        embed_scale=math.sqrt(config.integer("hidden_size")),
        logit_softcap=config.optional_number("final_logit_softcapping") or 0.0,
    )


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Gemma 4 model with experts."""
    common = common_names()
    attention, experts, router = LAYER + "self_attn.", LAYER + "experts.", LAYER + "router."
    before, after = LAYER + "pre_feedforward_layernorm", LAYER + "post_feedforward_layernorm"
    stacked = Stacked((experts + "gate_up_proj",), (experts + "down_proj",))
    expert: dict[str, Templates] = {name: (f"{experts}{{expert}}.{name}_proj.weight",) for name in MATRICES}
    return replace(common, expert=expert, stacked=stacked).replace_dense(
        **{f"shared.{name}": common.dense[f"mlp.{name}"] for name in MATRICES},
        # Layers without a window have no values of their own.
        attn__v=(attention + "v_proj.weight", attention + "k_proj.weight"),
        attn__v_bias=(attention + "v_proj.bias", attention + "k_proj.bias"),
        attn__v_norm=ones(),
        attn_post_norm=(LAYER + "post_attention_layernorm.weight",),
        shared_norm=(before + ".weight",),
        shared_post_norm=(after + "_1.weight",),
        mlp_norm=(before + "_2.weight",),
        experts_post_norm=(after + "_2.weight",),
        mlp_post_norm=(after + ".weight",),
        router=scaled_columns(router + "proj.weight", router + "scale"),
        router_scale=(router + "per_expert_scale",),
        scalar=(LAYER + "layer_scalar",),
    )


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer: by default, each sixth one has no window; the last one never has."""
    window = window_of(config, WINDOW)
    kinds = (*attention_kinds(config, window, each_nth(config, 6))[:-1], FULL)
    ropes = config if config.mapping("rope_parameters") else config.view(rope_parameters=ROPES)
    return [
        attention_of(
            config,
            rope_of(ropes, head_dim, ROPES[kind]["rope_theta"], layer_type=kind),
            head_dim=head_dim,
            kv_heads=kv_heads,
            qk_norm="head",
            value_norm=True,
            scale=1.0,
            window=window if kind == SLIDING else None,
            **biases_of(config),
        )
        for kind, (head_dim, kv_heads) in zip(kinds, _heads(config, kinds), strict=True)
    ]


def _heads(config: Config, kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Return (columns of a head, key-value heads) of each layer.

    They come from `per_layer_config` (transformers 5), or from keys for all layers without a window (before).
    """
    head_dim, kv_heads = config.integer("head_dim", default=256), config.integer("num_key_value_heads", default=4)
    full_dim, full_heads = config.integer("global_head_dim", default=512), kv_heads
    if config.boolean("attention_k_eq_v", default=False):
        full_heads = config.integer("num_global_key_value_heads", default=kv_heads)
    # Otherwise it means nothing. Whether keys are values shows in the names of tensors.
    config.ignore("num_global_key_value_heads")
    if config.get("per_layer_config", default=None) is None:
        return [(full_dim, full_heads) if kind == FULL else (head_dim, kv_heads) for kind in kinds]
    heads = [(head_dim, kv_heads)] * len(kinds)
    for name, values in config.mapping("per_layer_config").items():
        known = isinstance(values, dict) and set(values) <= {"head_dim", "num_key_value_heads"}
        if not known or not re.fullmatch("[0-9]{1,5}", name) or int(name) >= len(kinds):
            raise DymoeError(
                f"config.json: 'per_layer_config' has {name!r}: {str(values)[:60]}, expected a layer with head_dim or "
                "num_key_value_heads; this variant is not supported"
            )
        layer = Config(values)
        heads[int(name)] = (
            layer.integer("head_dim", default=head_dim),
            layer.integer("num_key_value_heads", default=kv_heads),
        )
    return heads


def _check_variant(config: Config) -> None:
    """Raise DymoeError for a Gemma 4 without experts, or with parts that have no place in a `ModelSpec`."""
    if not config.boolean("enable_moe_block", default=False):
        raise DymoeError(
            "config.json: the model has no routed experts ('enable_moe_block' is not true); "
            "DyMoE compiles MoE models only"
        )
    if config.integer("hidden_size_per_layer_input", default=256, least=0):
        raise DymoeError("config.json: 'hidden_size_per_layer_input' is not 0, embeddings per layer are not supported")
    config.fixed("num_kv_shared_layers", 0)
    if config.get("use_bidirectional_attention", default=False) not in (False, "vision"):
        raise DymoeError("config.json: 'use_bidirectional_attention' lets text see later text, which is not supported")
    # The first concerns embeddings per layer, the second layers that share keys.
    config.ignore("vocab_size_per_layer_input", "use_double_wide_mlp")
