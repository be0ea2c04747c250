"""Qwen3-VL-MoE, its language part: the mathematics of Qwen3-MoE; experts stacked, with rows and columns swapped."""

from __future__ import annotations

from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.softmax.qwen3_moe import plain_spec
from dymoe_runtime.spec import ModelSpec

ALIASES = ("qwen3_vl_moe_text",)
THETA = 500_000.0


def spec(config: Config) -> ModelSpec:
    """Return the model that the language part of a Qwen3-VL-MoE config.json describes."""
    config.fixed("norm_topk_prob", True)
    config.fixed("use_qk_norm", True)
    config.ignore("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")  # there is no window
    return plain_spec(config, normalize=True, theta=THETA)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Qwen3-VL-MoE model."""
    return common_names().replace_stacked(transposed=True)
