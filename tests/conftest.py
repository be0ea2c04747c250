"""Shared fixtures: the shipped model, a tiny random checkpoint, and both compiled.

Compiling the shipped model takes a minute. It begins with the first test, in a process of its own; the tests that need
it come last.
"""

from __future__ import annotations

import dymoe_runtime  # first: it sets what torch's OpenMP library reads when it is loaded

# isort: split
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import EXAMPLES, MODEL, compile_cli, save_tiny

from dymoe_runtime.bundle.bundle import Bundle

assert dymoe_runtime.__version__
torch.set_num_threads(2)


@dataclass
class Compiling:
    """A running `dymoe-compile` of the shipped model."""

    folder: tempfile.TemporaryDirectory[str]
    process: subprocess.Popen[bytes]

    @property
    def bundle(self) -> Path:
        return Path(self.folder.name) / "demo.dymoe"

    @property
    def log(self) -> Path:
        return Path(self.folder.name) / "log.txt"


COMPILING = pytest.StashKey[Compiling]()


def needs_shipped(item: pytest.Item) -> bool:
    return "shipped_path" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=needs_shipped)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or not any(map(needs_shipped, session.items)):
        return
    folder = tempfile.TemporaryDirectory(prefix="dymoe-shipped-")
    with (Path(folder.name) / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "dymoe_compile", MODEL, "-o", Path(folder.name) / "demo.dymoe"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    session.config.stash[COMPILING] = Compiling(folder, process)


def pytest_sessionfinish(session: pytest.Session) -> None:
    compiling = session.config.stash.get(COMPILING, None)
    if compiling is not None:
        compiling.process.kill()
        compiling.process.wait()
        compiling.folder.cleanup()


@pytest.fixture(scope="session")
def shipped_path(request: pytest.FixtureRequest) -> Path:
    """The shipped model, compiled with the defaults. Read only."""
    compiling = request.config.stash[COMPILING]
    assert compiling.process.wait() == 0, compiling.log.read_text(encoding="utf-8")
    return compiling.bundle


@pytest.fixture(scope="session")
def shipped(shipped_path: Path) -> Bundle:
    return Bundle.open(shipped_path)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE checkpoint. Read only."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3_moe")


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text just long enough to compile tiny models with quickly."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((EXAMPLES / "calibration" / "wiki.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_path(tiny_checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, compiled. Read only."""
    path = tmp_path_factory.mktemp("tiny-bundle") / "tiny.dymoe"
    outcome = compile_cli(tiny_checkpoint, "-o", path, "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    return path


@pytest.fixture
def damaged(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may harm."""
    return Path(shutil.copytree(tiny_path, tmp_path / "damaged.dymoe"))
