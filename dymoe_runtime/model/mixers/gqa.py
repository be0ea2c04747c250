"""Grouped-query attention (arXiv 2305.13245) with its options: `AttentionSpec` describes them."""

from __future__ import annotations

import math

import numpy as np

from dymoe_runtime.kernels.attention_reference import Sight
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.kernels.kv_cache import KVCache
from dymoe_runtime.model.mixer import Dense, WholeAttention
from dymoe_runtime.model.rope import rotary
from dymoe_runtime.spec import AttentionSpec

# Bits of keys and values in the temporary cache of tokens without a state.
WHOLE_BITS = 32


class AttentionState:
    """A KV cache. Later tokens overwrite the rows after the sequence's end, so cutting needs no work here."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def truncate(self, length: int) -> bool:
        return True

    def snapshot(self) -> None:
        return None

    def rollback(self, snapshot: None) -> None:
        pass

    def used(self, length: int) -> list[np.ndarray]:
        return [rows[:length] for heads in self.cache.rows for rows in heads]


class GroupedQueryAttention:
    """The attention of one layer."""

    def __init__(
        self, spec: AttentionSpec, prefix: str, dense: Dense, kernels: Kernels, whole: WholeAttention | None, eps: float
    ) -> None:
        self._spec, self._prefix, self._dense = spec, prefix, dense
        self._kernels, self._whole, self._eps = kernels, whole, eps
        self._rotary = None if spec.rope is None else rotary(spec.rope, spec.head_dim)

    @staticmethod
    def state_bytes(spec: AttentionSpec, capacity: int, kv_bits: int) -> int:
        return KVCache.bytes_needed(spec.kv_heads, spec.head_dim, capacity, kv_bits)

    @staticmethod
    def make_state(spec: AttentionSpec, memory: np.ndarray, capacity: int, kv_bits: int) -> AttentionState:
        return AttentionState(KVCache(memory, spec.kv_heads, spec.head_dim, capacity, kv_bits))

    @staticmethod
    def workspace_bytes(spec: AttentionSpec, kernels: Kernels, tokens: int, context: int) -> int:
        """Return the bytes of queries, keys and values, twice each and as wide as queries, plus those of attention.

        A gate is one more of them, twice.
        """
        rows = 4 * tokens * (6 + 2 * (spec.gate != "none")) * spec.heads * spec.head_dim
        return rows + kernels.attention_bytes(spec.heads, spec.kv_heads, spec.head_dim, tokens, context)

    def forward(
        self, h: np.ndarray, state: AttentionState | None, start: int, weigh: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        spec = self._spec
        q, k, v = self._queries_keys_values(h, start, len(h) if state is None else state.cache.capacity)
        sinks = self._dense.vector(f"{self._prefix}attn.sinks") if spec.sinks else None
        if state is None and self._whole is not None:
            y, received = self._whole(q, k, v, Sight(spec.window, spec.chunk), weigh, sinks)
        else:
            cache = self._cache_of(len(h)) if state is None else state.cache
            sight = (spec.window, weigh, sinks, spec.chunk)
            y, received = self._kernels.attend(q, k, v, cache, start, *sight, self._dense.pause)
        y = y.transpose(1, 0, 2)
        if spec.gate != "none":
            y = y * self._gate(h)
        return self._linear("o", y.reshape(len(h), -1)), received

    def _cache_of(self, tokens: int) -> KVCache:
        """Return a temporary cache with WHOLE_BITS bits, for tokens without a state."""
        memory = np.zeros(self.state_bytes(self._spec, tokens, WHOLE_BITS), np.uint8)
        return KVCache(memory, self._spec.kv_heads, self._spec.head_dim, tokens, WHOLE_BITS)

    def _queries_keys_values(self, h: np.ndarray, start: int, context: int) -> tuple[np.ndarray, ...]:
        """Return rotated queries [heads, T, d], rotated keys [kv_heads, T, d] and values [kv_heads, T, d].

        `context` is the longest that the sequence may become.
        """
        spec = self._spec
        q, k, v = (self._linear(name, h) for name in "qkv")
        if spec.qk_norm == "full":
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if spec.clip is not None:
            q, k, v = (t.clip(-spec.clip, spec.clip) for t in (q, k, v))
        q, k, v = (t.reshape(len(h), -1, spec.head_dim) for t in (q, k, v))
        if spec.qk_norm == "head" and not spec.norm_after_rope:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if spec.value_norm:
            v = self._norm("v_norm", v)
        if self._rotary is not None:
            table = self._rotary.table(start, start + len(h), context)
            q, k = self._kernels.rotate(q, *table), self._kernels.rotate(k, *table)
        if spec.qk_norm == "head" and spec.norm_after_rope:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if (scale := query_scale(spec, start, len(h))) is not None:
            q = q * scale[:, None, None]
        return q.transpose(1, 0, 2), k.transpose(1, 0, 2), v.transpose(1, 0, 2)

    def _gate(self, h: np.ndarray) -> np.ndarray:
        """Return the factors of the outputs, float32 [T, heads, d], or [T, heads, 1] for a gate of heads."""
        logits = self._linear("gate", h).reshape(len(h), self._spec.heads, -1)
        if self._spec.gate_activation == "softplus":
            softplus: np.ndarray = np.logaddexp(0, logits).astype(np.float32)
            return softplus
        with np.errstate(over="ignore"):
            y: np.ndarray = 1 / (1 + np.exp(-logits))
        return y

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self._dense.linear(f"{self._prefix}attn.{name}", x)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return self._kernels.norm(x, self._dense.vector(f"{self._prefix}attn.{name}"), self._eps)


def query_scale(spec: AttentionSpec, start: int, tokens: int) -> np.ndarray | None:
    """Return the factors of the queries of `tokens` from position `start` on, float32 [T], or None if all are 1.

    Attention divides scores by sqrt(head_dim), so another scale of the scores is a factor of the queries.
    """
    if spec.scale is None and spec.temperature is None:
        return None
    factor = 1.0 if spec.scale is None else spec.scale * math.sqrt(spec.head_dim)
    scale = np.full(tokens, factor, np.float32)
    if spec.temperature is not None:
        floor, strength = spec.temperature
        positions = np.arange(start, start + tokens, dtype=np.float32)
        scale *= 1 + np.float32(strength) * np.log1p(np.floor((positions + 1) / np.float32(floor)))
    return scale
