"""Bundles that are not made yet: the sizes of their files, and what compiling them takes on the disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dymoe_compile.job.profile import AUTO
from dymoe_runtime.bundle.bundle import (
    DENSE,
    DENSE_BITS,
    FINDINGS,
    LOOK_AHEAD,
    POLICY,
    REPORT,
    TOKENIZER,
    Bundle,
    FileEntry,
    LayerEntry,
    Manifest,
    dense_kinds,
    expert_layout,
    layer_file,
)
from dymoe_runtime.bundle.contents import dense_file_bytes, layer_header
from dymoe_runtime.bundle.policy import Policy
from dymoe_runtime.spec import ModelSpec

# Bits of dense weights that are not chosen by their cost, and those that are tried besides.
MAX_BITS = 8
FEWER_BITS = (6, 4)
# Assumed bytes of tokenizer.json for each token of the vocabulary where the file is not at hand; 42 to 138 were seen.
TOKENIZER_BYTES_PER_TOKEN = 100
# Bytes of policy.json, compile.json and report.html together: for any model, and for each expert of all layers.
REPORTS_BYTES, EXPERT_REPORT_BYTES = 96 << 10, 220
# A digest and a checksum as long as any.
DIGEST, CHECKSUM = "0" * 64, (1 << 32) - 1
PROVENANCE_BYTES = 2 << 10
# Hidden states of more bytes than this are kept in files, not in memory, while a model is calibrated.
SPILL_BYTES = 1 << 30


def alike(spec: ModelSpec, bits: int) -> dict[str, int]:
    """Return `bits` for every kind of dense weights."""
    return dict.fromkeys(dense_kinds(spec), bits)


def planned_bundle(
    spec: ModelSpec, ladder: tuple[int, ...], dense_bits: Mapping[str, int], tokenizer_bytes: int | None = None
) -> Bundle:
    """Return a bundle without files whose manifest has the sizes that the compiler will give them.

    Weights, their headers and checksums take what the writer gives them. Every layer with experts but the first is
    taken to have a predictor. Reports and, if its bytes are not given, the tokenizer are estimated.
    """
    layout, experts = expert_layout(spec, ladder), spec.num_experts
    row = (CHECKSUM,) * len(ladder)
    layers, files = {}, {}
    for index, layer in enumerate(spec.moe_layers):
        name, start = layer_file(index), len(layer_header(layer, layout, experts))
        layers[layer] = LayerEntry(name, start, (row,) * experts)
        files[name] = start + experts * layout.record_bytes
    files |= {
        DENSE: dense_file_bytes(spec, dense_bits),
        LOOK_AHEAD: 4 * (len(layers) - 1) * experts * (spec.hidden_size + 1),
        TOKENIZER: TOKENIZER_BYTES_PER_TOKEN * spec.vocab_size if tokenizer_bytes is None else tokenizer_bytes,
        POLICY: EXPERT_REPORT_BYTES * spec.total_experts,
        FINDINGS: REPORTS_BYTES // 2,
        REPORT: REPORTS_BYTES // 2,
    }
    entries = {name: FileEntry(nbytes, DIGEST) for name, nbytes in files.items()}
    checksums = {name: CHECKSUM for name, _ in spec.each_tensor()}
    return _bundle(Manifest(spec, ladder, dense_bits, entries, checksums, layers, {}))


def smallest_bundle(spec: ModelSpec, ladder: tuple[int, ...], dense_bits: int | str) -> Bundle:
    """Return a bundle without files that has the least sizes that compiling with these bits can give it."""
    bits = alike(spec, min(DENSE_BITS) if dense_bits == AUTO else int(dense_bits))
    files = {DENSE: FileEntry(dense_file_bytes(spec, bits)), LOOK_AHEAD: FileEntry(0)}
    return _bundle(Manifest(spec, ladder, bits, files, {}, {}, {}))


def _bundle(manifest: Manifest) -> Bundle:
    return Bundle(Path(), manifest, Policy(manifest.ladder, (), (), ""))


def total_bytes(bundle: Bundle) -> int:
    """Return the bytes of all files of a planned bundle, its manifest included."""
    manifest = bundle.manifest
    first = dict(list(manifest.layers.items())[:1])  # the entries of other layers are as long
    one, none = (len(replace(manifest, layers=layers).to_text()) for layers in (first, {}))
    written = none + (one - none) * len(manifest.layers) + PROVENANCE_BYTES
    return written + sum(entry.nbytes for entry in manifest.files.values())


def disk_bytes(spec: ModelSpec, ladder: tuple[int, ...], dense_bits: int | str, tokens: int) -> int:
    """Return an estimate of the disk bytes of the bundle and of the state for an interrupted run.

    `tokens` are those of the calibration text, held-out ones included.
    """
    auto = dense_bits == AUTO
    bits = min(MAX_BITS if auto else int(dense_bits), 15) + 1
    dense = sum(math.prod(shape) for shape in spec.tensor_shapes().values()) * bits // 8
    # Dense weights may be written a second time, at other bits, while the first file still exists.
    dense *= 2 if auto else 1
    records = spec.total_experts * expert_layout(spec, ladder).record_bytes
    state = (4 if spilled(tokens, spec.hidden_size) else 2) * 4 * tokens * spec.hidden_size
    return dense + records + state + (1 << 20)


def spilled(tokens: int, hidden_size: int) -> bool:
    """Return whether hidden states of `tokens` tokens are kept in a file while a model is calibrated."""
    return 4 * tokens * hidden_size > SPILL_BYTES
