"""MiniMax-M2: query and key norms over all heads at once, partly turning heads, a sigmoid router with a bias."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with
from dymoe_compile.families.parts.names import LAYER, NUMBERED, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ModelSpec

THETA = 5_000_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that a MiniMax-M2 config.json describes."""
    config.fixed("scoring_func", "sigmoid")
    config.fixed("qk_norm_type", "per_layer")
    config.ignore("shared_moe_mode")  # of a shared expert, which no release has
    if set(config.integers("attn_type_list")) - {1}:
        raise DymoeError("config.json: 'attn_type_list' has layers without softmax attention, which is not supported")
    moe = moe_of(
        config,
        config.integer("intermediate_size"),
        normalize=True,
        score="sigmoid",
        selection_bias=config.boolean("use_routing_bias", default=True),
    )
    head_dim = head_dim_of(config, 128)
    share = config.integer("rotary_dim", default=head_dim) / head_dim
    attention = attention_of(
        config,
        rope_of(config, head_dim, THETA, partial=share),
        head_dim=head_dim,
        qk_norm="full" if config.boolean("use_qk_norm", default=True) else "none",
    )
    return model_of(config, layers_with([attention] * layers_of(config), moe), norm_eps=1e-6)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a MiniMax-M2 model."""
    blocks = ("block_sparse_moe", "mlp")
    biases = tuple(f"{LAYER}{block}.e_score_correction_bias" for block in blocks)
    return common_names(*blocks, theirs=NUMBERED).replace_dense(router_select=biases)
