"""The one decoder: attention and dense layers around routed experts, which are behind a function.

The runtime passes stored experts; the compiler asks for attention, norms and routing alone and
runs the original's experts between them, one after another. Both run the same mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from dymoe_runtime import kernels
from dymoe_runtime.activations import ACTIVATIONS
from dymoe_runtime.rope import Rotary
from dymoe_runtime.spec import ModelSpec

# Queries at the end of a prompt whose attention decides which of its tokens weigh most.
HEAVY_HITTER_QUERIES = 32


@dataclass(frozen=True)
class Routing:
    """What the router decided for T tokens of one layer."""

    experts: torch.Tensor  # int64 [T, k], by falling gate
    gates: torch.Tensor  # float32 [T, k]
    residual: torch.Tensor  # [T, H], the residual stream that the next layer's router can be asked with
    token_weights: torch.Tensor | None = None  # [T], mean 1: importance in a prompt; None if tiers ignore it


class Dense(Protocol):
    """Weights outside the routed experts, in whatever precision they are kept."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor: ...  # [T] -> float32 [T, H]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor: ...  # x @ W.T, plus the bias if there is one

    def vector(self, name: str) -> torch.Tensor: ...  # float32 [n]


Experts = Callable[[int, torch.Tensor, Routing], torch.Tensor]


class Step(Protocol):
    """`attend` and `route` of the decoder for one token, faster."""

    def attend(self, layer: int, x: torch.Tensor, cache: KVCache) -> torch.Tensor: ...

    def route(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, Routing]: ...


class KVCache:
    """Keys and values of one sequence, float32 [layers, kv_heads, capacity, head_dim]."""

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        shape = (spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim)
        self.keys = torch.empty(shape)
        self.values = torch.empty(shape)
        self.capacity = capacity
        self.length = 0
        # Of each layer's keys and values, for compiled code; and the capacity.
        self.addresses = [(k.data_ptr(), v.data_ptr(), capacity) for k, v in zip(self.keys, self.values, strict=True)]

    @staticmethod
    def bytes_needed(spec: ModelSpec, capacity: int) -> int:
        return 2 * 4 * spec.num_layers * spec.num_kv_heads * capacity * spec.head_dim


