"""Qwen3.5-MoE: the mathematics of Qwen3-Next, with a projection each for the inputs of the gated delta rule."""

from __future__ import annotations

from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.names import Names
from dymoe_compile.families.parts.sources import halves
from dymoe_compile.families.recurrent import qwen3_next
from dymoe_compile.families.recurrent.qwen3_next import DELTA
from dymoe_runtime.spec import ModelSpec

ALIASES = ("qwen3_5_moe_text",)


def spec(config: Config) -> ModelSpec:
    """Return the model that the language part of a Qwen3.5-MoE config.json describes."""
    config.fixed("norm_topk_prob", True)
    return qwen3_next.spec(config)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Qwen3.5-MoE model."""
    return qwen3_next.hybrid_names(spec).replace_dense(
        delta__qkv=(DELTA + "in_proj_qkv.weight",),
        delta__z=(DELTA + "in_proj_z.weight",),
        delta__ba_exact=halves(DELTA + "in_proj_b.weight", DELTA + "in_proj_a.weight"),
    )
