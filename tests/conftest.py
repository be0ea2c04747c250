"""Shared fixtures: the shipped model, a tiny random checkpoint, and both compiled.

Files that need something that takes long come last, those that take long themselves first among them; `background.py`
makes it beside the others.
"""

from __future__ import annotations

import dymoe_runtime  # first: it sets what torch's OpenMP library reads when it is loaded

# isort: split
import shutil
from contextlib import ExitStack
from pathlib import Path

import background
import pytest
import torch
from helpers import EXAMPLES, compiled, save_tiny

from dymoe_runtime.bundle.bundle import Bundle

assert dymoe_runtime.__version__
torch.set_num_threads(2)


# Files of 20 s and more: the last one to begin must not leave the other workers without work.
LONG = ("test_hundred_interrupts", "test_commands", "test_lm_eval", "test_quality", "test_kernel_check", "test_imports")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    waiting = {item.path for item in items if background.needed(item)}
    items.sort(key=lambda item: (item.path in waiting, item.path.stem not in LONG))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that starts test workers, or the only one
        jobs = ExitStack()
        jobs.enter_context(background.folder())
        config.add_cleanup(jobs.close)


def pytest_collection_finish(session: pytest.Session) -> None:
    needed = {name for item in session.items for name in background.needed(item)}
    for name, command in background.commands().items():
        if name in needed and not session.config.option.collectonly:
            background.start(name, command)


@pytest.fixture(scope="session")
def shipped_path() -> Path:
    """The shipped model, compiled with the defaults. Read only."""
    return background.finish("shipped_path") / background.BUNDLE


@pytest.fixture(scope="session")
def sanitized_check() -> Path:
    """kernel_check.cpp, built with sanitizers."""
    return background.finish("sanitized_check") / background.CHECK


@pytest.fixture(scope="session")
def thread_check() -> Path:
    """thread_check.cpp, built with the thread sanitizer."""
    return background.finish("thread_check") / background.THREADS


@pytest.fixture(scope="session")
def arm_check() -> Path:
    """kernel_check.cpp, built for ARM."""
    return background.finish("arm_check") / background.CHECK


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
    return compiled(tiny_checkpoint, tmp_path_factory.mktemp("tiny-bundle") / "tiny.dymoe", calibration_text)


@pytest.fixture
def damaged(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may harm."""
    return Path(shutil.copytree(tiny_path, tmp_path / "damaged.dymoe"))
