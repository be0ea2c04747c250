"""Exports of a bundle to GGUF: one file with all experts at one tier, or what llama.cpp's own quantizers need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dymoe_runtime
from dymoe_compile.export.gguf.architectures import Architecture, architecture_of, context_of
from dymoe_compile.export.gguf.vocabulary import vocabulary_of
from dymoe_compile.export.gguf.writer import name_of, write_model
from dymoe_compile.export.output import new_file
from dymoe_compile.export.source import DENSE_FORM, BundleSource, checked_tier, tier_bytes
from dymoe_compile.job.progress import Progress, silent
from dymoe_runtime.bundle.bundle import Bundle, dense_kind
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.spec import ModelSpec

# What every export leaves behind.
LEFT = (
    "all experts run at one precision: operating points, and tiers by token, by memory or by time, stay with dymoe-run",
    "no memory budget: llama.cpp maps the whole file, and reads nothing ahead by routing",
)


@dataclass(frozen=True)
class Options:
    """The settings of an export. Without a tier, it is the bundle's highest."""

    tier: int | None = None


def export(
    bundle: Bundle, output: Path, options: Options, kernels: Kernels, progress: Progress = silent
) -> dict[str, Any]:
    """Write an export of `bundle` to the new file `output`; return what it says of itself, and its sizes.

    Raises DymoeError if llama.cpp cannot run the model, an option does not fit it, something is at `output`, or a file
    of the bundle is damaged.
    """
    architecture = architecture_of(bundle.spec)
    tier = checked_tier(bundle, options.tier)
    vocabulary = vocabulary_of(bundle)
    with new_file(output) as file:
        source = BundleSource(bundle, tier, kernels, rounds=True)
        notes = [*LEFT, *_notes(source, architecture), *vocabulary.notes]
        record = {
            "format": "gguf",
            "architecture": architecture.name,
            "bits": tier,
            "context": context_of(bundle.spec, architecture),
            "model_type": bundle.spec.model_type,
            "bundle_sha256": bundle.manifest.digest,
            "dymoe_version": dymoe_runtime.__version__,
        }
        with progress("export", bundle.spec.num_layers) as advance:
            write_model(file, source, architecture, vocabulary, name_of(bundle), record, advance)
        nbytes = file.stat().st_size
    sizes = {"path": str(output), "bytes": nbytes, "bundle_bytes": tier_bytes(bundle, tier)}
    return {**record, "notes": notes, **sizes}


def _notes(source: BundleSource, architecture: Architecture) -> Iterator[str]:
    """Yield what is special about an export."""
    spec = source.spec
    if not source.is_exact:
        yield "experts are rounded anew to Q8_0: the levels of this tier do not fit its codes"
    if any(source.dense_form(name) == DENSE_FORM for name, shape in spec.each_tensor() if dense_kind(name, shape)):
        yield "all other matrices are Q8_0, rounded anew"
    if wide := _not_in_blocks(spec):
        yield f"matrices whose rows are no multiple of 32 columns ({', '.join(wide)}) are F16, which Q8_0 cannot hold"
    if (context := context_of(spec, architecture)) < spec.max_context:
        yield f"its context is {context} tokens of the model's {spec.max_context}: llama.cpp has no windows for it"


def _not_in_blocks(spec: ModelSpec) -> list[str]:
    return sorted(name for name, (_, cols) in spec.expert_shapes.items() if cols % 32)
