"""Qwen3-Omni-MoE, the language part of its thinker: the mathematics of Qwen3-MoE."""

from __future__ import annotations

from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.softmax.qwen3_moe import plain_spec
from dymoe_runtime.spec import ModelSpec

ALIASES = ("qwen3_omni_moe_thinker", "qwen3_omni_moe_text")
THETA = 1_000_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that the language part of a Qwen3-Omni-MoE config.json describes."""
    config.fixed("use_qk_norm", True)
    config.ignore("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")  # there is no window
    config.ignore("top_k")  # of sampling; files of older transformers keep it here
    return plain_spec(config, normalize=config.boolean("norm_topk_prob", default=True), theta=THETA)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Qwen3-Omni-MoE model."""
    return common_names()
