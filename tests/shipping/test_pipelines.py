"""The pipelines of examples/ci run, and publish nothing that is worse, larger or slower than asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from helpers import EXAMPLES, bundle_cli

CI = EXAMPLES / "ci"
PROGRAMS = Path(sys.executable).parent
# What the pipelines call that needs the network; a stub stands in, and writes down what it was asked.
NETWORK = ("pip", "gh", "curl")
EASY = {"MAX_KL": "10", "MAX_BYTES": "1GiB", "MIN_TOKENS_PER_S": "0.001", "PROFILE": "laptop-8gb"}

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def make(out: Path, checkpoint: Path, **values: str) -> subprocess.CompletedProcess[str]:
    text = checkpoint.parent / "pipeline.txt"
    text.write_text("A river flows through the old town. " * 80, encoding="utf-8")
    given = {"BIN": f"{PROGRAMS}/", "MODEL": checkpoint, "OUT": out, "CALIBRATION": text, **EASY, **values}
    command = ["make", "-f", CI / "bundle.mk", *(f"{name}={value}" for name, value in given.items())]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pipeline of the Makefile has left, with limits that are met."""
    out = tmp_path_factory.mktemp("pipeline") / "out"
    outcome = make(out, tiny_checkpoint)
    assert outcome.returncode == 0, outcome.stderr
    return out


def test_make_publishes_a_signed_bundle(made: Path) -> None:
    published = made / "published"
    names = ["model.cdx.json", "model.dymoe", "model.dymoe.sig"]
    assert sorted(path.name for path in published.iterdir()) == names
    assert bundle_cli("verify", published / "model.dymoe", "--key", made / "key.pub").code == 0
    assert json.loads((made / "check.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("limit", "value", "gate"),
    [("MAX_KL", "1e-9", "quality"), ("MAX_BYTES", "1KiB", "size"), ("MIN_TOKENS_PER_S", "1e12", "speed")],
)
def test_make_fails_where_the_bundle_is_worse_than_asked(
    made: Path, tiny_checkpoint: Path, tmp_path: Path, limit: str, value: str, gate: str
) -> None:
    shutil.copytree(made / "model.dymoe", tmp_path / "out" / "model.dymoe")  # it is up to date
    outcome = make(tmp_path / "out", tiny_checkpoint, **{limit: value})
    assert outcome.returncode != 0 and f"failed at {gate}" in outcome.stderr
    assert not (tmp_path / "out" / "published").exists() and not (tmp_path / "out" / "dist").exists()
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert [each["gate"] for each in found["gates"] if each["status"] == "failed"] == [gate]
    assert ElementTree.parse(tmp_path / "out" / "check.xml").getroot().get("failures") == "1"


@pytest.fixture
def workplace(tmp_path: Path, tiny_checkpoint: Path) -> dict[str, str]:
    """The environment of a CI job in a directory of its own, in which programs that need the network are stubs."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in NETWORK:
        (stubs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{tmp_path}/called"\n')
        (stubs / name).chmod(0o755)
    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    (tmp_path / "job").mkdir()
    (tmp_path / "secret.pem").write_text(key)
    return {
        **os.environ,
        **EASY,
        "PATH": f"{stubs}:{PROGRAMS}:{os.environ['PATH']}",
        "MODEL": str(tiny_checkpoint),
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "owner/name",
        "GITHUB_RUN_ID": "7",
        "GITHUB_REF_NAME": "v1",
        "CI_JOB_URL": "https://gitlab.com/job/7",
        "CI_API_V4_URL": "https://gitlab.com/api/v4",
        "CI_PROJECT_ID": "5",
        "CI_COMMIT_TAG": "v1",
        "CI_JOB_TOKEN": "token",
    }


def github() -> Iterator[str]:
    """Yield the commands of each step of the workflow for GitHub, with its secret from a file."""
    workflow: dict[str, Any] = yaml.safe_load((CI / "github.yml").read_text(encoding="utf-8"))
    for step in workflow["jobs"]["bundle"]["steps"]:
        if "run" in step:
            secret = 'export DYMOE_SIGNING_KEY="$(cat ../secret.pem)"' if "DYMOE" in str(step.get("env")) else ":"
            yield f"{secret}\n{step['run']}"


def gitlab() -> Iterator[str]:
    """Yield the commands of each job of the pipeline for GitLab, with its secret as a file."""
    pipeline: dict[str, Any] = yaml.safe_load((CI / "gitlab-ci.yml").read_text(encoding="utf-8"))
    for job in ("bundle", "publish"):
        lines = [*pipeline[job].get("before_script", ()), *pipeline[job]["script"]]
        yield "\n".join(("export DYMOE_SIGNING_KEY=../secret.pem", *lines))


@pytest.mark.parametrize("steps", [github, gitlab])
def test_pipelines_of_hosts_publish_a_signed_bundle(steps: Any, workplace: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    job = tmp_path / "job"
    for commands in steps():
        subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=job, env=workplace, check=True, timeout=300)
    made = ("model-onnx.tar", "model.cdx.json", "model.dymoe", "model.dymoe.sig", "model.pub")
    assert sorted(path.name for path in (job / "dist").iterdir()) == list(made)
    assert bundle_cli("verify", job / "dist" / "model.dymoe", "--key", job / "dist" / "model.pub").code == 0
    called = (tmp_path / "called").read_text()
    assert all(re.search(rf"^(gh|curl) .*dist/{re.escape(name)}", called, re.MULTILINE) for name in made)
    assert not (job / "key.pem").exists()


def test_a_host_stops_at_a_gate(workplace: dict[str, str], tmp_path: Path, tiny_path: Path) -> None:
    check = next(commands for commands in github() if "dymoe-bundle check" in commands)
    shutil.copytree(tiny_path, tmp_path / "job" / "model.dymoe")
    environment = {**workplace, "MAX_KL": "1e-9"}
    outcome = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", check], cwd=tmp_path / "job", env=environment, timeout=300
    )
    assert outcome.returncode == 3 and (tmp_path / "job" / "check.xml").exists()
