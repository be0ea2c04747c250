"""Qwen3-MoE: per-head query and key norms, some layers optionally dense."""

from __future__ import annotations

from dymoe_compile.families import (
    Config,
    Names,
    attention_of,
    common_names,
    layers_of,
    model_of,
    moe_of,
    rope_of,
    window_of,
)
from dymoe_runtime.spec import ModelSpec, alike_layers


def spec(config: Config) -> ModelSpec:
    """Return the model that a Qwen3-MoE config.json describes."""
    step, always_dense = config.integer("decoder_sparse_step", default=1), set(config.integers("mlp_only_layers"))
    dense = tuple(layer for layer in range(layers_of(config)) if layer in always_dense or (layer + 1) % step)
    dense_width = config.integer("intermediate_size", default=0, least=0)
    moe = moe_of(
        config, config.integer("moe_intermediate_size"), normalize=config.boolean("norm_topk_prob", default=False)
    )
    attention = attention_of(
        config,
        rope_of(config),
        qk_norm="head",
        bias=config.boolean("attention_bias", default=False),
        window=window_of(config) if config.boolean("use_sliding_window", default=False) else None,
    )
    layers = alike_layers(layers_of(config), attention, moe, dense, dense_width)
    return model_of(config, layers, norm_eps=config.number("rms_norm_eps", default=1e-6), dense_width=dense_width)


def names(spec: ModelSpec) -> Names:
    """Return the checkpoint names of the tensors of a Qwen3-MoE model."""
    return common_names()
