"""The result of routing, and the interface of the routed experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(slots=True)  # not frozen, which would be slower to make: each layer of a decoded token makes one
class Routing:
    """The routing of T tokens in one layer."""

    experts: np.ndarray  # int64 [T, k], highest weight first
    weights: np.ndarray  # routing weights, float32 [T, k]
    residual: np.ndarray  # [T, H], the residual stream, from which the next layer's routing can be guessed
    listed: tuple[list[int], list[float]] | None = None  # a single token's experts and weights, if known as lists

    def of_token(self) -> tuple[list[int], list[float]]:
        """Return the experts and routing weights of a single token as lists."""
        return self.listed or (self.experts[0].tolist(), self.weights[0].tolist())


@dataclass(slots=True)
class PromptRouting:
    """The routing of T tokens of prompts in one layer; each chunk of a prompt chooses its tiers together."""

    experts: np.ndarray  # int64 [T, k], highest weight first
    weights: np.ndarray  # routing weights, float32 [T, k]
    residual: np.ndarray  # [T, H], as in `Routing`
    token_weights: np.ndarray  # float32 [T], mean 1: how much each token counts
    chunks: Sequence[int]  # tokens of each chunk
    by_share: bool = True  # whether weights are shares already; see `shares`
    # Called between parts of the work, while no expert is held, so that other sequences go on meanwhile.
    pause: Callable[[], None] | None = None

    @property
    def shares(self) -> np.ndarray:
        """Return the share that each expert has in its token, float32 [T, k], by which tokens compare.

        Weights of a sigmoid router need not sum to the same for all tokens, so they are divided by their sum.
        """
        return self.weights if self.by_share else shares_of(self.weights)


class Experts(Protocol):
    """The routed experts of all layers: those of a bundle in the runtime, the original model's in the compiler."""

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        """Return the weighted sum of the experts' outputs for h [T, H], [T, H]; each token chooses its own tiers."""

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        """Return the weighted sum of the experts' outputs for a prompt's h [T, H], [T, H]; each chunk chooses tiers."""


class NoExperts:
    """Experts that return zeros, for decoders whose experts run elsewhere or not at all."""

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        return np.zeros_like(h)

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        return np.zeros_like(h)


def shares_of(weights: np.ndarray) -> np.ndarray:
    """Return routing weights [T, k] divided by their sum for each token."""
    shares: np.ndarray = weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.float32(1e-30))
    return shares


def in_groups(x: np.ndarray, size: int) -> list[np.ndarray]:
    """Return views of x, split along its first dimension into parts of `size`; the last may be smaller."""
    return [x[first : first + size] for first in range(0, len(x), size)]


def chunk_lengths(tokens: int, size: int) -> list[int]:
    """Return the lengths of chunks of `size` that `tokens` are split into; the last may be smaller.

    >>> chunk_lengths(600, 256)
    [256, 256, 88]
    """
    return [min(size, tokens - first) for first in range(0, tokens, size)]


def in_chunks(x: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """Return views of x, split along its first dimension into parts of `lengths`."""
    ends = itertools.accumulate(lengths)
    return [x[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the parts concatenated along their first dimension; a single part is returned without a copy."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
