"""Examples of next tokens: places that nobody picked, text as a reader sees it, and none where they are not wanted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import compile_cli

from dymoe_compile.policy.examples import DIFFERING, EVEN, PLACES, choose, evenly, spread
from dymoe_compile.policy.sensitivity import Guess, Original
from dymoe_compile.report.examples import describe, token_text
from dymoe_runtime.bundle.policy import OperatingPoint

VOCABULARY = 50


def point(name: str) -> OperatingPoint:
    return OperatingPoint(name, "uniform", (), (), 2.0, 2.1, 1, 0.1, 1.0, 0.9, 0.1)


class Bytes:
    """A tokenizer whose tokens are bytes; what is no whole character is decoded as the replacement character."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token(self, token_id: int) -> str | None:
        return f"<0x{token_id:02X}>" if token_id < 256 else None


@pytest.mark.parametrize(("windows", "length"), [(8, 512), (2, 512), (3, 20), (1, 2), (100, 33)])
def test_places_are_spread_evenly(windows: int, length: int) -> None:
    places = spread(np.zeros((windows, length)))
    flat = [window * (length - 1) + position for window, position in places]
    total = windows * (length - 1)
    assert len(places) == min(PLACES, total) and flat == sorted(set(flat))
    assert flat[0] >= 0 and flat[-1] < total and all(0 <= position < length - 1 for _, position in places)
    gaps = {after - before for before, after in itertools.pairwise(flat)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_examples_are_chosen_by_place_and_by_what_differs() -> None:
    rng = np.random.default_rng(0)
    places = spread(np.zeros((4, 33)))
    original = Original(list(rng.standard_normal((4, 33, VOCABULARY))), lambda hidden: hidden)
    right = [int(original.hidden[window][position].argmax()) for window, position in places]
    wrong = range(3, 43)
    lowest = [Guess((token + (i in wrong)) % VOCABULARY, 0.5, 0.25) for i, token in enumerate(right)]
    highest = [Guess(token, 0.5, 0.5) for token in right]
    examples = choose(places, original, [point("low"), point("high")], [lowest, highest])
    assert examples.places == PLACES and examples.agreed == {"low": PLACES - len(wrong), "high": PLACES}
    even = [(example.window, example.position) for example in examples.shown if not example.differs]
    assert even == evenly(places, EVEN)
    odd = [places.index((example.window, example.position)) for example in examples.shown if example.differs]
    assert len(odd) == DIFFERING and set(odd) <= set(wrong) and max(odd) - min(odd) > len(wrong) / 2
    assert not set(odd) & {places.index(place) for place in even}
    assert choose(places, original, [point("low"), point("high")], [lowest, highest]) == examples


def test_tokens_are_written_as_they_read() -> None:
    euro = list("€".encode())
    assert token_text(list(b"ab"), ord("c"), Bytes()) == "c"
    assert token_text(euro[:2], euro[2], Bytes()) == "<0xAC>"  # no text of its own, so its name
    assert token_text([], euro[0], Bytes()) == f"<0x{euro[0]:02X}>"

    class Wide(Bytes):
        def decode(self, ids: Sequence[int]) -> str:
            return super().decode([token for token in ids if token < 256])

    assert token_text(list(b"ab"), 300, Wide()) == "token 300"


def test_contexts_begin_with_whole_characters() -> None:
    text = list(("€" * 30).encode())
    places = [(0, 40), (0, 5)]
    original = Original([np.eye(len(text), 256)], lambda hidden: hidden)
    guesses = [Guess(ord("x"), 0.5, 0.25)] * 2
    examples = choose(places, original, [point("low")], [guesses])
    described = describe(examples, np.array([text]), Bytes())
    first, second = described["shown"]
    assert first["context"].startswith("€") and second["context"] == "€€"
    assert json.loads(json.dumps(described)) == described


def test_examples_can_be_left_out(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.dymoe"
    arguments = (tiny_checkpoint, "-o", path, "--calibration", calibration_text, "--tiers", "3")
    assert compile_cli(*arguments, "--no-examples").code == 0
    found = json.loads((path / "compile.json").read_text(encoding="utf-8"))
    assert "examples" not in found and found["provenance"]["examples"] is False
    page = (path / "report.html").read_text(encoding="utf-8")
    words = [word for word in calibration_text.read_text(encoding="utf-8").split() if len(word) > 9 and word.isalpha()]
    assert words and not any(f" {word} " in page for word in words)
    assert "up to date" in compile_cli(*arguments, "--no-examples").out
