"""Granite MoE Shared: Granite MoE with an MLP beside the experts."""

from dymoe_compile.families.softmax_of_chosen.granitemoe import names, spec

__all__ = ["names", "spec"]
