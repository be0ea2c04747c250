"""Flint: attention sinks, no positions on layers without a window, sigmoid router, an ungated shared expert."""

from __future__ import annotations

from dataclasses import replace

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
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
from dymoe_runtime.spec import AttentionSpec, ModelSpec, SharedSpec

WINDOW = 513


def spec(config: Config) -> ModelSpec:
    """Return the model that a Flint config.json describes."""
    moe = moe_of(
        config,
        config.integer("moe_intermediate_size"),
        normalize=config.boolean("norm_topk_prob", default=True),
        shared=SharedSpec(config.integer("shared_expert_intermediate_size", default=1024)),
        score="sigmoid",
    )
    dense = dense_by_step(config, default=(0, 1))
    layers = layers_with(_mixers(config), moe, dense, config.integer("intermediate_size"))
    return model_of(config, layers, norm_eps=1e-6)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Flint model."""
    sinks = tuple(f"{LAYER}self_attn.{name}" for name in ("softmax_offset", "sinks"))
    return common_names(shared=("shared_expert",)).replace_dense(attn__sinks=sinks)


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer: with a window and a rope, or with neither."""
    head_dim, window = head_dim_of(config, 128), window_of(config, WINDOW)
    full = attention_of(config, None, head_dim=head_dim, qk_norm="head", sinks=True, **biases_of(config))
    sliding = replace(full, rope=rope_of(config, head_dim), window=window)
    last = layers_of(config) - 1
    default = [FULL if layer in (0, last) or layer % 4 == 1 else SLIDING for layer in range(last + 1)]
    return [sliding if kind == SLIDING else full for kind in attention_kinds(config, window, default)]
