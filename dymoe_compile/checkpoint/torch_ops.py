"""The mathematics of the original model in torch: activations, and attention over whole windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_runtime.kernels.attention_reference import EVERYTHING, Sight
from dymoe_runtime.kernels.kv_cache import HEAVY_HITTER_QUERIES
from dymoe_runtime.spec import clamped_parameters

Activation = Callable[[torch.Tensor], torch.Tensor]

# Keys are the names that Hugging Face configurations use; `spec.ACTIVATIONS` lists them.
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gated(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return act(gate) * up, or what `clamped_swiglu` says, [T, n]."""
    clamped = clamped_parameters(activation)
    if clamped is None:
        return ACTIVATIONS[activation](gate) * up
    alpha, limit = clamped
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def run_expert(
    expert: Mapping[str, torch.Tensor], x: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (hidden activations [T, I], outputs [T, H]) of one expert for x [T, H].

    `expert` has float32 matrices gate, up and down, and perhaps their biases.
    """

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        y, bias = x @ expert[name].T, expert.get(f"{name}_bias")
        return y if bias is None else y + bias

    middle = gated(activation, product("gate", x), product("up", x))
    return middle, product("down", middle)


def attend_whole(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, sight: Sight, weigh: bool, sinks: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Compute attention over tokens that are a whole sequence; this is a `WholeAttention` for the `Decoder`.

    Returns the outputs [heads, T, d] and, with `weigh`, the attention that each token received [T], else None.
    """
    y = attention(q, k, v, sight) if sinks is None else attention_with_sinks(q, k, v, sight, sinks)
    return y, received(q, k, sight, sinks) if weigh else None


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, sight: Sight = EVERYTHING) -> np.ndarray:
    """Return the causal attention of q [heads, T, d] over k and v [kv_heads, T, d], shaped like q."""
    tokens = q.shape[1]
    limited = any(most and most < tokens for most in sight)
    mask = _bias(tokens, sight) if limited else None
    queries, keys, values = (torch.from_numpy(x)[None] for x in (q, k, v))
    causal, grouped = mask is None and tokens > 1, q.shape[0] != k.shape[0]
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return y[0].numpy()


def attention_with_sinks(q: np.ndarray, k: np.ndarray, v: np.ndarray, sight: Sight, sinks: np.ndarray) -> np.ndarray:
    """Return attention as `attention` does; `sinks` [heads] are scores that take part in each softmax."""
    group = q.shape[0] // k.shape[0]
    hidden, y = ~causal_mask(q.shape[1], sight), np.empty(q.shape, np.float32)
    for head in range(q.shape[0]):
        scores = torch.from_numpy(q[head]) @ torch.from_numpy(k[head // group]).T / math.sqrt(q.shape[-1])
        scores = scores.masked_fill_(hidden, -math.inf)
        shares = _with_sink(scores, float(sinks[head]))
        y[head] = (shares @ torch.from_numpy(v[head // group])).numpy()
    return y


def _with_sink(scores: torch.Tensor, sink: float) -> torch.Tensor:
    """Return the softmax of scores [T, positions] in which `sink` takes part."""
    column = torch.full((len(scores), 1), sink)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[:, :-1]


def received(q: np.ndarray, k: np.ndarray, sight: Sight = EVERYTHING, sinks: np.ndarray | None = None) -> np.ndarray:
    """Return the attention that each token receives from the last HEAVY_HITTER_QUERIES tokens, float32 [T].

    q is [heads, T, d], k is [kv_heads, T, d]. The result is summed over heads and queries.
    """
    tokens = q.shape[1]
    last = min(tokens, HEAVY_HITTER_QUERIES)
    groups = q.shape[0] // k.shape[0]
    queries = torch.from_numpy(q[:, -last:]).reshape(k.shape[0], groups * last, -1)
    scores = queries @ torch.from_numpy(k).transpose(1, 2) / math.sqrt(q.shape[-1])
    mask = causal_mask(tokens, sight)[-last:]
    scores = scores.view(-1, last, tokens).masked_fill(~mask, -math.inf)
    if sinks is not None:
        heads = zip(scores, sinks.tolist(), strict=True)
        return torch.stack([_with_sink(head, sink).sum(dim=0) for head, sink in heads]).sum(dim=0).numpy()
    return scores.softmax(dim=-1).sum(dim=(0, 1)).numpy()


def causal_mask(tokens: int, sight: Sight = EVERYTHING) -> torch.Tensor:
    """Return bool [tokens, tokens], true where the query of a row may attend to the key of a column."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    mask = key <= query
    if sight.window:
        mask &= key > query - sight.window
    if sight.chunk:
        mask &= key // sight.chunk == query // sight.chunk
    return mask


@lru_cache(maxsize=1)  # all layers of a pass share it
def _bias(tokens: int, sight: Sight) -> torch.Tensor:
    """Return `causal_mask` as float32 to add to scores: 0 or -inf."""
    return torch.zeros(tokens, tokens).masked_fill_(~causal_mask(tokens, sight), -math.inf)
