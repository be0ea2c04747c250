"""Causal attention in NumPy, the reference for the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dymoe_runtime.kernels.kv_cache import HEAVY_HITTER_QUERIES


class Sight(NamedTuple):
    """What a token sees of the positions up to its own."""

    window: int | None = None  # only the last `window` positions, its own included
    chunk: int | None = None  # only positions of its own chunk of so many


EVERYTHING = Sight()


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    start: int,
    sight: Sight = EVERYTHING,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Return the causal attention of q [heads, T, d] over k and v [kv_heads, start + T, d], float32 [heads, T, d].

    Token i of q is at position start + i, and attends to what `sight` shows it. `sinks` [heads] are scores that take
    part in each softmax, but have no value.
    """
    y = np.empty(q.shape, np.float32)
    hidden = ~causal_mask(start, q.shape[1], sight)
    for head, kv_head in _heads(q, k):
        y[head] = _shares(q[head], k[kv_head], hidden, _sink(sinks, head)) @ v[kv_head]
    return y


def received(
    q: np.ndarray, k: np.ndarray, start: int, sight: Sight = EVERYTHING, sinks: np.ndarray | None = None
) -> np.ndarray:
    """Return the attention that each token of q [heads, T, d] gets from the last tokens of q, float32 [T].

    It is summed over heads and the last HEAVY_HITTER_QUERIES tokens. k is [kv_heads, start + T, d].
    """
    tokens = q.shape[1]
    last = min(tokens, HEAVY_HITTER_QUERIES)
    hidden = ~causal_mask(start + tokens - last, last, sight)
    mass = np.zeros(k.shape[1], np.float32)
    for head, kv_head in _heads(q, k):
        mass += _shares(q[head, -last:], k[kv_head], hidden, _sink(sinks, head)).sum(axis=0)
    return mass[start:]


def causal_mask(start: int, tokens: int, sight: Sight = EVERYTHING) -> np.ndarray:
    """Return bool [tokens, start + tokens]: whether the query at position start + i attends to position j."""
    query = np.arange(start, start + tokens)[:, None]
    key = np.arange(start + tokens)[None, :]
    mask: np.ndarray = key <= query
    if sight.window:
        mask &= key > query - sight.window
    if sight.chunk:
        mask &= key // sight.chunk == query // sight.chunk
    return mask


def _heads(q: np.ndarray, k: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield each head with its KV head, so that callers hold the scores of one head at a time."""
    group = len(q) // len(k)
    return ((head, head // group) for head in range(len(q)))


def _sink(sinks: np.ndarray | None, head: int) -> float:
    return -math.inf if sinks is None else float(sinks[head])


def _shares(q: np.ndarray, k: np.ndarray, hidden: np.ndarray, sink: float) -> np.ndarray:
    """Return the softmax of q @ k.T / sqrt(d) over positions, 0 where `hidden`: [T, positions].

    q is [T, d], k [positions, d], hidden bool [T, positions].
    """
    scores: np.ndarray = q @ k.T / np.float32(math.sqrt(q.shape[-1]))
    scores[hidden] = -np.inf
    most = np.maximum(scores.max(axis=-1, keepdims=True), np.float32(sink))
    scores -= most
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True) + np.exp(np.float32(sink) - most)
    return scores
