"""An in-toto statement about a bundle: the digests of its files, and how it was made, as SLSA provenance.

The forms are those of https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1. A statement has no time and
no path, so the same bundle gives the same statement.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import dymoe_runtime
from dymoe_runtime.bundle.bundle import DAMAGED, Bundle
from dymoe_runtime.bundle.records import NOT_VOUCHED, check_digest
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import open_regular
from dymoe_runtime.storage import MANIFEST, Member
from dymoe_runtime.tools.findings import kl_intervals

STATEMENT, PROVENANCE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILD = "https://pypi.org/project/dymoe/#compile-v1"
# Subject of a packed bundle: the whole file, whatever it is called.
PACKED = "packed bundle"
# Keys of a bundle's provenance that name what it was made from; all others but these are options.
SOURCES = ("source_sha256", "tokenizer_sha256", "calibration_sha256", "origin", "slimmed_from")
MACHINE = "built_with"


def statement(bundle: Bundle, builder: str) -> dict[str, Any]:
    """Return the statement about a bundle; `builder` is the URI of who compiled it.

    This reads all of it. Raises DymoeError if a byte does not have its digest, if the bundle has no digests of its
    weights, or if other files are with it.
    """
    check_whole(bundle)
    return {
        "_type": STATEMENT,
        "subject": list(subjects(bundle)),
        "predicateType": PROVENANCE,
        "predicate": _provenance(bundle, builder),
    }


def check_whole(bundle: Bundle) -> None:
    """Raise DymoeError unless a bundle is exactly what its manifest says, and the manifest vouches for all of it."""
    if not bundle.manifest.vouches:
        raise DymoeError(f"{bundle.path}: {NOT_VOUCHED}")
    if others := bundle.unlisted():
        raise DymoeError(f"{bundle.path / others[0]}: not a file of the bundle, which nobody signed; move it elsewhere")
    check_digest(bundle, bundle.manifest.digest)


def subjects(bundle: Bundle) -> Iterator[dict[str, Any]]:
    """Yield name and digest of each file of a bundle and, first, of the packed bundle if it is one."""
    if bundle.path.is_file():
        fd = open_regular(bundle.path, DAMAGED)
        yield _subject(PACKED, Member(fd, bundle.path, 0, bundle.path.stat().st_size))
    yield _subject(MANIFEST, bundle.storage.open(MANIFEST, DAMAGED))
    for name, entry in sorted(bundle.manifest.files.items()):
        yield {"name": name, "digest": {"sha256": entry.sha256}}


def _subject(name: str, member: Member) -> dict[str, Any]:
    with closing(member):
        return {"name": name, "digest": {"sha256": member.sha256(DAMAGED)}}


def _provenance(bundle: Bundle, builder: str) -> dict[str, Any]:
    made = bundle.manifest.provenance
    return {
        "buildDefinition": {
            "buildType": BUILD,
            "externalParameters": {k: v for k, v in sorted(made.items()) if k not in (*SOURCES, MACHINE)},
            "internalParameters": {MACHINE: group_of(made, MACHINE)},
            "resolvedDependencies": list(dependencies(made)),
        },
        "runDetails": {
            "builder": {"id": builder, "version": {"dymoe": str(made.get("dymoe_version", ""))}},
            "byproducts": [_measured(bundle)],
        },
    }


def group_of(made: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a part of a bundle's provenance, which may hold anything; empty if it is no object."""
    group = made.get(key)
    return group if isinstance(group, Mapping) else {}


def dependencies(made: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a bundle was made from, by its provenance: each a resource with a name and a digest."""
    origin = group_of(made, "origin")
    source: dict[str, Any] = {"name": "checkpoint"}
    if origin:
        source |= {"uri": f"https://huggingface.co/{origin.get('repository')}", "digest": {}}
        source["digest"] = {"gitCommit": str(origin.get("commit"))}
    if "source_sha256" in made:
        source["digest"] = {**source.get("digest", {}), "sha256": made["source_sha256"]}
    yield source
    for name in ("tokenizer", "calibration"):
        if f"{name}_sha256" in made:
            yield {"name": name, "digest": {"sha256": made[f"{name}_sha256"]}}
    if "slimmed_from" in made:
        yield {"name": "bundle", "digest": {"dymoe": made["slimmed_from"]}}


def _measured(bundle: Bundle) -> dict[str, Any]:
    """Return the measured figures of the operating points as a resource with content."""
    content = json.dumps(measurements(bundle), sort_keys=True).encode()
    return {
        "name": "measurements",
        "mediaType": "application/json",
        "content": base64.b64encode(content).decode(),
        "annotations": {"digest_of_manifest": bundle.manifest.digest, "bytes": bundle.total_bytes()},
    }


def measurements(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the figures of each operating point, with the interval of its KL or None where that is not known."""
    intervals = kl_intervals(bundle)
    return [
        {
            "point": point.name,
            "kl": point.kl,
            "kl_interval": intervals.get(point.name),
            "nll": point.nll,
            "top1_agreement": point.top1_agreement,
            "effective_bits": point.effective_bits,
            "bytes_per_token": point.bytes_per_token,
        }
        for point in bundle.policy.points
    ]


def default_builder(bundle: Bundle) -> str:
    """Return the URI of the compiler that made a bundle: its package."""
    return f"pkg:pypi/dymoe@{bundle.manifest.provenance.get('dymoe_version', dymoe_runtime.__version__)}"
