"""Grouped-query attention in a graph: onnxruntime's operator where it has the options, else standard operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dymoe_compile.export.onnx.blocks import Blocks
from dymoe_compile.export.onnx.graph import CONTRIB
from dymoe_compile.export.onnx.sequence import Sequences
from dymoe_runtime.spec import AttentionSpec

PAST = "past_key_values.{layer}.{part}"
PRESENT = "present.{layer}.{part}"
# What GroupQueryAttention on a CPU wants the columns of a head to be a multiple of, and half of those that turn.
COLUMNS = 8


def is_fused(spec: AttentionSpec) -> bool:
    """Return whether GroupQueryAttention has what a layer needs."""
    return spec.head_dim % COLUMNS == 0 and spec.chunk is None


class Attention:
    """The attention of one layer. Its KV cache comes in as PAST and goes out as PRESENT: [batch, kv_heads, *, d]."""

    def __init__(self, blocks: Blocks, sequences: Sequences, layer: int, spec: AttentionSpec) -> None:
        self._blocks, self._sequences, self._layer, self._spec = blocks, sequences, layer, spec
        self._graph = blocks.graph
        self._fused = is_fused(spec) and not blocks.portable

    def output(self, h: str) -> str:
        """Return what the layer's attention makes of h [tokens, H]."""
        spec, graph = self._spec, self._graph
        q, k, v = self._queries_keys_values(h)
        y = self._by_operator(q, k, v) if self._fused else self._by_parts(q, k, v)
        if spec.gate != "none":
            heads = graph.node("Reshape", y, graph.constant([-1, spec.heads, spec.head_dim]))
            y = graph.node("Mul", heads, self._gate(h))
        y = graph.node("Reshape", y, graph.constant([-1, spec.heads * spec.head_dim]))
        return self._linear("o", y)

    def _queries_keys_values(self, h: str) -> tuple[str, str, str]:
        """Return queries, keys and values, float32 [tokens, heads, d]; rotated, unless the operator does that."""
        spec, graph = self._spec, self._graph
        q, k, v = (self._linear(name, h) for name in "qkv")
        if spec.qk_norm == "full":
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if spec.clip is not None:
            least, most = graph.constant(float(-spec.clip)), graph.constant(float(spec.clip))
            q, k, v = (graph.node("Clip", x, least, most) for x in (q, k, v))
        q, k, v = (graph.node("Reshape", x, graph.constant([0, -1, spec.head_dim])) for x in (q, k, v))
        by_head = spec.qk_norm == "head"
        if by_head and not spec.norm_after_rope:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if spec.value_norm:
            v = self._norm("v_norm", v)
        if spec.rope is not None and not self._rotates:
            angles, dims = self._sequences.angles(spec.rope, spec.head_dim), spec.rope.dims or spec.head_dim
            dims = spec.head_dim if spec.rope.kind == "proportional" else dims
            q, k = (self._blocks.rotated(x, *angles, spec.head_dim, dims) for x in (q, k))
        if by_head and spec.norm_after_rope:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if spec.temperature is not None:
            q = graph.node("Mul", q, self._temperatures(*spec.temperature))
        return q, k, v

    @property
    def _rotates(self) -> bool:
        """Return whether the operator turns queries and keys."""
        rope = self._spec.rope
        if not self._fused or rope is None or self._spec.norm_after_rope:
            return False
        dims = self._spec.head_dim if rope.kind == "proportional" else rope.dims or self._spec.head_dim
        return dims // 2 % COLUMNS == 0

    def _temperatures(self, floor: float, strength: float) -> str:
        """Return the factors of the queries, 1 + strength * log(1 + floor((p + 1) / floor)), float32 [tokens, 1, 1]."""
        graph = self._graph
        one = graph.constant(1.0)
        steps = graph.node("Div", graph.node("Add", self._sequences.positions, one), graph.constant(float(floor)))
        grown = graph.node("Log", graph.node("Add", graph.node("Floor", steps), one))
        factors = graph.node("Add", graph.node("Mul", grown, graph.constant(float(strength))), one)
        return graph.node("Unsqueeze", factors, graph.constant([2]))

    def _by_operator(self, q: str, k: str, v: str) -> str:
        """Return attention by GroupQueryAttention, [batch, new, heads * d]."""
        spec, sequences = self._spec, self._sequences
        sizes = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        inputs = [sequences.split(x, [size]) for x, size in zip((q, k, v), sizes, strict=True)]
        assert spec.rope is not None or not self._rotates
        tables = sequences.tables(spec.rope, spec.head_dim) if self._rotates and spec.rope else ("", "")
        sinks = self._blocks.vector(f"layers.{self._layer}.attn.sinks") if spec.sinks else ""
        inputs += [self._named(PAST, "key"), self._named(PAST, "value"), sequences.lengths, sequences.total]
        attributes: dict[str, Any] = dict(num_heads=spec.heads, kv_num_heads=spec.kv_heads)
        attributes["do_rotary"] = int(self._rotates)
        if spec.window is not None:
            attributes["local_window_size"] = spec.window
        if spec.scale is not None:
            attributes["scale"] = float(spec.scale)
        y = f"layers.{self._layer}.attention"
        outputs = [y, self._named(PRESENT, "key"), self._named(PRESENT, "value")]
        self._graph.named("GroupQueryAttention", outputs, *inputs, *tables, "", "", sinks, domain=CONTRIB, **attributes)
        return y

    def _by_parts(self, q: str, k: str, v: str) -> str:
        """Return attention by standard operators, [batch, new, heads, d]."""
        spec, graph, sequences = self._spec, self._graph, self._sequences
        group = spec.heads // spec.kv_heads
        keys, values = self._joined("key", k), self._joined("value", v)  # [batch, kv_heads, 1, past + new, d]
        q = sequences.split(q, [spec.kv_heads, group, spec.head_dim])
        q = graph.node("Transpose", q, perm=[0, 2, 3, 1, 4])  # [batch, kv_heads, group, new, d]
        scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
        q = self._blocks.scaled(q, scale)
        scores = graph.node("MatMul", q, graph.node("Transpose", keys, perm=[0, 1, 2, 4, 3]))
        scores = graph.node("Add", scores, sequences.mask(spec.window, spec.chunk))
        y = graph.node("MatMul", self._shares(scores), values)
        return graph.node("Transpose", y, perm=[0, 3, 1, 2, 4])

    def _joined(self, part: str, new: str) -> str:
        """Put new rows [tokens, kv_heads, d] behind the KV cache; return all, [batch, kv_heads, 1, past + new, d]."""
        spec, graph = self._spec, self._graph
        rows = graph.node("Transpose", self._sequences.split(new, [spec.kv_heads, spec.head_dim]), perm=[0, 2, 1, 3])
        present = self._named(PRESENT, part)
        graph.named("Concat", [present], self._named(PAST, part), rows, axis=2)
        return graph.node("Unsqueeze", present, graph.constant([2]))

    def _shares(self, scores: str) -> str:
        """Return the softmax over positions, in which the sinks take part; shaped like scores."""
        graph, spec = self._graph, self._spec
        if not spec.sinks:
            return graph.node("Softmax", scores, axis=-1)
        heads = np.array([1, spec.kv_heads, spec.heads // spec.kv_heads, 1, 1], np.int64)
        sinks = graph.node("Reshape", self._blocks.vector(f"layers.{self._layer}.attn.sinks"), graph.constant(heads))
        first = graph.node("Slice", scores, graph.constant([0]), graph.constant([1]), graph.constant([-1]))
        column = graph.node("Expand", sinks, graph.node("Shape", first))
        shares = graph.node("Softmax", graph.node("Concat", column, scores, axis=-1), axis=-1)
        return self._blocks.columns(shares, 1, 2**31 - 1)

    def _gate(self, h: str) -> str:
        """Return the factors of the outputs, [tokens, heads, d], or [tokens, heads, 1] for a gate of heads."""
        graph = self._graph
        logits = graph.node("Reshape", self._linear("gate", h), graph.constant([0, self._spec.heads, -1]))
        return graph.node("Softplus" if self._spec.gate_activation == "softplus" else "Sigmoid", logits)

    def _linear(self, name: str, x: str) -> str:
        return self._blocks.linear(f"layers.{self._layer}.attn.{name}", x)

    def _norm(self, name: str, x: str) -> str:
        return self._blocks.rms_norm(x, self._blocks.vector(f"layers.{self._layer}.attn.{name}"))

    def _named(self, pattern: str, part: str) -> str:
        return pattern.format(layer=self._layer, part=part)
