"""The differences between two bundles: digests, model, options, sizes, files, weights and operating points."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from dymoe_runtime.bundle.bundle import Bundle, spec_to_json

# Kinds of differences, in the order in which they are shown.
KINDS = ("digest", "model", "options", "sizes", "files", "dense weights", "experts", "points")
# The most characters of a value that are shown.
WIDTH = 60


class Difference(NamedTuple):
    """A value that two bundles do not share; None is one that a bundle does not have."""

    kind: str  # one of KINDS
    what: str
    one: Any
    other: Any


def differences(one: Bundle, other: Bundle) -> list[Difference]:
    """Return all differences between two bundles, by their manifests and policies."""
    return [
        Difference(kind, what, left.get(what), right.get(what))
        for kind, left, right in zip(KINDS, _values(one), _values(other), strict=True)
        for what in {**left, **right}
        if left.get(what) != right.get(what)
    ]


def _values(bundle: Bundle) -> Iterator[Mapping[str, Any]]:
    """Yield the values of each kind by name."""
    manifest, policy = bundle.manifest, bundle.policy
    yield {"manifest": manifest.digest}
    yield spec_to_json(bundle.spec)
    yield {**manifest.provenance, "tiers": list(manifest.ladder), "bits of dense weights": dict(manifest.dense_bits)}
    yield {"total_bytes": bundle.total_bytes(), "expert_bytes": bundle.expert_bytes()}
    yield {name: entry.sha256 or f"{entry.nbytes} bytes" for name, entry in manifest.files.items()}
    yield dict(manifest.dense_crc32)
    yield {
        f"{layer}.{expert}": list(checksums)
        for layer, entry in manifest.layers.items()
        for expert, checksums in enumerate(entry.crc32)
    }
    yield {"default": policy.default_point, **{point.name: asdict(point) for point in policy.points}}


def format_differences(found: Sequence[Difference]) -> str:
    """Return differences as text: single values for options, numbers of pieces for weights."""
    lines = []
    for kind in KINDS:
        own = [difference for difference in found if difference.kind == kind]
        if kind in ("dense weights", "experts") and own:
            lines.append(f"{kind:<14}{len(own)} differ, the first is {own[0].what}")
        elif kind == "points":
            lines += [f"{kind:<14}{d.what}: {_points(d.one, d.other)}" for d in own]
        else:
            lines += [f"{kind:<14}{d.what}: {_short(d.one)} -> {_short(d.other)}" for d in own]
    return "\n".join(lines)


def _points(one: Any, other: Any) -> str:
    left, right = _point(one), _point(other)
    return f"{left}, with other thresholds" if left == right else f"{left} -> {right}"


def _point(values: Any) -> str:
    if not isinstance(values, Mapping):
        return _short(values)
    return f"{values['bits_mean']:.3g} bits, KL {values['kl']:.4g}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