class Decoder:
    """A decoder-only MoE transformer over `dense` weights and an `experts` function."""

    def __init__(self, spec: ModelSpec, dense: Dense, experts: Experts, step: Step | None = None) -> None:
        """With `step`, a single token that continues a cache goes through it."""
        self._step = step
        self.spec = spec
        self.dense = dense
        self.experts = experts
        self._rotary = Rotary(spec.rope, spec.head_dim)
        self._activation = ACTIVATIONS[spec.activation]
        self._mask_of: tuple[int, int, int | None] = (0, 0, None)
        self._mask = torch.empty(0)

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None, weigh_tokens: bool = False) -> torch.Tensor:
        """Hidden states [T, H] after all layers of tokens `ids` [T], which continue `cache` if given.

        With `weigh_tokens` the tokens are one prompt chunk and experts see prefill importance.
        """
        x = self.dense.embed(ids)
        if self._step is not None and cache is not None and len(ids) == 1 and not weigh_tokens:
            x = self._decode(self._step, x, cache)
        else:
            for layer in range(self.spec.num_layers):
                x, weights = self.attend(layer, x, cache, weigh_tokens)
                x = self.feed_forward(layer, x, weights)
        if cache is not None:
            cache.length += len(ids)
        return x

    def _decode(self, step: Step, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        for layer in range(self.spec.num_layers):
            x = step.attend(layer, x, cache)
            if layer in self.spec.dense_layers:
                x = self.feed_forward(layer, x)
            else:
                h, routing = step.route(layer, x)
                x = x + self.experts(layer, h, routing)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> float32 [T, vocab]."""
        return self.dense.linear("embed" if self.spec.tie_embeddings else "lm_head", self.norm("norm", x))

    def attend(
        self, layer: int, x: torch.Tensor, cache: KVCache | None = None, weigh_tokens: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Residual stream after attention, and the token weights if asked for."""
        start = cache.length if cache else 0
        q, k, v = self._queries_keys_values(layer, x, start)
        if cache is not None:
            stop = start + len(x)
            cache.keys[layer, :, start:stop] = k
            cache.values[layer, :, start:stop] = v
            k, v = cache.keys[layer, :, :stop], cache.values[layer, :, :stop]
        y = self._attention(q, k, v, start)
        y = y.transpose(0, 1).reshape(len(x), -1)
        weights = self._token_weights(q, k, start) if weigh_tokens else None
        return x + self.dense.linear(f"layers.{layer}.attn.o", y), weights

    def feed_forward(self, layer: int, x: torch.Tensor, token_weights: torch.Tensor | None = None) -> torch.Tensor:
        """Residual stream after the experts (or the dense MLP) of `layer`."""
        h = self.norm(f"layers.{layer}.mlp_norm", x)
        if layer in self.spec.dense_layers:
            return x + self._dense_mlp(layer, h)
        experts, gates = self.route(layer, h)
        return x + self.experts(layer, h, Routing(experts, gates, x, token_weights))

    def route(self, layer: int, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts int64 [T, k] and their gates float32 [T, k], by falling gate."""
        return self._choose(self.dense.linear(f"layers.{layer}.router", h))

    def _choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = logits.softmax(dim=-1)
        gates, experts = probabilities.topk(self.spec.top_k, dim=-1)
        if self.spec.norm_topk:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return experts, gates

    def look_ahead(
        self, layer: int, residual: torch.Tensor, predictor: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the router of `layer` with an earlier layer's residual stream: a guess of `route`.

        `predictor` [experts, H + 1] corrects the router's logits; its last column is a bias.
        """
        h = self.norm(f"layers.{layer}.mlp_norm", residual)
        logits = self.dense.linear(f"layers.{layer}.router", h)
        if predictor is not None:
            logits = logits + F.linear(h, predictor[:, :-1], predictor[:, -1])
        return self._choose(logits)

    def _dense_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        gate = self._activation(self.dense.linear(f"layers.{layer}.mlp.gate", h))
        return self.dense.linear(f"layers.{layer}.mlp.down", gate * self.dense.linear(f"layers.{layer}.mlp.up", h))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return kernels.norm(x, self.dense.vector(name), self.spec.norm_eps)

    def _queries_keys_values(self, layer: int, x: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        """Rotated queries [heads, T, d] and keys, and values [kv_heads, T, d]."""
        h = self.norm(f"layers.{layer}.attn_norm", x)
        q, k, v = (self.dense.linear(f"layers.{layer}.attn.{name}", h) for name in "qkv")
        if self.spec.qk_norm == "full":
            q, k = self._qk_norm(layer, q, k)
        if self.spec.clip_qkv is not None:
            q, k, v = (t.clamp(-self.spec.clip_qkv, self.spec.clip_qkv) for t in (q, k, v))
        q, k, v = (t.view(len(x), -1, self.spec.head_dim) for t in (q, k, v))
        if self.spec.qk_norm == "head":
            q, k = self._qk_norm(layer, q, k)
        q, k = self._rotary(q, start), self._rotary(k, start)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def _qk_norm(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norm(f"layers.{layer}.attn.q_norm", q), self.norm(f"layers.{layer}.attn.k_norm", k)

    def _attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
        """Causal attention of q [heads, T, d] at positions start.. over k, v [kv_heads, start + T, d]."""
        window = self.spec.sliding_window
        if window and k.shape[1] <= window:
            window = None
        mask = None
        if q.shape[1] == 1:
            if window:
                k, v = k[:, -window:], v[:, -window:]
        elif window or start:
            mask = self._causal(start, q.shape[1], window)
        causal = mask is None and q.shape[1] > 1
        y = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=causal, enable_gqa=q.shape[0] != k.shape[0]
        )
        return y[0]

    def _causal(self, start: int, tokens: int, window: int | None) -> torch.Tensor:
        """causal_mask to be added to scores, float32; made once for all layers."""
        if self._mask_of != (start, tokens, window):
            hidden = ~causal_mask(start, tokens, window)
            self._mask = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)
            self._mask_of = (start, tokens, window)
        return self._mask

    def _token_weights(self, q: torch.Tensor, k: torch.Tensor, start: int) -> torch.Tensor:
        """Attention that each token of this chunk receives from its last queries, [T], mean 1."""
        tokens = q.shape[1]
        last = min(tokens, HEAVY_HITTER_QUERIES)
        groups = q.shape[0] // k.shape[0]
        q = q[:, -last:].reshape(k.shape[0], groups * last, -1)
        scores = q @ k.transpose(1, 2) / math.sqrt(self.spec.head_dim)
        mask = causal_mask(start + tokens - last, last, self.spec.sliding_window)
        scores = scores.view(-1, last, k.shape[1]).masked_fill(~mask, -math.inf)
        received = scores.softmax(dim=-1).sum(dim=(0, 1))[start:]
        return received / received.sum().clamp_min(1e-20) * tokens


def causal_mask(start: int, tokens: int, window: int | None) -> torch.Tensor:
    """bool [tokens, start + tokens], true where a query at position start + i may look."""
    query = torch.arange(start, start + tokens)[:, None]
    key = torch.arange(start + tokens)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window else mask
