"""Command A+: attention and experts read the same norm; layers with a window turn queries and keys, others do not."""

from __future__ import annotations

from dataclasses import replace

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of, shared_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import (
    FULL,
    SLIDING,
    attention_kinds,
    dense_by_list,
    first_layers,
    layers_of,
    layers_with,
    window_of,
)
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_compile.families.parts.sources import turned_heads
from dymoe_runtime.spec import AttentionSpec, ModelSpec, MoeSpec

WINDOW, PERIOD = 4096, 4
FIRST = "first_k_dense_replace"


def spec(config: Config) -> ModelSpec:
    """Return the model that a Command A+ config.json describes."""
    for name, value in (("use_parallel_block", True), ("use_gated_activation", True), ("use_qk_norm", False)):
        config.fixed(name, value)
    config.choice("position_embedding_type", default="rope_gptj", known=("rope_gptj",))
    config.fixed("rotary_pct", 1.0)
    width = config.integer("intermediate_size")
    dense = dense_by_list(config, first_layers(config, default=0))
    dense_width = config.integer("prefix_dense_intermediate_size", default=width)
    layers = layers_with(_mixers(config, dense), _moe(config, width), dense, dense_width, parallel=True)
    return model_of(
        config,
        layers,
        norm_eps=config.number("layer_norm_eps", default=1e-5),
        tied=True,
        logit_scale=config.number("logit_scale", default=0.0625),
        norm="layer" if config.optional_number("rms_norm_eps") is None else "rms",
    )


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Command A+ model."""
    # In layers without rotary embedding, reordering queries and keys alike changes nothing.
    return common_names(shared=("shared_experts",)).replace_dense(**turned_heads(spec))


def _moe(config: Config, width: int) -> MoeSpec:
    """Return the experts of a layer. An average with the shared expert is a half of the weights of each."""
    is_sigmoid = config.choice("expert_selection_fn", default="softmax", known=("softmax", "sigmoid")) == "sigmoid"
    normalize = config.boolean("norm_topk_prob", default=True)
    known = ("average", "sum")
    is_average = config.choice("shared_expert_combination_strategy", default="average", known=known) == "average"
    shared = shared_of(config, width, 0)
    scale = 0.5 if is_average and shared is not None else 1.0
    return moe_of(
        config,
        width,
        normalize=is_sigmoid and normalize,
        shared=None if shared is None else replace(shared, scale=scale),
        score="sigmoid" if is_sigmoid else "softmax_of_chosen",
        scale=scale,
    )


def _mixers(config: Config, dense: set[int]) -> list[AttentionSpec]:
    """Return the attention of each layer. Layers with a window turn, and dense ones do if their pattern is 1."""
    window, first = window_of(config, WINDOW), config.integer("prefix_dense_sliding_window_pattern", default=1)
    count, before = layers_of(config), len(first_layers(config, default=0))
    period = config.integer("sliding_window_pattern", "_sliding_window_pattern", default=PERIOD)
    numbers = [*((n + 1) % first for n in range(before)), *((n + 1) % period for n in range(count - before))]
    kinds = attention_kinds(config, window, [SLIDING if rest else FULL for rest in numbers])
    rope = rope_of(config, head_dim_of(config, 128))
    attention = attention_of(config, None, head_dim=head_dim_of(config, 128), **biases_of(config))
    return [
        replace(
            attention,
            rope=rope if kind == SLIDING or (layer in dense and first == 1) else None,
            window=window if kind == SLIDING else None,
        )
        for layer, kind in enumerate(kinds)
    ]
