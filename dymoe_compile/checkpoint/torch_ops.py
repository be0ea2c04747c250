"""The mathematics of the original model in torch: activations, and attention over whole windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_runtime.kernels.kv_cache import HEAVY_HITTER_QUERIES

Activation = Callable[[torch.Tensor], torch.Tensor]

# Keys are the names that Hugging Face configurations use; `spec.ACTIVATIONS` lists them.
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def attend_whole(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None, weigh: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Compute attention over tokens that are a whole sequence; this is a `WholeAttention` for the `Decoder`.

    Returns the outputs [heads, T, d] and, with `weigh`, the attention that each token received [T], else None.
    """
    return attention(q, k, v, window), received(q, k, window) if weigh else None


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """Return the causal attention of q [heads, T, d] over k and v [kv_heads, T, d], shaped like q.

    A token attends to itself and to all tokens before it, or to the last `window` tokens including itself.
    """
    tokens = q.shape[1]
    mask = _bias(tokens, window) if window and window < tokens else None
    queries, keys, values = (torch.from_numpy(x)[None] for x in (q, k, v))
    causal, grouped = mask is None and tokens > 1, q.shape[0] != k.shape[0]
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return y[0].numpy()


def received(q: np.ndarray, k: np.ndarray, window: int | None) -> np.ndarray:
    """Return the attention that each token receives from the last HEAVY_HITTER_QUERIES tokens, float32 [T].

    q is [heads, T, d], k is [kv_heads, T, d]. The result is summed over heads and queries.
    """
    tokens = q.shape[1]
    last = min(tokens, HEAVY_HITTER_QUERIES)
    groups = q.shape[0] // k.shape[0]
    queries = torch.from_numpy(q[:, -last:]).reshape(k.shape[0], groups * last, -1)
    scores = queries @ torch.from_numpy(k).transpose(1, 2) / math.sqrt(q.shape[-1])
    mask = causal_mask(tokens, window)[-last:]
    scores = scores.view(-1, last, tokens).masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1).sum(dim=(0, 1)).numpy()


def causal_mask(tokens: int, window: int | None) -> torch.Tensor:
    """Return bool [tokens, tokens], true where the query of a row may attend to the key of a column."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window else mask


@lru_cache(maxsize=1)  # all layers of a pass share it
def _bias(tokens: int, window: int | None) -> torch.Tensor:
    """Return `causal_mask` as float32 to add to scores: 0 or -inf."""
    return torch.zeros(tokens, tokens).masked_fill_(~causal_mask(tokens, window), -math.inf)
