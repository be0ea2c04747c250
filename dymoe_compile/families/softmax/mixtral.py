"""Mixtral: eight wide experts, routing weights always normalized, w1/w3/w2 for gate/up/down."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with, window_of
from dymoe_compile.families.parts.names import NUMBERED, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import ModelSpec

THETA = 1_000_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that a Mixtral config.json describes."""
    moe = moe_of(config, config.integer("intermediate_size"), normalize=True)
    attention = attention_of(config, rope_of(config, head_dim_of(config), THETA), window=window_of(config))
    return model_of(config, layers_with([attention] * layers_of(config), moe), norm_eps=1e-5)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Mixtral model."""
    return common_names("block_sparse_moe", "mlp", theirs=NUMBERED)
