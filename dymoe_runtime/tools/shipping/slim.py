"""A bundle with some of the tiers of another one, made without the checkpoint."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

import numpy as np

from dymoe_runtime.bundle.bundle import (
    FINDINGS,
    POLICY,
    REPORT,
    Bundle,
    LayerEntry,
    expert_layout,
    file_entry,
)
from dymoe_runtime.bundle.contents import layer_header
from dymoe_runtime.bundle.policy import LayerPolicy, OperatingPoint, Policy, Thresholds
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.bundle.tiers import (
    MAX_CURVED,
    MatrixLayout,
    QuantizedMatrix,
    RecordLayout,
    check_ladder,
    matrix_of,
    pack_record,
    split_record,
    vector_of,
)
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.storage import MANIFEST
from dymoe_runtime.tools.output import new_directory
from dymoe_runtime.tools.shipping.pack import pieces_of

V = TypeVar("V")
# What the compiler found about all tiers, and its report: they would not be true of the new bundle.
LEFT_OUT = (FINDINGS, REPORT)


def slim(bundle: Bundle, tiers: Sequence[int], target: Path, advance: Callable[[], object]) -> Policy:
    """Write a bundle with the tiers `tiers` of another one as the directory `target`; return its policy.

    A tier has the same weights as before, bit for bit. Operating points that use other tiers are left out. `advance` is
    called for each expert. Raises DymoeError if the bundle does not have a tier, is damaged, or would keep no operating
    point, and if something is at `target`.
    """
    ladder = _checked(bundle, tiers)
    layout, manifest = expert_layout(bundle.spec, ladder), bundle.manifest
    policy = _policy_of(bundle, layout)
    with new_directory(target) as directory:
        for name in manifest.files:
            if name not in (*LEFT_OUT, POLICY) and name not in {entry.file for entry in manifest.layers.values()}:
                with open(directory / name, "xb") as file:
                    file.writelines(pieces_of(bundle, name))
        layers = {}
        for layer, entry in manifest.layers.items():
            with open(directory / entry.file, "xb") as file:
                layers[layer] = _write_layer(file, bundle, layer, layout, advance)
        (directory / POLICY).write_text(
            json.dumps(policy.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        files = {name: file_entry(directory / name, digest=True) for name in sorted(os.listdir(directory))}
        provenance = {**manifest.provenance, "slimmed_from": manifest.digest, "ladder": list(ladder)}
        new = replace(manifest, ladder=ladder, files=files, layers=layers, provenance=provenance)
        (directory / MANIFEST).write_text(new.to_text(), encoding="utf-8")
    return policy


def _checked(bundle: Bundle, tiers: Sequence[int]) -> tuple[int, ...]:
    """Return the tiers to keep, rising."""
    own = bundle.layout.ladder
    if missing := sorted(set(tiers) - set(own)):
        _refuse(bundle, f"has no tier {missing[0]}, only {', '.join(map(str, own))}")
    ladder = check_ladder(sorted(set(tiers)))
    if ladder == own:
        _refuse(bundle, "has these tiers and no others, so there is nothing to leave out")
    if not bundle.spec.expert_grid and own[-1] > MAX_CURVED >= ladder[-1]:
        _refuse(bundle, f"has tiers above {MAX_CURVED} bits, whose levels those below are not made for; keep one")
    return ladder


def _refuse(bundle: Bundle, what: str) -> NoReturn:
    raise DymoeError(f"--tiers: {bundle.path} {what}; choose other tiers")


def _write_layer(
    file: BinaryIO, bundle: Bundle, layer: int, layout: RecordLayout, advance: Callable[[], object]
) -> LayerEntry:
    experts = [ExpertKey(layer, expert) for expert in range(bundle.spec.num_experts)]
    header = layer_header(layer, layout, len(experts))
    file.write(header)
    checksums = []
    for key in experts:
        record = narrowed(bundle.layout, read_record(bundle, key), layout)
        file.write(memoryview(record))
        checksums.append(tuple(zlib.crc32(segment) for segment in split_record(layout, record)))
        advance()
    return LayerEntry(bundle.manifest.layers[layer].file, len(header), tuple(checksums))


def narrowed(old: RecordLayout, segments: Sequence[np.ndarray], new: RecordLayout) -> np.ndarray:
    """Return the record, uint8 [record_bytes], with the tiers of layout `new` of one whose layout is `old`."""
    ladder = new.ladder
    matrices = {name: _with_tiers(matrix_of(segments, where), where, ladder) for name, where in old.matrices.items()}
    return pack_record(new, matrices, {name: vector_of(segments, part) for name, part in old.vectors.items()})


def _with_tiers(matrix: QuantizedMatrix, where: MatrixLayout, ladder: Sequence[int]) -> QuantizedMatrix:
    """Return a matrix with the tiers `ladder`; its multipliers make up for units that depend on the highest tier."""
    fewer = where.ladder[-1] - ladder[-1]
    factor = np.float32(1 if where.grid else 2**fewer)
    indices = {tier: matrix.scale_indices[tier] for tier in ladder}
    return QuantizedMatrix(matrix.codes >> fewer, indices, matrix.multiplier * factor)


def _policy_of(bundle: Bundle, layout: RecordLayout) -> Policy:
    """Return the policy with the points that use the tiers of `ladder` alone."""
    policy, own, ladder = bundle.policy, bundle.layout.ladder, layout.ladder
    columns = [place for place, tier in enumerate(reversed(own)) if tier in ladder]
    highest_stays = ladder[-1] == own[-1]
    pins = any(layer.pinned for layer in policy.layers)
    points = [
        _with_columns(point, columns, bundle.layout, layout)
        for point in policy.points
        if _uses_only(point, columns) and (highest_stays or point.kind == "uniform" or not pins)
    ]
    if not points:
        _refuse(bundle, f"has no operating point that uses the tiers {', '.join(map(str, ladder))} alone")
    names = [point.name for point in points]
    default = policy.default_point if policy.default_point in names else min(points, key=lambda point: point.kl).name
    layers = tuple(_layer_with(layer, set(map(str, ladder))) for layer in policy.layers)
    return replace(policy, ladder=ladder, layers=layers, points=tuple(points), default_point=default)


def _uses_only(point: OperatingPoint, columns: Collection[int]) -> bool:
    """Return whether no expert gets a tier outside `columns`: its threshold is at most that of a higher tier."""
    return all(
        place in columns or threshold <= max((0.0, *row[:place]))
        for rows in (point.decode, point.prefill)
        for row in rows
        for place, threshold in enumerate(row)
    )


def _with_columns(
    point: OperatingPoint, columns: Sequence[int], old: RecordLayout, new: RecordLayout
) -> OperatingPoint:
    """Return a point without the thresholds of other tiers.

    Where one tier is used, it takes the bytes of its new record; where several are, what it took, which is not less.
    """

    def kept(rows: Sequence[Thresholds]) -> tuple[Thresholds, ...]:
        return tuple(tuple(row[place] for place in columns) for row in rows)

    point = replace(point, decode=kept(point.decode), prefill=kept(point.prefill))
    if point.kind != "uniform":
        return point
    tier = round(point.bits_mean)
    taken = point.bytes_per_token * new.prefix_bytes(tier) / old.prefix_bytes(tier)
    return replace(point, bytes_per_token=taken, effective_bits=new.bits_per_weight(tier))


def _layer_with(layer: LayerPolicy, tiers: Collection[str]) -> LayerPolicy:
    def kept(values: Mapping[str, V]) -> dict[str, V]:
        return {tier: value for tier, value in values.items() if tier in tiers}

    return replace(
        layer,
        sensitivity=kept(layer.sensitivity),
        expert_error=kept(layer.expert_error),
        router_overlap=kept(layer.router_overlap),
    )
