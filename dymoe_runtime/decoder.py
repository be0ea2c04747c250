"""The one decoder: attention and dense layers around routed experts, which are behind a function.

The runtime passes stored experts; the compiler asks for attention, norms and routing alone and
runs the original's experts between them, one after another. Both run the same mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dymoe_runtime import kernels
from dymoe_runtime.errors import importing
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.rope import Rotary
from dymoe_runtime.spec import ModelSpec


@dataclass(slots=True)  # not frozen, which takes longer: one is made for each layer of a decoded token
class Routing:
    """What the router decided for T tokens of one layer."""

    experts: np.ndarray  # int64 [T, k], by falling gate
    gates: np.ndarray  # float32 [T, k]
    residual: np.ndarray  # [T, H], the residual stream that the next layer's router can be asked with
    token_weights: np.ndarray | None = None  # [T], mean 1: importance in a prompt; None if tiers ignore it
    group: int | None = None  # so many tokens of a prompt have their tiers chosen together; None: all
    listed: tuple[list[int], list[float]] | None = None  # experts and gates of a single token, where they are known

    def of_token(self) -> tuple[list[int], list[float]]:
        """Experts and gates of a single token."""
        return self.listed or (self.experts[0].tolist(), self.gates[0].tolist())

    @staticmethod
    def joined(parts: Sequence[Routing], group: int) -> Routing:
        """Of groups of so many tokens, the last of which may be smaller."""
        weights = [part.token_weights for part in parts if part.token_weights is not None]
        return Routing(
            np.concatenate([part.experts for part in parts]),
            np.concatenate([part.gates for part in parts]),
            np.concatenate([part.residual for part in parts]),
            np.concatenate(weights) if weights else None,
            group,
        )


class Dense(Protocol):
    """Weights outside the routed experts, in whatever precision they are kept."""

    def embed(self, ids: np.ndarray) -> np.ndarray: ...  # [T] -> float32 [T, H]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray: ...  # x @ W.T, plus the bias if there is one

    def vector(self, name: str) -> np.ndarray: ...  # float32 [n]


Experts = Callable[[int, np.ndarray, Routing], np.ndarray]


class Step(Protocol):
    """Layers of one token, faster."""

    def run(
        self, layer: int, x: np.ndarray, more: np.ndarray | None, cache: KVCache
    ) -> tuple[int, np.ndarray, tuple[np.ndarray, Routing] | None]:
        """From `layer` on, where x + more comes in, as many whole layers as need nobody else; then one in part.

        Its number, or that of all layers; the residual stream after its attention; and, unless it is a dense layer,
        what its experts are to be asked.
        """

    def guess(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class Decoder:
    """A decoder-only MoE transformer over `dense` weights and an `experts` function."""

    def __init__(self, spec: ModelSpec, dense: Dense, experts: Experts, step: Step | None = None) -> None:
        """With `step`, a single token that continues a cache goes through it; that may do without `experts`."""
        self._step = step
        self.spec = spec
        self.dense = dense
        self.experts = experts
        self._rotary = Rotary(spec.rope, spec.head_dim)

    @np.errstate(over="ignore", invalid="ignore")  # who looks at the results sees what is not finite
    def forward(
        self, ids: np.ndarray, cache: KVCache | None = None, weigh_tokens: bool = False, group: int | None = None
    ) -> np.ndarray:
        """Hidden states [T, H] after all layers of tokens `ids` [T], which continue `cache` if given.

        With `weigh_tokens` the tokens are one prompt chunk and experts see prefill importance. With `group` they
        are chunks of so many, one after another, whose experts are asked for all chunks together: for the results
        of as many calls, what is read for them once.
        """
        x = self.dense.embed(ids)
        if self._step is not None and cache is not None and len(ids) == 1 and not weigh_tokens:
            x = self._decode(self._step, x, cache)
        elif cache is not None and group is not None and len(ids) > group:
            for layer in range(self.spec.num_layers):
                x = self._layer_of_groups(layer, x, cache, weigh_tokens, group)
        else:
            for layer in range(self.spec.num_layers):
                x, weights = self.attend(layer, x, cache, weigh_tokens)
                x = self.feed_forward(layer, x, weights)
        if cache is not None:
            cache.length += len(ids)
        return x

    def _decode(self, step: Step, x: np.ndarray, cache: KVCache) -> np.ndarray:
        layer, more = 0, None
        while layer < self.spec.num_layers:
            layer, x, asked = step.run(layer, x, more, cache)
            more = None
            if asked is not None:
                more = self.experts(layer, *asked)
            elif layer < self.spec.num_layers:
                x = self.feed_forward(layer, x)
            layer += 1
        return x.copy() if more is None else x + more

    def _layer_of_groups(self, layer: int, x: np.ndarray, cache: KVCache, weigh_tokens: bool, group: int) -> np.ndarray:
        start, parts = cache.length, []
        try:
            for rows in in_groups(x, group):
                parts.append(self.attend(layer, rows, cache, weigh_tokens))
                cache.length += len(rows)
        finally:
            cache.length = start
        if layer in self.spec.dense_layers:
            return np.concatenate([self.feed_forward(layer, rows) for rows, _ in parts])
        asked = [self._ask(layer, rows, weights) for rows, weights in parts]
        routing = Routing.joined([routing for _, routing in asked], group)
        return routing.residual + self.experts(layer, np.concatenate([h for h, _ in asked]), routing)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """[T, H] -> float32 [T, vocab]."""
        return self.dense.linear("embed" if self.spec.tie_embeddings else "lm_head", self.norm("norm", x))

    def attend(
        self, layer: int, x: np.ndarray, cache: KVCache | None = None, weigh_tokens: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Residual stream after attention, and the token weights if asked for."""
        start, window = cache.length if cache else 0, self.spec.sliding_window
        q, k, v = self._queries_keys_values(layer, x, start)
        if cache is not None:
            y, mass = kernels.attend(q, k, v, cache, layer, window, weigh_tokens)
        else:
            with importing():
                from dymoe_runtime.attention import attention, received  # imports torch

            y = attention(q, k, v, start, window)
            mass = received(q, k, start, window) if weigh_tokens else None
        weights = None if mass is None else mass / max(mass.sum(), 1e-20) * len(x)
        y = y.transpose(1, 0, 2).reshape(len(x), -1)
        return x + self.dense.linear(f"layers.{layer}.attn.o", y), weights

    def feed_forward(self, layer: int, x: np.ndarray, token_weights: np.ndarray | None = None) -> np.ndarray:
        """Residual stream after the experts (or the dense MLP) of `layer`."""
        if layer in self.spec.dense_layers:
            return x + self._dense_mlp(layer, self.norm(f"layers.{layer}.mlp_norm", x))
        return x + self.experts(layer, *self._ask(layer, x, token_weights))

    def _ask(self, layer: int, x: np.ndarray, token_weights: np.ndarray | None) -> tuple[np.ndarray, Routing]:
        """Normalized x [T, H], and which experts it needs."""
        h = self.norm(f"layers.{layer}.mlp_norm", x)
        experts, gates = self.route(layer, h)
        return h, Routing(experts, gates, x, token_weights)

    def route(self, layer: int, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chosen experts int64 [T, k] and their gates float32 [T, k], by falling gate."""
        return self._choose(self.dense.linear(f"layers.{layer}.router", h))

    def _choose(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return kernels.choose(logits, self.spec.top_k, self.spec.norm_topk)

    def look_ahead(
        self, layer: int, residual: np.ndarray, predictor: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ask the router of `layer` with an earlier layer's residual stream: a guess of `route`.

        `predictor` [experts, H + 1] corrects the router's logits; its last column is a bias. A single token
        goes through `step`, which has been told of the predictor.
        """
        if self._step is not None and len(residual) == 1:
            return self._step.guess(layer, residual)
        h = self.norm(f"layers.{layer}.mlp_norm", residual)
        logits = self.dense.linear(f"layers.{layer}.router", h)
        if predictor is not None:
            logits = logits + kernels.matmul(h, np.ascontiguousarray(predictor[:, :-1])) + predictor[:, -1]
        return self._choose(logits)

    def _dense_mlp(self, layer: int, h: np.ndarray) -> np.ndarray:
        gate, up = (self.dense.linear(f"layers.{layer}.mlp.{name}", h) for name in ("gate", "up"))
        return self.dense.linear(f"layers.{layer}.mlp.down", kernels.activate(gate, up, self.spec.activation))

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return kernels.norm(x, self.dense.vector(name), self.spec.norm_eps)

    def _queries_keys_values(self, layer: int, x: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
        """Rotated queries [heads, T, d] and keys, and values [kv_heads, T, d]."""
        h = self.norm(f"layers.{layer}.attn_norm", x)
        q, k, v = (self.dense.linear(f"layers.{layer}.attn.{name}", h) for name in "qkv")
        if self.spec.qk_norm == "full":
            q, k = self._qk_norm(layer, q, k)
        if self.spec.clip_qkv is not None:
            q, k, v = (t.clip(-self.spec.clip_qkv, self.spec.clip_qkv) for t in (q, k, v))
        q, k, v = (t.reshape(len(x), -1, self.spec.head_dim) for t in (q, k, v))
        if self.spec.qk_norm == "head":
            q, k = self._qk_norm(layer, q, k)
        q, k = self._rotary(q, start), self._rotary(k, start)
        return q.transpose(1, 0, 2), k.transpose(1, 0, 2), v.transpose(1, 0, 2)

    def _qk_norm(self, layer: int, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.norm(f"layers.{layer}.attn.q_norm", q), self.norm(f"layers.{layer}.attn.k_norm", k)


def in_groups(x: np.ndarray, size: int) -> list[np.ndarray]:
    """x in parts of `size` along its first dimension, the last of which may be smaller."""
    return [x[first : first + size] for first in range(0, len(x), size)]
