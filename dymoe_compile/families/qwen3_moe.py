"""Qwen3-MoE: per-head query and key norms, some layers optionally dense."""

from __future__ import annotations

from dymoe_compile.families import Config, Names, common_names, common_spec, layers_of, rope_of, window_of
from dymoe_runtime.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    step = config.integer("decoder_sparse_step", default=1)
    dense = set(config.integers("mlp_only_layers"))
    return common_spec(
        config,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        rope=rope_of(config),
        norm_topk=config.boolean("norm_topk_prob", default=False),
        expert_width=config.integer("moe_intermediate_size"),
        qk_norm="head",
        attention_bias=config.boolean("attention_bias", default=False),
        sliding_window=window_of(config) if config.boolean("use_sliding_window", default=False) else None,
        dense_layers=tuple(layer for layer in range(layers_of(config)) if layer in dense or (layer + 1) % step),
        dense_width=config.integer("intermediate_size", default=0, least=0),
    )


def names(spec: ModelSpec) -> Names:
    return common_names()
