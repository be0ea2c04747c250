"""Exports of a bundle to GGUF: one file with all experts at one tier, or what llama.cpp's own quantizers need."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dymoe_runtime
from dymoe_compile.export.gguf.architectures import Architecture, architecture_of, attentions_of, context_of
from dymoe_compile.export.gguf.vocabulary import vocabulary_of
from dymoe_compile.export.gguf.writer import name_of, write_model
from dymoe_compile.export.output import new_directory, new_file
from dymoe_compile.export.source import DENSE_FORM, BundleSource, checked_tier, tier_bytes
from dymoe_compile.job.progress import Progress, silent
from dymoe_runtime.bundle.bundle import Bundle, dense_kind
from dymoe_runtime.errors import needing_extra
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.spec import ModelSpec

RECORD = "export.json"
QUANTIZE = "README.md in it has the command of llama.cpp that makes the quantized file"
# What every export of a tier leaves behind.
LEFT = (
    "all experts run at one precision: operating points, and tiers by token, by memory or by time, stay with dymoe-run",
    "no memory budget: llama.cpp maps the whole file, and reads nothing ahead by routing",
)


@dataclass(frozen=True)
class Options:
    """The settings of an export.

    Without a tier, it is the bundle's highest. With a `checkpoint`, what llama.cpp's quantizers need is written, for a
    file of `size` bytes, or of `bits` a weight; `calibration` names texts for it. Without texts they are the
    compiler's own.
    """

    tier: int | None = None
    checkpoint: Path | None = None
    calibration: Sequence[str] = ()
    size: int | None = None
    bits: float | None = None


def export(
    bundle: Bundle, output: Path, options: Options, kernels: Kernels, progress: Progress = silent
) -> dict[str, Any]:
    """Write an export of `bundle` to the new file `output`, or with a checkpoint to the new directory `output`.

    Returns what it says of itself, and its sizes. Raises DymoeError if llama.cpp cannot run the model, an option does
    not fit it, something is at `output`, or a file of the bundle or the checkpoint is damaged.
    """
    if options.checkpoint is None:
        return _export_tier(bundle, output, options, kernels, progress)
    size = options.size if options.bits is None else options.bits
    assert size is not None
    architecture_of(bundle.spec)
    with needing_extra("compile", "reading checkpoints"):
        from dymoe_compile.export.gguf.quantizing import prepare, write_recipe  # imports torch
    with new_directory(output) as directory:
        prepared = prepare(bundle, directory, options.checkpoint, options.calibration, kernels, progress)
        record = _record(bundle, "recipe") | write_recipe(bundle, prepared, directory, size)
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        nbytes = sum(path.stat().st_size for path in directory.iterdir())
    return {**record, "notes": [QUANTIZE], "path": str(output), "bytes": nbytes}


def _export_tier(
    bundle: Bundle, output: Path, options: Options, kernels: Kernels, progress: Progress
) -> dict[str, Any]:
    """Write the file of a tier; return what it says of itself, and its sizes."""
    architecture = architecture_of(bundle.spec)
    tier = checked_tier(bundle, options.tier)
    vocabulary = vocabulary_of(bundle)
    record = _record(bundle, "tier") | {"bits": tier, "context": context_of(bundle.spec, architecture)}
    with new_file(output) as file:
        source = BundleSource(bundle, tier, kernels, rounds=True)
        notes = [*LEFT, *_notes(source, architecture), *vocabulary.notes]
        with progress("export", len(bundle.spec.moe_layers)) as advance:
            write_model(file, source, architecture, vocabulary, name_of(bundle), record, advance)
        nbytes = file.stat().st_size
    sizes = {"path": str(output), "bytes": nbytes, "bundle_bytes": tier_bytes(bundle, tier)}
    return {**record, "notes": notes, **sizes}


def _record(bundle: Bundle, mode: str) -> dict[str, Any]:
    """Return what every export says of itself."""
    return {
        "format": "gguf",
        "mode": mode,
        "model_type": bundle.spec.model_type,
        "architecture": architecture_of(bundle.spec).name,
        "bundle_sha256": bundle.manifest.digest,
        "dymoe_version": dymoe_runtime.__version__,
    }


def _notes(source: BundleSource, architecture: Architecture) -> Iterator[str]:
    """Yield what is special about an export."""
    spec = source.spec
    if not source.is_exact:
        yield "experts are rounded anew to Q8_0: the levels of this tier do not fit its codes"
    if any(source.dense_form(name) == DENSE_FORM for name, shape in spec.each_tensor() if dense_kind(name, shape)):
        yield "all other matrices are Q8_0, rounded anew"
    if wide := _not_in_blocks(spec):
        yield f"matrices whose rows are no multiple of 32 columns ({', '.join(wide)}) are F16, which Q8_0 cannot hold"
    if any(mixer.rope is not None and not mixer.rope.truncate for mixer in attentions_of(spec)):
        yield "llama.cpp rounds the range of columns whose frequencies YaRN blends; the model does not"
    if (context := context_of(spec, architecture)) < spec.max_context:
        yield f"its context is {context} tokens of the model's {spec.max_context}: llama.cpp has no windows for it"


def _not_in_blocks(spec: ModelSpec) -> list[str]:
    return sorted(name for name, (_, cols) in spec.expert_shapes.items() if cols % 32)
