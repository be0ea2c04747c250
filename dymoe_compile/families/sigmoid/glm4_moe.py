"""GLM-4.5 to 4.7: half of each head turns, the router of DeepSeek-V3, shared experts, first layers dense."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, deepseek_moe, head_dim_of, model_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import first_layers, layers_of, layers_with
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    """Return the model that a GLM-4 MoE config.json describes."""
    attention = attention_of(
        config,
        rope_of(config, head_dim_of(config), partial=0.5),
        qk_norm="head" if config.boolean("use_qk_norm", default=False) else "none",
        bias=config.boolean("attention_bias", default=False),  # the output projection never has one
    )
    moe = deepseek_moe(config, normalize=True, shared=1)
    dense = first_layers(config, default=1)
    layers = layers_with([attention] * layers_of(config), moe, dense, config.integer("intermediate_size"))
    return model_of(config, layers, norm_eps=1e-5)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a GLM-4 MoE model."""
    return common_names(shared=("shared_experts",))
