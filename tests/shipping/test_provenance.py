"""Statements and bills of materials say what a bundle is, and are as their specifications want them."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from helpers import assert_one_sentence, bundle_cli

from dymoe_runtime.bundle.bundle import Bundle, file_entry, read_manifest


def document(*args: object) -> dict[str, Any]:
    outcome = bundle_cli(*args)
    assert outcome.code == 0, outcome.err
    return dict(json.loads(outcome.out))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_statement_names_every_file_with_its_digest(tiny_path: Path) -> None:
    statement = document("attest", tiny_path)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    found = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert found == {path.name: sha256(path) for path in tiny_path.iterdir()}


def test_a_statement_of_a_packed_bundle_has_the_whole_file_too(packed_path: Path, tiny_path: Path) -> None:
    packed, plain = document("attest", packed_path), document("attest", tiny_path)
    whole, *files = packed["subject"]
    assert whole["digest"]["sha256"] == sha256(packed_path) and files == plain["subject"]
    assert packed["predicate"]["buildDefinition"] == plain["predicate"]["buildDefinition"]


def test_provenance_has_sources_options_versions_and_figures(tiny_path: Path) -> None:
    bundle, made = Bundle.open(tiny_path), Bundle.open(tiny_path).manifest.provenance
    predicate = document("attest", tiny_path, "--builder", "https://ci/run")["predicate"]
    build, run = predicate["buildDefinition"], predicate["runDetails"]
    assert run["builder"] == {"id": "https://ci/run", "version": {"dymoe": made["dymoe_version"]}}
    assert build["externalParameters"]["seed"] == made["seed"] and "profile" in build["externalParameters"]
    assert build["internalParameters"]["built_with"] == made["built_with"]
    digests = {each["name"]: each["digest"]["sha256"] for each in build["resolvedDependencies"]}
    assert digests == {
        "checkpoint": made["source_sha256"],
        "tokenizer": made["tokenizer_sha256"],
        "calibration": made["calibration_sha256"],
    }
    figures = json.loads(base64.b64decode(run["byproducts"][0]["content"]))
    assert [(each["point"], each["kl"]) for each in figures] == [(p.name, p.kl) for p in bundle.policy.points]
    assert all(each["kl_interval"][0] <= each["kl"] <= each["kl_interval"][1] for each in figures)


def test_a_bill_of_materials_is_valid_and_names_the_files(tiny_path: Path, packed_path: Path, tmp_path: Path) -> None:
    for path in (tiny_path, packed_path):
        assert bundle_cli("sbom", path, "-o", tmp_path / "sbom.json").code == 0
        text = (tmp_path / "sbom.json").read_text()
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        files = {each["name"] for each in json.loads(text)["components"] if each["type"] == "file"}
        assert {path.name for path in tiny_path.iterdir()} <= files
    model = json.loads(text)["metadata"]["component"]
    made = Bundle.open(tiny_path).manifest.provenance
    assert model["pedigree"]["ancestors"][0]["hashes"][0]["content"] == made["source_sha256"]
    properties = {each["name"]: each["value"] for each in model["properties"]}
    assert properties["dymoe:built_with:instruction_set"] == made["built_with"]["instruction_set"]


def test_a_slimmed_bundle_names_the_one_that_it_came_from(tiny_path: Path, tmp_path: Path) -> None:
    assert bundle_cli("slim", tiny_path, "--tiers", "2", "-o", tmp_path / "slim").code == 0
    named = document("attest", tmp_path / "slim")["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert named[-1] == {"name": "bundle", "digest": {"dymoe": Bundle.open(tiny_path).manifest.digest}}
    text = json.dumps(document("sbom", tmp_path / "slim"))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_a_checkpoint_from_the_hub_is_named_by_repository_and_commit(tiny_path: Path) -> None:
    from dymoe_runtime.tools.provenance.statement import dependencies

    origin = {"repository": "owner/model", "commit": "c" * 40}
    source = next(dependencies({"origin": origin, "source_sha256": "a" * 64}))
    assert source["uri"] == "https://huggingface.co/owner/model"
    assert source["digest"] == {"gitCommit": "c" * 40, "sha256": "a" * 64}


def test_a_damaged_bundle_gets_no_statement(damaged: Path, tmp_path: Path) -> None:
    path = damaged / "experts-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[9000] ^= 1
    path.write_bytes(data)
    assert_one_sentence(bundle_cli("attest", damaged, "-o", tmp_path / "x.json"), "does not match")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("made", [{}, {"origin": "x", "built_with": [1]}, {"origin": {}, "source_sha256": 5}])
def test_a_forged_provenance_breaks_nothing(tiny_path: Path, tmp_path: Path, made: dict[str, Any]) -> None:
    forged = tmp_path / "forged.dymoe"
    shutil.copytree(tiny_path, forged)
    manifest = replace(read_manifest(forged), provenance=made)
    (forged / "manifest.json").write_text(manifest.to_text())
    for command in ("attest", "sbom"):
        assert document(command, forged)


@pytest.mark.parametrize("findings", ["no json", "{}", '{"points": 5}', '{"points": [{"kl_interval": 1}]}'])
def test_forged_findings_get_one_sentence(tiny_path: Path, tmp_path: Path, findings: str) -> None:
    forged = tmp_path / "forged.dymoe"
    shutil.copytree(tiny_path, forged)
    (forged / "compile.json").write_text(findings)
    manifest = read_manifest(forged)
    entry = file_entry(forged / "compile.json", digest=True)
    (forged / "manifest.json").write_text(replace(manifest, files={**manifest.files, "compile.json": entry}).to_text())
    for command in (["attest"], ["sbom"], ["check", "--max-kl", 1]):
        assert_one_sentence(bundle_cli(*command, forged), "compile.json")
