"""Mixtral: eight wide experts, routing weights always normalized, w1/w3/w2 for gate/up/down."""

from __future__ import annotations

from dataclasses import replace

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

THETA = 1_000_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that a Mixtral config.json describes."""
    moe = moe_of(config, config.integer("intermediate_size"), normalize=True)
    attention = attention_of(config, rope_of(config, THETA), window=window_of(config))
    layers = alike_layers(layers_of(config), attention, moe)
    return model_of(config, layers, norm_eps=config.number("rms_norm_eps", default=1e-5))


def names(spec: ModelSpec) -> Names:
    """Return the checkpoint names of the tensors of a Mixtral model."""
    common = common_names("block_sparse_moe", "mlp")
    theirs = {"gate": "w1", "up": "w3", "down": "w2"}
    template = "model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{}.weight"
    expert = {name: (template.format(their), *common.expert[name]) for name, their in theirs.items()}
    return replace(common, expert=expert)
