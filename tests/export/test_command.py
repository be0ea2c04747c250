"""`dymoe-bundle export`: what is the same for all formats."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Outcome, assert_one_sentence, bundle_cli

# Each format is the name of the package that it needs, and of the extra.
FORMATS = pytest.mark.parametrize("format_", ["onnx", "gguf"])


@FORMATS
def test_a_damaged_bundle_leaves_nothing(damaged: Path, tmp_path: Path, format_: str) -> None:
    path = next(damaged.glob("experts-*"))
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    outcome = bundle_cli("export", damaged, "-o", tmp_path / "out", "--format", format_)
    assert_one_sentence(outcome, path.name, "checksum")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.export").exists()


WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None
from dymoe_runtime.cli.__main__ import bundle
bundle()
"""


@FORMATS
def test_without_the_extra_the_command_says_which(tiny_path: Path, tmp_path: Path, format_: str) -> None:
    command = [sys.executable, "-c", WITHOUT, format_, "export", tiny_path, "-o", tmp_path / "out", "--format", format_]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert_one_sentence(Outcome(done.returncode, done.stdout, done.stderr), f"pip install 'dymoe[{format_}]'")
