"""Solar Open: GLM-4 MoE without dense layers and norms of queries and keys, and with heads that turn wholly."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, deepseek_moe, head_dim_of, model_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import ModelSpec

THETA = 1_000_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that a Solar Open config.json describes."""
    config.fixed("first_k_dense_replace", 0)
    config.fixed("use_qk_norm", False)
    head_dim = head_dim_of(config, 128)
    attention = attention_of(
        config,
        rope_of(config, head_dim, THETA),
        head_dim=head_dim,
        bias=config.boolean("attention_bias", default=False),  # the output projection never has one
    )
    moe = deepseek_moe(config, normalize=True, shared=1)
    return model_of(config, layers_with([attention] * layers_of(config), moe), norm_eps=1e-5)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Solar Open model."""
    return common_names(shared=("shared_experts",))
