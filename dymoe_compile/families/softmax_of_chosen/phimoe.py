"""Phi-3.5-MoE: LayerNorm, biases, LongRoPE, and two experts a token, each weighed among those with logits near its own.

transformers calls that routing sparsemixer.
"""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with, window_of
from dymoe_compile.families.parts.names import LAYER, NUMBERED, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import ModelSpec

THETA = 1_000_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that a Phi-3.5-MoE config.json describes."""
    config.fixed("num_experts_per_tok", 2)  # whatever it says, two are chosen
    config.ignore("input_jitter_noise")  # of training
    moe = moe_of(
        config.view(num_experts_per_tok=2),
        config.integer("intermediate_size"),
        normalize=False,
        score="sparsemixer",
        threshold=2 * config.number("router_jitter_noise", default=0.01),
    )
    rope = rope_of(config, head_dim_of(config), THETA)
    attention = attention_of(config, rope, window=window_of(config), **biases_of(config))
    return model_of(
        config,
        layers_with([attention] * layers_of(config), moe),
        norm_eps=1e-5,
        norm="layer_bias",
        head_bias=config.boolean("lm_head_bias", default=False),
    )


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Phi-3.5-MoE model."""
    return common_names("block_sparse_moe", "mlp", theirs=NUMBERED).replace_dense(
        attn_norm_bias=(f"{LAYER}input_layernorm.bias",),
        mlp_norm_bias=(f"{LAYER}post_attention_layernorm.bias",),
        norm_bias=("model.norm.bias",),
        embed_bias=("lm_head.bias",),
        lm_head_bias=("lm_head.bias",),
        router=(f"{LAYER}block_sparse_moe.gate.weight", f"{LAYER}mlp.router.weight"),
    )
