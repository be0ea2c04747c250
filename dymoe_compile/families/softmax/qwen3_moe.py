"""Qwen3-MoE: per-head query and key norms, some layers optionally dense."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import dense_by_step, layers_of, layers_with, window_of
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import ModelSpec

WINDOW = 4096


def spec(config: Config) -> ModelSpec:
    """Return the model that a Qwen3-MoE config.json describes."""
    window = window_of(config, WINDOW) if config.boolean("use_sliding_window", default=False) else None
    config.ignore("sliding_window", "max_window_layers", "layer_types")  # all layers have the same window
    return plain_spec(config, normalize=config.boolean("norm_topk_prob", default=False), window=window)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Qwen3-MoE model."""
    return common_names()


def plain_spec(config: Config, normalize: bool, theta: float = 10_000.0, window: int | None = None) -> ModelSpec:
    """Return a Qwen3-MoE model; `theta` is the default of `rope_theta`."""
    moe = moe_of(config, config.integer("moe_intermediate_size"), normalize)
    rope = rope_of(config, head_dim_of(config), theta)
    attention = attention_of(config, rope, qk_norm="head", window=window, **biases_of(config))
    width = config.integer("intermediate_size", default=0, least=0)
    layers = layers_with([attention] * layers_of(config), moe, dense_by_step(config), width)
    return model_of(config, layers, norm_eps=1e-6, dense_width=width)
