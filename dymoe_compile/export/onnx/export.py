"""Exports of a bundle to ONNX: *exact* at one of its tiers, or *int4* from the checkpoint that it was compiled from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

import dymoe_runtime
from dymoe_compile.export.onnx.attention import is_fused as is_fused_attention
from dymoe_compile.export.onnx.decoder import DecoderGraph
from dymoe_compile.export.onnx.engine import CONFIG, MODEL, caches_alike, write_engine_files
from dymoe_compile.export.onnx.experts import is_fused
from dymoe_compile.export.onnx.graph import OPSET, Graph, WeightsFile, model_of
from dymoe_compile.export.output import new_directory
from dymoe_compile.export.source import DENSE_FORM, BundleSource, Source, checked_tier, tier_bytes
from dymoe_compile.job.progress import Progress, silent
from dymoe_runtime.bundle.bundle import Bundle, dense_kind
from dymoe_runtime.errors import DymoeError, needing_extra
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.spec import AttentionSpec, ModelSpec

WEIGHTS, RECORD = "model.onnx.data", "export.json"
# The context of an export unless more is asked for: the tables of angles of all positions are a part of it.
DEFAULT_CONTEXT = 32768
# What every export leaves behind.
LEFT = (
    "all experts run at one precision: operating points, and tiers by token, by memory or by time, stay with dymoe-run",
    "no memory budget: the engine keeps all weights in memory, and nothing is read ahead from the disk",
)


@dataclass(frozen=True)
class Options:
    """The settings of an export.

    Without a tier, it is the bundle's highest. With a `checkpoint`, experts are quantized anew to 4 bits from it, and
    `calibration` names the texts for that; without texts they are the compiler's own.
    """

    tier: int | None = None
    checkpoint: Path | None = None
    calibration: Sequence[str] = ()
    portable: bool = False
    context: int | None = None


def export(
    bundle: Bundle, output: Path, options: Options, kernels: Kernels, progress: Progress = silent
) -> dict[str, Any]:
    """Write an export of `bundle` to the new directory `output`; return what is in its export.json, and its sizes.

    Raises DymoeError if the model cannot be expressed, an option does not fit it, something is at `output`, or a file
    of the bundle or the checkpoint is damaged.
    """
    spec = bundle.spec
    check_layers(spec)
    context = _context(spec, options.context)
    with new_directory(output) as directory:
        source = _source(bundle, options, kernels, progress, directory)
        with progress("export", spec.num_layers) as advance, _weights_file(directory) as weights:
            graph = DecoderGraph(Graph(weights), source, context, options.portable).build(advance)
        model = model_of(graph, options.portable, "dymoe", dymoe_runtime.__version__)
        (directory / MODEL).write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(directory / MODEL))
        if caches_alike(spec):
            write_engine_files(bundle, directory, context, options.portable)
        record = _record(bundle, options, source, context)
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        nbytes = sum((directory / name).stat().st_size for name in (MODEL, WEIGHTS))
    return record | {"path": str(output), "bytes": nbytes, "bundle_bytes": tier_bytes(bundle, record["bits"])}


def check_layers(spec: ModelSpec) -> None:
    """Raise DymoeError if a layer has no form in ONNX's operators."""
    for layer in spec.layers:
        if not isinstance(layer.mixer, AttentionSpec):
            raise DymoeError(
                f"{spec.model_type}: layers of the kind '{layer.mixer.kind}' cannot be exported to ONNX; "
                "run the bundle with dymoe-run"
            )


def _context(spec: ModelSpec, wanted: int | None) -> int:
    if wanted is not None and wanted > spec.max_context:
        raise DymoeError(f"--context {wanted}: the model has a context of {spec.max_context}; give at most that")
    return wanted or min(spec.max_context, DEFAULT_CONTEXT)


def _source(bundle: Bundle, options: Options, kernels: Kernels, progress: Progress, scratch: Path) -> Source:
    if options.checkpoint is not None:
        with needing_extra("compile", "reading checkpoints"):
            from dymoe_compile.export.onnx.calibrated import open_calibrated  # imports torch
        return open_calibrated(bundle, options.checkpoint, options.calibration, kernels, scratch, progress)
    return BundleSource(bundle, checked_tier(bundle, options.tier), kernels)


@contextmanager
def _weights_file(directory: Path) -> Iterator[WeightsFile]:
    """Yield the file of weights; it is on the disk when this context ends without an error."""
    weights = WeightsFile(directory / WEIGHTS)
    try:
        yield weights
    except BaseException:
        weights.abandon()
        raise
    weights.close()


def _record(bundle: Bundle, options: Options, source: Source, context: int) -> dict[str, Any]:
    """Return what export.json says: what was exported, how, and what was left behind."""
    tier = bundle.layout.ladder[-1] if options.tier is None else options.tier
    exact = options.checkpoint is None
    return {
        "format": "onnx",
        "mode": "exact" if exact else "int4",
        "bits": tier if exact else source.expert_form.bits,
        "portable": options.portable,
        "context": context,
        "model_type": bundle.spec.model_type,
        "bundle_sha256": bundle.manifest.digest,
        "dymoe_version": dymoe_runtime.__version__,
        "onnx_version": onnx.__version__,
        "opset": OPSET,
        "notes": [*LEFT, *_notes(bundle.spec, source, context, options.portable)],
    }


def _notes(spec: ModelSpec, source: Source, context: int, portable: bool) -> Iterator[str]:
    """Yield what is special about an export."""
    if any(source.dense_form(name) == DENSE_FORM for name, shape in spec.each_tensor() if dense_kind(name, shape)):
        yield "all other matrices have 8 bits, with 32 columns to a scale, rounded anew"
    if context < spec.max_context:
        yield f"its context is {context} tokens of the model's {spec.max_context}; --context changes that"
    if not portable and not is_fused(spec, source.expert_form):
        yield f"experts run in a loop of standard operators: QMoE has no {spec.activation}"
    attentions = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec)]
    if not portable and not all(map(is_fused_attention, attentions)):
        yield "attention runs by standard operators: GroupQueryAttention has no chunks, and wants heads of 8 n columns"
    if not caches_alike(spec):
        yield f"no {CONFIG}: the KV caches of the layers have different shapes, which the engine's file cannot say"
