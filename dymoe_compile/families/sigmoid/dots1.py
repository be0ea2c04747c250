"""dots.llm1: per-head query and key norms, the router of DeepSeek-V3, first layers dense."""

from __future__ import annotations

from dataclasses import replace

from dymoe_compile.families.parts.blocks import attention_of, biases_of, deepseek_moe, head_dim_of, model_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import (
    FULL,
    SLIDING,
    attention_kinds,
    first_layers,
    layers_of,
    layers_with,
    window_of,
)
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import AttentionSpec, ModelSpec

# What config.json means without the keys `sliding_window` and `max_window_layers`.
WINDOW, FULL_LAYERS = 4096, 62


def spec(config: Config) -> ModelSpec:
    """Return the model that a dots.llm1 config.json describes."""
    moe = deepseek_moe(config, normalize=False, shared=0)
    dense = first_layers(config, default=0)
    layers = layers_with(_mixers(config), moe, dense, config.integer("intermediate_size"))
    return model_of(config, layers, norm_eps=1e-6)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a dots.llm1 model."""
    return common_names(shared=("shared_experts",))


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer: by default, layers from `max_window_layers` on have a window."""
    full = attention_of(config, rope_of(config, head_dim_of(config)), qk_norm="head", **biases_of(config))
    window, first = window_of(config, WINDOW), config.integer("max_window_layers", default=FULL_LAYERS, least=0)
    default = [SLIDING if window and layer >= first else FULL for layer in range(layers_of(config))]
    sliding = replace(full, window=window)
    return [sliding if kind == SLIDING else full for kind in attention_kinds(config, window, default)]
