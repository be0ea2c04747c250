"""ERNIE 4.5 MoE: rotary embedding of pairs of columns, a softmax router with a bias, shared experts."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, head_dim_of, model_of, moe_of, shared_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_compile.families.parts.sources import one_row, turned_heads
from dymoe_runtime.spec import ModelSpec

THETA = 500_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that an ERNIE 4.5 MoE config.json describes."""
    config.fixed("use_bias", False)
    config.fixed("use_rmsnorm", True)
    config.fixed("moe_norm_gate_logits", True)
    config.fixed("moe_gate", "topk")
    config.fixed("moe_gate_act", "softmax")
    config.ignore("moe_group", "moe_multimodal_dispatch_use_allgather")  # where experts are in a cluster
    width = config.integer("moe_intermediate_size")
    moe = moe_of(
        config,
        width,
        normalize=True,
        shared=shared_of(config, width, 2, "moe_num_shared_experts"),
        experts=("moe_num_experts", "num_experts"),
        top_k=("moe_k", "num_experts_per_tok"),
        selection_bias=config.boolean("moe_use_aux_free", default=True),
        least_sum=config.number("moe_norm_min", default=1e-12),
    )
    attention = attention_of(config, rope_of(config, head_dim_of(config), THETA))
    width = config.integer("intermediate_size")
    layers = layers_with([attention] * layers_of(config), moe, _dense_layers(config), width)
    return model_of(config, layers, norm_eps=1e-5, tied=True)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of an ERNIE 4.5 MoE model."""
    bias = "moe_statics.e_score_correction_bias"
    return common_names(shared=("shared_experts",)).replace_dense(
        **turned_heads(spec),
        router_select=one_row(f"{LAYER}mlp.{bias}", f"{LAYER}mlp.gate.{bias}"),
    )


def _dense_layers(config: Config) -> set[int]:
    """Return the layers with a dense MLP: those outside the range of routed layers, and between them."""
    count = layers_of(config)
    first = config.integer("moe_layer_start_index", default=1, least=0)
    last = config.integer("moe_layer_end_index", default=-1, least=-1)
    step = config.integer("moe_layer_interval", default=1)
    routed = range(first, count if last == -1 else last + 1)
    return {n for n in range(count) if n not in routed or (n + 1) % step}
