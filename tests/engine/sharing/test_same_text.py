"""The same text in every run of a bundle; benchmarks/streaming/same_text.py does this 200 times and 8 at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "streaming" / "same_text.py"


def test_runs_in_a_row_and_at_once_give_the_same_text(shipped_path: Path) -> None:
    command = [sys.executable, SCRIPT, shipped_path, "--runs", "6", "--at-once", "4", "--tokens", "24"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.findall(r"(\d+) of (\d+) runs", result.stdout) == [("6", "6"), ("4", "4")]
