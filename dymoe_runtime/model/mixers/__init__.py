"""The kinds of mixers, one file each, and the table that maps a specification's `kind` to them."""

from __future__ import annotations

from dymoe_runtime.model.mixer import MixerKind
from dymoe_runtime.model.mixers.gated_delta import GatedDelta
from dymoe_runtime.model.mixers.gqa import GroupedQueryAttention
from dymoe_runtime.spec import MixerSpec

MIXERS: dict[str, MixerKind] = {
    "gqa": GroupedQueryAttention,
    "gated_delta": GatedDelta,
}


def mixer_kind(spec: MixerSpec) -> MixerKind:
    """Return the kind of mixer that a specification names."""
    return MIXERS[spec.kind]
