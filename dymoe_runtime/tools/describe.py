"""A summary of a bundle, as values and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dymoe_runtime.bundle.bundle import DENSE, Bundle
from dymoe_runtime.engine.memory_plan import PROCESS_BYTES, plan_budget
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.units import format_size

# Context length for which the minimum memory is given.
CONTEXT = 512


def describe(bundle: Bundle, kernels: Kernels) -> dict[str, Any]:
    """Return the bundle's sizes in bytes, effective bits per weight, tiers and a summary of its policy."""
    spec, layout, policy = bundle.spec, bundle.layout, bundle.policy
    context = min(CONTEXT, spec.max_context)
    return {
        "path": str(bundle.path),
        "model_type": spec.model_type,
        "layers": spec.num_layers,
        "moe_layers": len(spec.moe_layers),
        "experts_per_layer": spec.num_experts,
        "experts_per_token": spec.top_k,
        "expert_weights": spec.expert_weights,
        "total_bytes": bundle.total_bytes(),
        "expert_bytes": bundle.expert_bytes(),
        "dense_bytes": bundle.manifest.files[DENSE].nbytes,
        "dense_bits": dict(bundle.manifest.dense_bits),
        "record_bytes": layout.record_bytes,
        "tiers": [
            {
                "tier": tier,
                "effective_bits": layout.bits_per_weight(tier),
                "read_bytes": layout.prefix_bytes(tier),
                "bits_on_disk": 8 * layout.prefix_bytes(tier) / layout.weights,
            }
            for tier in layout.ladder
        ],
        "floor_bytes": plan_budget(bundle, kernels, context, process_bytes=PROCESS_BYTES).floor_bytes,
        "floor_context": context,
        "points": [
            {
                "name": point.name,
                "kind": point.kind,
                "bits_mean": point.bits_mean,
                "effective_bits": point.effective_bits,
                "bytes_per_token": point.bytes_per_token,
                "kl": point.kl,
                "nll": point.nll,
                "top1_agreement": point.top1_agreement,
            }
            for point in policy.points
        ],
        "default_point": policy.default_point,
        "sensitivity": {layer.layer: dict(layer.sensitivity) for layer in policy.layers if layer.sensitivity},
        "look_ahead_recall": {
            layer.layer: list(layer.look_ahead_recall[: spec.top_k])
            for layer in policy.layers
            if layer.look_ahead_recall
        },
        "notes": list(policy.notes),
        "provenance": dict(bundle.manifest.provenance),
    }


def format_description(d: Mapping[str, Any]) -> str:
    """Return the result of `describe` as text."""
    lines = [
        f"{d['path']}: {d['model_type']}, {d['layers']} layers, {d['moe_layers']} of them with "
        f"{d['experts_per_layer']} experts, {d['experts_per_token']} per token",
        f"size        {format_size(d['total_bytes'])}: experts {format_size(d['expert_bytes'])} "
        f"({d['expert_weights'] / 1e6:.1f} M weights), "
        f"dense {format_size(d['dense_bytes'])} at {_dense_bits(d['dense_bits'])}",
        f"memory      at least {format_size(d['floor_bytes'])} for a context of {d['floor_context']}",
        "",
        "tier  effective bits  bytes per expert",
    ]
    lines += [f"{t['tier']:>4}{t['effective_bits']:>16.3f}{t['read_bytes']:>18}" for t in d["tiers"]]
    lines += ["", "point        bits  effective  per token        KL     top-1"]
    for p in d["points"]:
        mark = " (default)" if p["name"] == d["default_point"] else ""
        lines.append(
            f"{p['name']:<10}{p['bits_mean']:>7.2f}{p['effective_bits']:>11.2f}"
            f"{format_size(p['bytes_per_token']):>11}{p['kl']:>10.5f}{p['top1_agreement']:>10.1%}{mark}"
        )
    lines += ["", "layer  KL with only this layer at a tier   prefetch recall by rank"]
    for layer, row in d["sensitivity"].items():
        kl = "  ".join(f"{tier}: {value:.5f}" for tier, value in row.items())
        recall = " ".join(f"{value:.0%}" for value in d["look_ahead_recall"].get(layer, []))
        lines.append(f"{layer:>5}  {kl}   {recall}")
    return "\n".join([*lines, *(f"note: {note}" for note in d["notes"])])


def _dense_bits(bits: Mapping[str, int]) -> str:
    """Return '8 bits' if all kinds of dense matrices have the same bits, else the bits of each kind."""
    if len(set(bits.values())) == 1:
        return f"{next(iter(bits.values()))} bits"
    return ", ".join(f"{kind} {width}" for kind, width in bits.items()) + " bits"
