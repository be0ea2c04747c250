"""AFMoE (Trinity): gated attention, no positions on layers without a window, norms before and after each part."""

from __future__ import annotations

from dataclasses import replace

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of, shared_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import (
    SLIDING,
    attention_kinds,
    each_nth,
    first_layers,
    layers_with,
    window_of,
)
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import AttentionSpec, ModelSpec

WINDOW = 1024


def spec(config: Config) -> ModelSpec:
    """Return the model that an AFMoE config.json describes."""
    config.ignore("use_grouped_mm")  # a kernel for training
    width = config.integer("moe_intermediate_size")
    moe = moe_of(
        config,
        width,
        normalize=config.boolean("route_norm", default=True),
        shared=shared_of(config, width, 2),
        score=config.choice("score_func", default="sigmoid", known=("sigmoid", "softmax")),
        selection_bias=True,
        scale=config.number("route_scale", default=1.0),
        eps=1e-20,
    )
    dense = first_layers(config, 1, "num_dense_layers")
    layers = layers_with(_mixers(config), moe, dense, config.integer("intermediate_size"), post_norms=True)
    mup = config.boolean("mup_enabled", default=False)
    return model_of(config, layers, norm_eps=1e-5, embed_scale=config.integer("hidden_size") ** 0.5 if mup else 1.0)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of an AFMoE model."""
    return common_names(shared=("shared_experts",)).replace_dense(
        attn__gate=(f"{LAYER}self_attn.gate_proj.weight",),
        attn_post_norm=(f"{LAYER}post_attention_layernorm.weight",),
        mlp_norm=(f"{LAYER}pre_mlp_layernorm.weight",),
        mlp_post_norm=(f"{LAYER}post_mlp_layernorm.weight",),
        router=(f"{LAYER}mlp.router.gate.weight",),
        router_select=(f"{LAYER}mlp.expert_bias",),
    )


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer: with a window and a rope, or with neither."""
    head_dim, window = head_dim_of(config, 128), window_of(config, WINDOW)
    full = attention_of(config, None, head_dim=head_dim, qk_norm="head", gate="element", **biases_of(config))
    sliding = replace(full, rope=rope_of(config, head_dim), window=window)
    default = each_nth(config, config.integer("global_attn_every_n_layers", default=4))
    return [sliding if kind == SLIDING else full for kind in attention_kinds(config, window, default)]
