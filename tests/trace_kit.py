"""What the tests of traces share: a traced run, and what is in its trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import run_cli

from dymoe_runtime.bundle.bundle import Bundle

TOKENS = 30
PROMPT = "def __init__(self, name):"


def traced(bundle: Path, path: Path, *args: object, prompt: str = PROMPT) -> dict[str, Any]:
    """Trace a run of `TOKENS` tokens after `prompt` to `path`; return the run's own figures."""
    tail = ("--max-tokens", TOKENS, "--ignore-eos", "--json", "--trace", path, *args)
    outcome = run_cli(bundle, "--prompt", prompt, *tail)
    assert outcome.code == 0, outcome.err
    figures: dict[str, Any] = outcome.json
    return figures


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def half(bundle: Path) -> int:
    """Return the bytes of half the experts."""
    return Bundle.open(bundle).expert_bytes() // 2
