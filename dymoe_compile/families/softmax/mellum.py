"""Mellum 2: Qwen3-MoE with a window and a rotary embedding by type of layer."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import (
    FULL,
    SLIDING,
    attention_kinds,
    dense_by_list,
    layers_of,
    layers_with,
    window_of,
)
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import AttentionSpec, ModelSpec

WINDOW = 1024
THETA = {FULL: 500_000.0, SLIDING: 10_000.0}


def spec(config: Config) -> ModelSpec:
    """Return the model that a Mellum config.json describes."""
    config.ignore("use_sliding_window", "max_window_layers")  # `layer_types` says that
    width = config.integer("moe_intermediate_size")
    moe = moe_of(config, width, normalize=config.boolean("norm_topk_prob", default=True))
    dense_width = config.integer("intermediate_size", default=0, least=0)
    layers = layers_with(_mixers(config), moe, dense_by_list(config, default=()), dense_width)
    return model_of(config, layers, norm_eps=1e-6)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Mellum model."""
    return common_names()


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer."""
    head_dim, window = head_dim_of(config, 128), window_of(config, WINDOW)
    kinds = attention_kinds(config, window, default=[FULL] * layers_of(config))
    mixers = {
        kind: attention_of(
            config,
            rope_of(config, head_dim, THETA[kind], layer_type=kind),
            head_dim=head_dim,
            qk_norm="head",
            window=window if kind == SLIDING else None,
            **biases_of(config),
        )
        for kind in set(kinds)
    }
    return [mixers[kind] for kind in kinds]
