"""A CycloneDX 1.6 bill of materials of a bundle: the model with its card, its files, and what it was made from."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import dymoe_runtime
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.tools.provenance.statement import MACHINE, dependencies, group_of, measurements, subjects

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
# Algorithms of digests, as statements and as CycloneDX call them.
ALGORITHMS = {"sha256": "SHA-256"}
# Libraries that made the bundle, whose versions its provenance has.
LIBRARIES = ("numpy", "torch")
# Figures of an operating point -> their type in the model card.
METRICS = {
    "kl": "KL to the original, nats per token",
    "nll": "NLL, nats per token",
    "top1_agreement": "top-1 agreement",
}


def bill_of_materials(bundle: Bundle) -> dict[str, Any]:
    """Return the bill of materials; the same bundle gives the same."""
    version = {"type": "application", "name": "dymoe", "version": dymoe_runtime.__version__}
    return {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, bundle.manifest.digest)}",
        "version": 1,
        "metadata": {"tools": {"components": [version]}, "component": _model(bundle)},
        "components": [*_files(bundle), *_libraries(bundle)],
    }


def _model(bundle: Bundle) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": _name(bundle),
        "version": bundle.manifest.digest[:16],
        "description": f"A DyMoE bundle with experts at {', '.join(map(str, bundle.manifest.ladder))} bits",
        "pedigree": {"ancestors": list(_ancestors(bundle))},
        "modelCard": _card(bundle),
        "properties": [
            {"name": "dymoe:manifest:digest", "value": bundle.manifest.digest},
            *(
                {"name": f"dymoe:built_with:{key}", "value": str(value)}
                for key, value in sorted(group_of(bundle.manifest.provenance, MACHINE).items())
            ),
        ],
    }


def _name(bundle: Bundle) -> str:
    origin = group_of(bundle.manifest.provenance, "origin")
    spec = bundle.spec
    return str(origin.get("repository") or f"{spec.model_type} {spec.num_layers} x {spec.num_experts}")


def _ancestors(bundle: Bundle) -> Iterator[dict[str, Any]]:
    """Yield the checkpoint that the bundle was made from."""
    source = next(dependencies(bundle.manifest.provenance))
    digests = source.get("digest", {})
    hashes = [{"alg": alg, "content": digests[name]} for name, alg in ALGORITHMS.items() if name in digests]
    ancestor = {"type": "machine-learning-model", "name": _name(bundle), "hashes": hashes}
    if "gitCommit" in digests:
        ancestor["version"] = digests["gitCommit"]
    if "uri" in source:
        ancestor["externalReferences"] = [{"type": "distribution", "url": source["uri"]}]
    yield ancestor


def _card(bundle: Bundle) -> dict[str, Any]:
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "mixture of experts",
            "modelArchitecture": bundle.spec.model_type,
            "datasets": [{"type": "dataset", "name": "calibration texts"}],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(bundle))},
    }


def _metrics(bundle: Bundle) -> Iterator[dict[str, Any]]:
    for point in measurements(bundle):
        for key, kind in METRICS.items():
            metric: dict[str, Any] = {"type": kind, "value": str(point[key]), "slice": f"point {point['point']}"}
            if key == "kl" and point["kl_interval"]:
                low, high = point["kl_interval"]
                metric["confidenceInterval"] = {"lowerBound": str(low), "upperBound": str(high)}
            yield metric


def _files(bundle: Bundle) -> Iterator[dict[str, Any]]:
    for subject in subjects(bundle):
        hashes = [{"alg": "SHA-256", "content": subject["digest"]["sha256"]}] if subject["digest"]["sha256"] else []
        yield {"type": "file", "bom-ref": f"file:{subject['name']}", "name": subject["name"], "hashes": hashes}


def _libraries(bundle: Bundle) -> Iterator[dict[str, Any]]:
    made = bundle.manifest.provenance
    versions = {"dymoe": made.get("dymoe_version"), **{name: group_of(made, MACHINE).get(name) for name in LIBRARIES}}
    for name, version in versions.items():
        if version is not None:
            purl = f"pkg:pypi/{name}@{version}"
            yield {"type": "library", "bom-ref": purl, "name": name, "version": str(version), "purl": purl}
