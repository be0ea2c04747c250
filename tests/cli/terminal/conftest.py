from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import compile_cli, save_tiny

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="session")
def tiny_chat_path(calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, compiled. Read only."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    checkpoint = save_tiny(folder / "model", "qwen3_moe")
    config = checkpoint / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    outcome = compile_cli(checkpoint, "-o", folder / "tiny.dymoe", "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    return folder / "tiny.dymoe"
