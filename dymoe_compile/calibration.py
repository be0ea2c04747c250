"""Calibration texts, and what one pass of them through the original model tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dymoe_runtime.decoder import Routing
from dymoe_runtime.errors import DymoeError

DEFAULT_TEXTS = Path(__file__).parent / "data"
WINDOW = 512
LEAST_WINDOW = 32
LEAST_TOKENS = 8 * LEAST_WINDOW
# One window in this many is held out: not used for statistics, only to measure quality.
HELD_OUT = 5
# Tokens whose gates are kept per layer, to fit thresholds on.
GATE_SAMPLE = 4096

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Windows:
    """Calibration tokens, int64 [n, W] each; `digest` is the SHA-256 of the texts."""

    train: torch.Tensor
    held_out: torch.Tensor
    digest: str


@dataclass
class LayerStatistics:
    """What the router of one layer did on the calibration tokens."""

    frequency: list[float]  # [experts], share of tokens
    gate_mass: list[float]  # [experts], share of all gates
    gates: torch.Tensor  # [sample, k], of single tokens
    chunk_importance: torch.Tensor  # [windows, experts], as prefill sees it
    chunk_energy: torch.Tensor  # [windows, experts], sum of squared gates
    recall: list[float]  # [ranks]: was the guess of this rank, made one layer earlier, chosen


def load_texts(files: Sequence[str]) -> list[str]:
    """The text of each file: plain text, or JSONL whose lines have a `text` field."""
    paths = [Path(file) for file in files] or sorted(DEFAULT_TEXTS.glob("*.txt"))
    return [_read_jsonl(path) if path.suffix in (".jsonl", ".json") else _read(path) for path in paths]


def make_windows(texts: Sequence[str], encode: Encode, max_context: int, tokens: int, seed: int) -> Windows:
    """Cut texts into windows, the same number from each text as far as it has them, about `tokens` in all."""
    ids = [encode(text) for text in texts]
    available = sum(len(text) for text in ids)
    if available < LEAST_TOKENS:
        raise DymoeError(
            f"calibration text has {available} tokens, at least {LEAST_TOKENS} are needed; give more with --calibration"
        )
    length = max(LEAST_WINDOW, min(WINDOW, max_context, available // (2 * HELD_OUT)))
    length = min(length, max_context)
    windows = _round_robin([_cut(text, length, seed) for text in ids], max(2 * HELD_OUT, tokens // length))
    if len(windows) < 2:
        raise DymoeError(
            f"calibration text is too short: no {2 * length} tokens in one piece; give longer text with --calibration"
        )
    stacked = torch.stack(windows)
    held = torch.arange(len(stacked)) % HELD_OUT == HELD_OUT - 1
    held[-1] |= not held.any()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Windows(stacked[~held], stacked[held], digest)


def layer_statistics(routing: Routing, windows: int, experts: int, guess: torch.Tensor | None, seed: int) -> LayerStatistics:
    """Statistics of one layer from the routing of all training tokens, `windows` equal windows of them.

    `guess` [T, k] is what the previous layer expected this router to choose.
    """
    tokens, k = routing.experts.shape
    counts = torch.bincount(routing.experts.reshape(-1), minlength=experts)
    mass = torch.zeros(experts).index_add_(0, routing.experts.reshape(-1), routing.gates.reshape(-1))
    assert routing.token_weights is not None
    importance = routing.gates * routing.token_weights[:, None]
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:GATE_SAMPLE]
    return LayerStatistics(
        frequency=_rounded(counts / tokens),
        gate_mass=_rounded(mass / mass.sum()),
        gates=routing.gates[sample],
        chunk_importance=_per_window(routing.experts, importance.clamp_min(1e-12), windows, experts),
        chunk_energy=_per_window(routing.experts, routing.gates.square(), windows, experts),
        recall=[] if guess is None else _recall(guess, routing.experts),
    )


def _recall(guess: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    """Share of tokens whose guess of each rank was among the chosen experts."""
    found = (guess[:, :, None] == chosen[:, None, :]).any(-1)
    return _rounded(found.float().mean(0))


def _per_window(experts: torch.Tensor, values: torch.Tensor, windows: int, size: int) -> torch.Tensor:
    """Sum `values` [T, k] by expert within each window, [windows, size]."""
    where = torch.arange(windows).repeat_interleave(experts.numel() // windows) * size + experts.reshape(-1)
    return torch.zeros(windows * size).index_add_(0, where, values.reshape(-1)).view(windows, size)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def _cut(ids: list[int], length: int, seed: int) -> list[torch.Tensor]:
    """Whole windows of a text, in an order that `seed` decides."""
    windows = [torch.tensor(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[i] for i in order.tolist()]


def _round_robin(groups: list[list[torch.Tensor]], count: int) -> list[torch.Tensor]:
    """Up to `count` windows, one from each group in turn."""
    turns = range(max((len(group) for group in groups), default=0))
    return [group[turn] for turn in turns for group in groups if turn < len(group)][:count]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DymoeError(f"{path}: no such file; give calibration text with --calibration FILE") from error
    except IsADirectoryError as error:
        raise DymoeError(f"{path}: is a directory; give its text files with --calibration FILE") from error
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    if not text.strip():
        raise DymoeError(f"{path}: calibration text is empty; give text with --calibration FILE")
    return text


def _read_jsonl(path: Path) -> str:
    """The `text` fields of a JSONL file, joined by blank lines."""
    texts = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DymoeError(f"{path}: line {number} is not a JSON object with a 'text' field") from error
        if not isinstance(texts[-1], str):
            raise DymoeError(f"{path}: line {number}: 'text' is not a string")
    return "\n\n".join(texts)
