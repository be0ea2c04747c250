"""Qwen3-MoE: per-head query and key norms, some layers optionally dense."""

from __future__ import annotations

from dymoe_compile.families import Config, Names, common_names, common_spec, rope_of
from dymoe_runtime.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    layers = config.integer("num_hidden_layers")
    step = config.integer("decoder_sparse_step", default=1)
    dense = set(config.get("mlp_only_layers", default=()))
    return common_spec(
        config,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        rope=rope_of(config),
        norm_topk=bool(config.get("norm_topk_prob", default=False)),
        expert_width=config.integer("moe_intermediate_size"),
        qk_norm="head",
        attention_bias=bool(config.get("attention_bias", default=False)),
        sliding_window=config.get("sliding_window", default=None)
        if config.get("use_sliding_window", default=False)
        else None,
        dense_layers=tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % step),
        dense_width=config.integer("intermediate_size", default=0, least=0),
    )


def names(spec: ModelSpec) -> Names:
    return common_names()
