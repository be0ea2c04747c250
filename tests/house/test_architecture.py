"""The architecture keeps to its limits: see .ci/house.py, which `make lint` runs, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_the_figures_of_the_architecture_are_within_their_limits() -> None:
    pytest.importorskip("grimp")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "house.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_runtime_never_names_torch() -> None:
    for path in (ROOT / "dymoe_runtime").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.strip().startswith(("import torch", "from torch")), path
