"""OLMoE: query and key norms over all heads at once, routing weights usually not normalized."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Return the model that an OLMoE config.json describes."""
    moe = moe_of(config, config.integer("intermediate_size"), normalize=config.boolean("norm_topk_prob", default=False))
    attention = attention_of(
        config,
        rope_of(config, head_dim_of(config)),
        qk_norm="full",
        clip=config.optional_number("clip_qkv"),
        **biases_of(config),
    )
    return model_of(config, layers_with([attention] * layers_of(config), moe), norm_eps=1e-5)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of an OLMoE model."""
    return common_names()
