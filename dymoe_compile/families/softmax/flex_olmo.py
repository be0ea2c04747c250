"""FlexOlmo: OLMoE whose norms come after attention and experts, which read the residual stream as it is."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import ModelSpec

THETA = 500_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that a FlexOlmo config.json describes."""
    moe = moe_of(config, config.integer("intermediate_size"), normalize=config.boolean("norm_topk_prob", default=False))
    rope = rope_of(config, head_dim_of(config), THETA)
    attention = attention_of(config, rope, qk_norm="full", **biases_of(config))
    layers = layers_with([attention] * layers_of(config), moe, pre_norms=False, post_norms=True)
    return model_of(config, layers, norm_eps=1e-6)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a FlexOlmo model."""
    return common_names().replace_dense(
        attn_post_norm=(f"{LAYER}post_attention_layernorm.weight",),
        mlp_post_norm=(f"{LAYER}post_feedforward_layernorm.weight",),
    )
