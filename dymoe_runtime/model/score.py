"""Scores of a model on a text: the likelihood, and the distance to a reference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ModelSpec

# Positions of a window whose logits are in memory at once.
SCORED_ROWS = 64

# Logits [rows, vocab] of hidden states [rows, H].
Head = Callable[[np.ndarray], np.ndarray]


class WindowModel(Protocol):
    """A model that runs whole windows of text, each as a new sequence, such as a `Scorer`."""

    @property
    def spec(self) -> ModelSpec:
        """Return the specification of the model."""

    def hidden(self, ids: np.ndarray, /) -> np.ndarray:
        """Return hidden states [T, H] of a window of token ids [T]."""

    def logits(self, hidden: np.ndarray, /) -> np.ndarray:
        """Return logits [rows, vocab] of hidden states [rows, H]."""


@dataclass
class Score:
    """Sums over scored tokens, in nats."""

    tokens: int = 0
    nll_sum: float = 0.0  # negative log-likelihood
    kl_sum: float = 0.0  # KL from the reference
    agreed: int = 0  # tokens whose most probable prediction is that of the reference
    compared: int = 0  # tokens compared with the reference

    def add(self, other: Score) -> None:
        """Add another score to this one."""
        self.tokens += other.tokens
        self.nll_sum += other.nll_sum
        self.kl_sum += other.kl_sum
        self.agreed += other.agreed
        self.compared += other.compared

    def to_json(self) -> dict[str, Any]:
        """Return tokens, nll per token and perplexity and, with a reference, kl per token and top1_agreement.

        Raises DymoeError if nll or kl is not finite.
        """
        nll = self.nll_sum / self.tokens
        if not math.isfinite(nll + self.kl_sum):
            raise DymoeError("the model's output is not finite; its weights may be damaged: run dymoe-bundle verify")
        result: dict[str, Any] = {"tokens": self.tokens, "nll": nll, "perplexity": math.exp(min(nll, 700.0))}
        if self.compared:
            result |= {"kl": self.kl_sum / self.compared, "top1_agreement": self.agreed / self.compared}
        return result


def windows(ids: Sequence[int], length: int) -> Iterator[np.ndarray]:
    """Yield `ids` in consecutive windows of `length`; leave out a last window of a single token."""
    for start in range(0, len(ids), length):
        window = np.array(ids[start : start + length])
        if len(window) > 1:
            yield window


def score_window(
    ids: np.ndarray, hidden: np.ndarray, head: Head, reference: tuple[np.ndarray, Head] | None = None
) -> Score:
    """Return the score of predicting ids[1:] from hidden states [T, H].

    `reference`, if given, is (hidden, head) of the reference model. KL is the sum of p_ref log(p_ref / p) over the
    vocabulary.
    """
    score = Score()
    for block in score_blocks(ids, hidden, head, reference):
        score.add(block)
    return score


def score_blocks(
    ids: np.ndarray, hidden: np.ndarray, head: Head, reference: tuple[np.ndarray, Head] | None = None
) -> list[Score]:
    """Return the score of each SCORED_ROWS consecutive predictions of a window; the arguments are `score_window`'s."""
    blocks = []
    # `Score.to_json` checks for values that are not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(ids) - 1, SCORED_ROWS):
            stop = min(start + SCORED_ROWS, len(ids) - 1)
            log_p = log_softmax(head(hidden[start:stop]))
            block = _likelihood(log_p, ids[start + 1 : stop + 1])
            if reference is not None:
                block.add(_distance(log_p, log_softmax(reference[1](reference[0][start:stop]))))
            blocks.append(block)
    return blocks


def _likelihood(log_p: np.ndarray, ids: np.ndarray) -> Score:
    """Return the likelihood score of ids [n] under log-probabilities log_p [n, vocab]."""
    return Score(tokens=len(ids), nll_sum=-float(np.take_along_axis(log_p, ids[:, None], 1).sum(dtype=np.float64)))


def _distance(log_p: np.ndarray, log_r: np.ndarray) -> Score:
    """Return the distance of log-probabilities log_p [n, vocab] from those of the reference, log_r."""
    kl = float((np.exp(log_r) * (log_r - log_p)).sum(dtype=np.float64))
    agreed = int((log_p.argmax(-1) == log_r.argmax(-1)).sum())
    return Score(kl_sum=kl, agreed=agreed, compared=len(log_p))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the softmax over the last dimension."""
    shifted = logits - logits.max(-1, keepdims=True)
    normed: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normed
