"""compile.json: everything measured during compilation, for machines and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dymoe_compile.calibrate.statistics import LayerStatistics
from dymoe_compile.policy.operating_points import Fitted, point_json
from dymoe_compile.policy.sensitivity import Decoding, Rule, Static
from dymoe_compile.quantize import quantize
from dymoe_compile.quantize.grid import tier_weights
from dymoe_runtime.bundle.bundle import DENSE, FINDINGS, POLICY, REPORT, Bundle, Manifest, dense_bytes, expert_layout
from dymoe_runtime.bundle.policy import LayerPolicy
from dymoe_runtime.bundle.tiers import BLOCK, MAX_CURVED, MX_BLOCK, MXFP4, TRELLIS
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.memory_plan import PROCESS_BYTES, plan_budget
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.tools.describe import CONTEXT

VERSION = 2


@dataclass(frozen=True)
class Source:
    """What was compiled: the bytes of the checkpoint's tensors, and which of them the bundle does without."""

    nbytes: int
    left_out: Mapping[str, int]  # what they are -> how many


def collect(
    bundle: Bundle,
    kernels: Kernels,
    source: Source,
    dense_kl: Mapping[str, Mapping[str, float]],
    statistics: Mapping[int, LayerStatistics],
    fitted: Fitted,
    examples: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the findings as JSON types; equal input gives equal findings.

    `bundle` has all files but the policy, the findings and the report. `examples` are those that `examples.describe`
    returns.
    """
    manifest, policy = bundle.manifest, fitted.policy
    spec, ladder = manifest.spec, manifest.ladder
    layout = expert_layout(spec, ladder)
    findings = {
        "version": VERSION,
        "model": {
            "name": f"{spec.model_type} {spec.num_layers} x {spec.num_experts}",
            "family": spec.model_type,
            "num_layers": spec.num_layers,
            "num_experts": spec.num_experts,
            "top_k": spec.top_k,
            "hidden_size": spec.hidden_size,
            "expert_width": spec.expert_width,
        },
        "ladder": list(ladder),
        "storage": {
            "bits_per_weight": {str(tier): round(layout.bits_per_weight(tier), 4) for tier in ladder},
            "expert_bytes": layout.record_bytes * spec.num_experts * len(spec.moe_layers),
            "dense_bytes": manifest.files[DENSE].nbytes,
            "dense_bytes_per_token": _dense_bytes_per_token(manifest),
            "bundle_bytes": _bundle_bytes(manifest),
            "original_bytes": source.nbytes,
            "dense_bits": dict(manifest.dense_bits),
            "dense_kl": {kind: dict(row) for kind, row in dense_kl.items()},
        },
        "memory": _memory(bundle, kernels),
        "quantizer": _quantizer(spec, ladder),
        "layers": [_layer(layer, statistics) for layer in policy.layers],
        "points": [
            {**point_json(point), "kl_interval": fitted.kl_intervals.get(point.decode)} for point in policy.points
        ],
        "default_point": policy.default_point,
        "compared": [{**point_json(point), **_setting(rule)} for point, rule in fitted.compared],
        "peers": [],
        "notes": [*policy.notes, *(f"left out: {what} ({count} tensors)" for what, count in source.left_out.items())],
        "provenance": dict(manifest.provenance),
        "reference_nll": fitted.reference_nll,
        "measured_tokens": fitted.tokens,
    }
    return findings if examples is None else findings | {"examples": dict(examples)}


def _bundle_bytes(manifest: Manifest) -> int:
    """Return the bytes of the bundle, without the files that are made from the findings and with them."""
    return sum(entry.nbytes for name, entry in manifest.files.items() if name not in (POLICY, FINDINGS, REPORT))


def _dense_bytes_per_token(manifest: Manifest) -> int:
    """Return the bytes of dense weights that decoding one token reads: all but the table of embeddings, if separate."""
    spec = manifest.spec
    return sum(
        dense_bytes(name, shape, manifest.dense_bits)
        for name, shape in spec.tensor_shapes().items()
        if name != "embed" or spec.tie_embeddings
    )


def _memory(bundle: Bundle, kernels: Kernels) -> dict[str, Any]:
    """Return the least memory that works, as `dymoe-bundle inspect` gives it, and what it leaves for experts.

    Each byte of memory beyond the least is one more for experts, up to `full_arena_bytes`.
    """
    context = min(CONTEXT, bundle.spec.max_context)
    budget: Budget = plan_budget(bundle, kernels, context, process_bytes=PROCESS_BYTES)
    least = replace(budget, process_bytes=budget.floor_process_bytes, memory_bytes=budget.floor_bytes)
    return {
        "context": context,
        "floor_bytes": budget.floor_bytes,
        "arena_bytes_at_floor": least.arena_bytes,
        "full_arena_bytes": budget.full_arena_bytes,
    }


def _quantizer(spec: ModelSpec, ladder: tuple[int, ...]) -> dict[str, Any]:
    """Return how the codes of the experts were made."""
    if spec.expert_grid == MXFP4:
        return {
            "method": "none: the experts were trained in MXFP4 and keep their codes",
            "levels": "those of MXFP4 at 4 bits; fewer bits join neighbours",
            "block": MX_BLOCK,
            "steps": "a power of two a block, the same at all tiers, and one bf16 multiplier a row",
            "sweeps": 0,
            "tier_weights": "",
        }
    return {
        "method": "coordinate descent on all tiers at once, Hessian weighted by the gates",
        "levels": _levels(spec, ladder),
        "block": BLOCK,
        "steps": "4 bits a block and tier, one bf16 multiplier a row",
        "sweeps": quantize.SWEEPS,
        "tier_weights": ", ".join(f"{weight:g}" for weight in tier_weights(ladder, spec.expert_grid)),
    }


def _levels(spec: ModelSpec, ladder: tuple[int, ...]) -> str:
    if spec.expert_grid == TRELLIS:
        return "trellis codes: levels depend on the codes above"
    return "curved: least squared error for normal weights" if ladder[-1] <= MAX_CURVED else "even"


def _setting(rule: Rule) -> dict[str, Any]:
    """Return the setting of a rule: thresholds per layer, or the tier of each expert."""
    if isinstance(rule, Static):
        return {"tiers": [list(row) for row in rule.tiers]}
    assert isinstance(rule, Decoding)
    return {"decode": [list(row) for row in rule.rule.decode], "prefill": [list(row) for row in rule.rule.prefill]}


def _layer(layer: LayerPolicy, statistics: Mapping[int, LayerStatistics]) -> dict[str, Any]:
    if layer.layer not in statistics:
        return {"layer": layer.layer, "dense": True}
    return {
        "layer": layer.layer,
        "dense": False,
        "frequency": list(layer.frequency),
        "gate_mass": list(layer.gate_mass),
        "sensitivity": dict(layer.sensitivity),
        "router_overlap": dict(layer.router_overlap),
        "expert_error": {tier: list(errors) for tier, errors in layer.expert_error.items()},
        "pinned": list(layer.pinned),
        "data_free": list(layer.data_free),
        "look_ahead": {**statistics[layer.layer].look_ahead, "used": layer.look_ahead_by},
    }
