"""Qwen2-MoE: a gated shared expert, biases of queries, keys and values, some layers optionally dense or windowed."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import (
    FULL,
    SLIDING,
    attention_kinds,
    dense_by_step,
    layers_of,
    layers_with,
    window_of,
)
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_compile.families.parts.sources import one_row
from dymoe_runtime.spec import ModelSpec, SharedSpec

WINDOW, WINDOW_LAYERS = 4096, 28


def spec(config: Config) -> ModelSpec:
    """Return the model that a Qwen2-MoE config.json describes."""
    moe = moe_of(
        config,
        config.integer("moe_intermediate_size", default=1408),
        normalize=config.boolean("norm_topk_prob", default=False),
        shared=SharedSpec(config.integer("shared_expert_intermediate_size", default=5632), gated=True),
    )
    rope, biased = rope_of(config, head_dim_of(config)), config.boolean("qkv_bias", default=True)
    mixers = [attention_of(config, rope, bias=biased, window=window) for window in _windows(config)]
    width = config.integer("intermediate_size", default=5632)
    return model_of(config, layers_with(mixers, moe, dense_by_step(config), width), norm_eps=1e-6)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Qwen2-MoE model."""
    gate = one_row(f"{LAYER}mlp.shared_expert_gate.weight")
    return common_names(shared=("shared_expert",)).replace_dense(shared_gate=gate)


def _windows(config: Config) -> list[int | None]:
    """Return the window of each layer: by default, each second one of the first `max_window_layers` has one."""
    window = window_of(config, WINDOW) if config.boolean("use_sliding_window", default=False) else None
    first = config.integer("max_window_layers", default=WINDOW_LAYERS, least=0) if window else 0
    config.ignore("sliding_window", "max_window_layers")  # without `use_sliding_window`, they mean nothing
    default = [SLIDING if layer < first and layer % 2 == 0 else FULL for layer in range(layers_of(config))]
    return [window if kind == SLIDING else None for kind in attention_kinds(config, window, default)]
