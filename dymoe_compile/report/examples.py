"""Examples of next tokens as text, for compile.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dymoe_compile.policy.examples import Example, Examples
from dymoe_compile.policy.sensitivity import Guess

# Tokens of context that an example quotes, and tokens before a token that decide how it is written.
QUOTED, BEFORE = 32, 4
# What decoders write for bytes that are no whole character.
REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """The part of a tokenizer that turns tokens into text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of `ids`."""

    def token(self, token_id: int, /) -> str | None:
        """Return the token as the vocabulary spells it, or None if the id is outside the vocabulary."""


def describe(examples: Examples, windows: np.ndarray, tokenizer: Decoder) -> dict[str, Any]:
    """Return examples from `windows` [n, W] as JSON types: contexts and tokens as text, probabilities rounded."""
    return {
        "places": examples.places,
        "agreed": dict(examples.agreed),
        "shown": [_example(example, windows[example.window].tolist(), tokenizer) for example in examples.shown],
    }


def _example(example: Example, ids: list[int], tokenizer: Decoder) -> dict[str, Any]:
    end = example.position + 1
    before = ids[max(0, end - QUOTED) : end]

    def guess(made: Guess) -> dict[str, Any]:
        return {
            "token": token_text(before, made.token, tokenizer),
            "probability": round(made.probability, 4),
            "of_original": round(made.of_original, 4),
            "same": made.token == example.original.token,
        }

    return {
        "differs": example.differs,
        "context": tokenizer.decode(before).lstrip(REPLACEMENT),
        "follows": token_text(before, ids[end], tokenizer),
        "original": guess(example.original),
        "points": {name: guess(made) for name, made in example.points.items()},
    }


def token_text(before: Sequence[int], token: int, tokenizer: Decoder) -> str:
    """Return what `token` adds to the text of the tokens `before` it, or its name if that is no whole character."""
    some = list(before[-BEFORE:])
    prefix, whole = tokenizer.decode(some), tokenizer.decode([*some, token])
    added = whole.removeprefix(prefix) if whole.startswith(prefix) else tokenizer.decode([token])
    if added and REPLACEMENT not in added:
        return added
    return tokenizer.token(token) or f"token {token}"
