"""Calibration texts, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import read_text

DEFAULT_TEXTS = Path(__file__).parent.parent / "data"
WINDOW = 512
MIN_WINDOW = 32
REMEDY = "give calibration text with --calibration FILE"
MIN_TOKENS = 8 * MIN_WINDOW
# One window in this many is held out: it measures quality and does not enter statistics.
HELD_OUT = 5

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Windows:
    """Windows of calibration tokens, int64 [n, W] each; `digest` is the SHA-256 of the texts."""

    train: np.ndarray
    held_out: np.ndarray
    digest: str


def load_texts(files: Sequence[str]) -> list[str]:
    """Return the text of each file: plain text, or JSONL whose lines have a `text` field.

    Without files, returns the texts shipped with the compiler. Raises DymoeError for a file that cannot be read.
    """
    paths = [Path(file) for file in files] or sorted(DEFAULT_TEXTS.glob("*.txt"))
    return [_read_jsonl(path) if path.suffix in (".jsonl", ".json") else read_text(path, REMEDY) for path in paths]


def make_windows(texts: Sequence[str], encode: Encode, max_context: int, tokens: int, seed: int) -> Windows:
    """Cut texts into windows of about `tokens` tokens in all, the same number from each text if it has enough.

    `max_context` limits the length of a window. `seed` decides which windows of a text are taken. Raises DymoeError
    if there is too little text.
    """
    ids = [encode(text) for text in texts]
    available = sum(len(text) for text in ids)
    if available < MIN_TOKENS:
        raise DymoeError(
            f"calibration text has {available} tokens, at least {MIN_TOKENS} are needed; give more with --calibration"
        )
    length = max(MIN_WINDOW, min(WINDOW, max_context, available // (2 * HELD_OUT)))
    length = min(length, max_context)
    windows = _round_robin([_cut(text, length, seed) for text in ids], max(2 * HELD_OUT, tokens // length))
    if len(windows) < 2:
        raise DymoeError(
            f"calibration text is too short: no {2 * length} tokens in one piece; give longer text with --calibration"
        )
    stacked = np.stack(windows)
    held = np.arange(len(stacked)) % HELD_OUT == HELD_OUT - 1
    held[-1] |= not held.any()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Windows(stacked[~held], stacked[held], digest)


def _cut(ids: list[int], length: int, seed: int) -> list[np.ndarray]:
    """Return the whole windows of a text, shuffled by `seed`."""
    windows = [np.array(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[i] for i in order.tolist()]


def _round_robin(groups: list[list[np.ndarray]], count: int) -> list[np.ndarray]:
    """Return up to `count` windows, one from each group in turn."""
    turns = range(max((len(group) for group in groups), default=0))
    return [group[turn] for turn in turns for group in groups if turn < len(group)][:count]


def _read_jsonl(path: Path) -> str:
    """Return the `text` fields of a JSONL file, joined by blank lines."""
    texts = []
    for number, line in enumerate(read_text(path, REMEDY).split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DymoeError(f"{path}: line {number} is not a JSON object with a 'text' field") from error
        if not isinstance(texts[-1], str):
            raise DymoeError(f"{path}: line {number}: 'text' is not a string")
    return "\n\n".join(texts)
