"""gpt-oss: attention sinks, a window in each second layer, biases everywhere, a clamped SwiGLU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import SLIDING, attention_kinds, each_nth, layers_with, window_of
from dymoe_compile.families.parts.names import LAYER, Names, Templates, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import MATRICES, AttentionSpec, ModelSpec, clamped_swiglu

THETA, WINDOW, WIDTH = 150_000.0, 128, 2880
# The rope of a config.json that has none.
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def spec(config: Config) -> ModelSpec:
    """Return the model that a gpt-oss config.json describes."""
    moe = moe_of(
        config,
        config.integer("intermediate_size", default=WIDTH),
        normalize=False,
        biases=True,
        top_k=("num_experts_per_tok", "experts_per_token"),
        score="softmax_of_chosen",
        bias=True,
    )
    alpha, limit = config.number("swiglu_alpha", default=1.702), config.number("swiglu_limit", default=7.0)
    config.ignore("hidden_act")  # the experts have the activation above
    layers = layers_with(_mixers(config), moe)
    return model_of(config, layers, norm_eps=1e-5, activation=clamped_swiglu(alpha, limit))


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a gpt-oss model."""
    experts = LAYER + "mlp.experts."
    common = common_names().replace_stacked(
        gate_up_bias=(experts + "gate_up_proj_bias",),
        down_bias=(experts + "down_proj_bias",),
        transposed=True,
        interleaved=True,
    )
    biases: dict[str, Templates] = {f"{name}_bias": (f"{experts}{{expert}}.{name}_proj.bias",) for name in MATRICES}
    return replace(common, expert={**common.expert, **biases}).replace_dense(
        router=(LAYER + "mlp.router.weight",),
        router_bias=(LAYER + "mlp.router.bias",),
    )


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer."""
    head_dim, window = head_dim_of(config, 64), window_of(config, WINDOW)
    given = config.mapping("rope_parameters") or config.mapping("rope_scaling")
    rope = rope_of(config if given else config.view(rope_parameters=YARN), head_dim, THETA)
    full = attention_of(config, rope, head_dim=head_dim, sinks=True, **biases_of(config, default=True))
    sliding = replace(full, window=window)
    kinds = attention_kinds(config, window, each_nth(config, 2))
    return [sliding if kind == SLIDING else full for kind in kinds]
