"""Causal attention by torch: what the compiled kernels are held against, and what the compiler runs."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_runtime.kv_cache import HEAVY_HITTER_QUERIES


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int, window: int | None) -> np.ndarray:
    """Attention of q [heads, T, d] at positions start.. over k, v [kv_heads, start + T, d]; [heads, T, d].

    A token sees all before it, or the last `window` with itself.
    """
    if window and k.shape[1] <= window:
        window = None
    mask = None
    if q.shape[1] == 1:
        if window:
            k, v = k[:, -window:], v[:, -window:]
    elif window or start:
        mask = _bias(start, q.shape[1], window)
    causal = mask is None and q.shape[1] > 1
    queries, keys, values = (torch.from_numpy(x)[None] for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[0] != k.shape[0]
    )
    return y[0].numpy()


def received(q: np.ndarray, k: np.ndarray, start: int, window: int | None) -> np.ndarray:
    """Attention that each token of q [heads, T, d] gets from the last of them, [T]; k as in `attention`."""
    tokens = q.shape[1]
    last = min(tokens, HEAVY_HITTER_QUERIES)
    groups = q.shape[0] // k.shape[0]
    queries = torch.from_numpy(q[:, -last:]).reshape(k.shape[0], groups * last, -1)
    scores = queries @ torch.from_numpy(k).transpose(1, 2) / math.sqrt(q.shape[-1])
    mask = causal_mask(start + tokens - last, last, window)
    scores = scores.view(-1, last, k.shape[1]).masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1).sum(dim=(0, 1))[start:].numpy()


def causal_mask(start: int, tokens: int, window: int | None) -> torch.Tensor:
    """bool [tokens, start + tokens], true where a query at position start + i may look."""
    query = torch.arange(start, start + tokens)[:, None]
    key = torch.arange(start + tokens)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window else mask


@lru_cache(maxsize=1)  # one for all layers of a pass
def _bias(start: int, tokens: int, window: int | None) -> torch.Tensor:
    """causal_mask to be added to scores, float32."""
    hidden = ~causal_mask(start, tokens, window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)
