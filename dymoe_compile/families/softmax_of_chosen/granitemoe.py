"""Granite MoE: scaled embeddings, residuals and logits, gate and up of all experts in one tensor."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_compile.families.parts.sources import part_of_rows
from dymoe_runtime.spec import ModelSpec, SharedSpec

BLOCK, SHARED = f"{LAYER}block_sparse_moe.", f"{LAYER}shared_mlp."


def spec(config: Config) -> ModelSpec:
    """Return the model that a Granite MoE config.json describes."""
    shared_width = config.integer("shared_intermediate_size", default=0, least=0)  # of granitemoeshared
    moe = moe_of(
        config,
        config.integer("intermediate_size"),
        normalize=False,
        shared=SharedSpec(shared_width) if shared_width else None,
        score="softmax_of_chosen",
    )
    scale = config.number("attention_multiplier", default=1.0)
    attention = attention_of(config, rope_of(config, head_dim_of(config)), scale=scale, **biases_of(config))
    residual_scale = config.number("residual_multiplier", default=1.0)
    return model_of(
        config,
        layers_with([attention] * layers_of(config), moe, residual_scale=residual_scale),
        norm_eps=1e-6,
        embed_scale=config.number("embedding_multiplier", default=1.0),
        logit_scale=1 / config.number("logits_scaling", default=1.0),
    )


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Granite MoE model."""
    stacked = common_names("block_sparse_moe").replace_stacked(
        gate_up=(f"{BLOCK}input_linear.weight", f"{BLOCK}experts.gate_up_proj"),
        down=(f"{BLOCK}output_linear.weight", f"{BLOCK}experts.down_proj"),
    )
    return stacked.replace_dense(
        router=(f"{BLOCK}router.layer.weight", f"{BLOCK}router.weight"),
        shared__gate=part_of_rows(0, 2, f"{SHARED}input_linear.weight"),
        shared__up=part_of_rows(1, 2, f"{SHARED}input_linear.weight"),
        shared__down=(f"{SHARED}output_linear.weight",),
    )
