"""Parts of a graph that all layers are made of: products, embeddings, norms, activations, rotations."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from dymoe_compile.export.matrices import Format, WholeNumbers, grown, packed
from dymoe_compile.export.onnx.graph import CONTRIB, Graph
from dymoe_compile.export.source import Source
from dymoe_runtime.spec import clamped_parameters, is_exact


class Blocks:
    """Adds parts to a graph, with weights of `source`.

    Hidden states are float32 [tokens, width], where tokens are those of all sequences of a batch. With `portable`, all
    operators are standard ones; otherwise those that onnxruntime has contributed are used where they are faster.
    """

    def __init__(self, graph: Graph, source: Source, portable: bool) -> None:
        self.graph, self.source, self.portable = graph, source, portable
        self.spec = source.spec
        self._shapes = source.spec.tensor_shapes()

    def vector(self, name: str) -> str:
        """Return a tensor that stays float32."""
        if not self.graph.has(name):
            self.graph.store(name, np.ascontiguousarray(self.source.vector(name), np.float32))
        return name

    def linear(self, name: str, x: str) -> str:
        """Return x @ W.T, plus the bias of the matrix `name` if it has one."""
        bias = self.vector(f"{name}_bias") if f"{name}_bias" in self._shapes else ""
        if is_exact(name):
            return self.graph.node("Gemm", x, self.vector(name), bias, transB=1)
        form = self._stored(name)
        if not form.is_whole or self.portable:
            return self.graph.node("Gemm", x, self._float_matrix(name, form), bias, transB=1)
        rows, cols = self._shapes[name]
        scales = f"{name}.scales"
        attributes = dict(N=rows, K=cols, bits=form.bits, block_size=form.block)
        return self.graph.node(
            "MatMulNBits", x, self._blocked(name, form), scales, "", "", bias, domain=CONTRIB, **attributes
        )

    def embed(self, name: str, ids: str) -> str:
        """Return the rows `ids` [tokens] of the matrix `name`, float32 [tokens, cols]."""
        form, (_, cols) = self._stored(name), self._shapes[name]
        graph = self.graph
        if not form.is_whole:
            rows = graph.node("Gather", name, ids)
            return rows if form.bits == 32 else graph.node("Cast", rows, to=TensorProto.FLOAT)
        if self.portable:
            codes, scales = graph.node("Gather", name, ids), graph.node("Gather", f"{name}.scales", ids)
            return graph.node("DequantizeLinear", codes, scales, axis=1, block_size=form.block)
        attributes = dict(bits=form.bits, block_size=form.block, gather_axis=0, quantize_axis=1)
        rows = graph.node("GatherBlockQuantized", name, ids, f"{name}.scales", domain=CONTRIB, **attributes)
        return self.columns(rows, 0, cols) if form.padded(cols) != cols else rows

    def _float_matrix(self, name: str, form: Format) -> str:
        """Return a stored matrix as float32 [rows, cols]."""
        if form.bits == 32:
            return name
        if not form.is_whole:
            return self.graph.node("Cast", name, to=TensorProto.FLOAT)
        return self.graph.node("DequantizeLinear", name, f"{name}.scales", axis=1, block_size=form.block)

    def _blocked(self, name: str, form: Format) -> str:
        """Return the codes of a stored matrix in the shape that MatMulNBits takes: [rows, blocks, bytes]."""
        view = f"{name}.blocks"
        if not self.graph.has(view):
            rows, cols = self._shapes[name]
            self.graph.view(view, name, (rows, form.blocks(cols), form.block * form.bits // 8))
        return view

    def _stored(self, name: str) -> Format:
        """Put a dense matrix and its scales into the file of weights, once; return its format."""
        form = self.source.dense_form(name)
        if self.graph.has(name):
            return form
        rows, cols = self._shapes[name]
        wide = cols if self.portable else form.padded(cols)
        dtype = _code_dtype(form, self.portable)
        codes = self.graph.writer(name, dtype, (rows, wide))
        scales = self.graph.writer(f"{name}.scales", np.float32, (rows, form.blocks(cols))) if form.is_whole else None
        for part in self.source.dense(name):
            if isinstance(part, WholeNumbers):
                assert scales is not None
                filled = grown(part, form, (len(part.codes), wide))
                assert isinstance(filled, WholeNumbers)
                codes.append(as_stored(filled.codes, form, self.portable))
                scales.append(part.scales)
            else:
                codes.append(part)
        return form

    def rms_norm(self, x: str, weight: str) -> str:
        """Return x divided by its root mean square over the last dimension, times `weight` if it is not empty."""
        graph = self.graph
        square = graph.node("ReduceMean", graph.node("Pow", x, graph.constant(2.0)), graph.constant([-1]), keepdims=1)
        root = graph.node("Sqrt", graph.node("Add", square, graph.constant(float(self.spec.norm_eps))))
        normed = graph.node("Div", x, root)
        return graph.node("Mul", normed, weight) if weight else normed

    def norm(self, name: str, x: str) -> str:
        """Return x normalized with the weights called `name`, as the model's norms do."""
        return self._normalized(x, self.vector(name), name)

    def norm_without_weights(self, x: str) -> str:
        """Return x normalized without weights."""
        return self._normalized(x, self.graph.constant(np.ones(self.spec.hidden_size, np.float32)), "")

    def _normalized(self, x: str, weight: str, name: str) -> str:
        if self.spec.norm == "rms":
            return self.rms_norm(x, weight)
        bias = self.vector(f"{name}_bias") if name and self.spec.norm == "layer_bias" else ""
        return self.graph.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=float(self.spec.norm_eps))

    def scaled(self, x: str, factor: float) -> str:
        """Return x times a number, or x itself if that is 1."""
        return x if factor == 1 else self.graph.node("Mul", x, self.graph.constant(float(factor)))

    def softcapped(self, x: str, cap: float) -> str:
        """Return cap * tanh(x / cap), or x itself if `cap` is 0."""
        if not cap:
            return x
        limit = self.graph.constant(float(cap))
        return self.graph.node("Mul", self.graph.node("Tanh", self.graph.node("Div", x, limit)), limit)

    def columns(self, x: str, first: int, stop: int) -> str:
        """Return the columns [first, stop) of the last dimension."""
        constant = self.graph.constant
        return self.graph.node("Slice", x, constant([first]), constant([stop]), constant([-1]))

    def mlp(self, name: str, x: str) -> str:
        """Return the output of a dense MLP."""
        gate, up = (self.linear(f"{name}.{part}", x) for part in ("gate", "up"))
        return self.linear(f"{name}.down", gated(self.graph, self.spec.activation, gate, up))

    def rotated(self, x: str, cosines: str, sines: str, head_dim: int, dims: int) -> str:
        """Return heads x [tokens, heads, head_dim] whose first `dims` columns turn.

        Columns i and i + dims / 2 turn together. cosines and sines are [tokens, dims / 2].
        """
        graph, half = self.graph, dims // 2
        parts = [half, half] if dims == head_dim else [half, half, head_dim - dims]
        first, second, *rest = graph.nodes("Split", len(parts), x, graph.constant(parts), axis=-1)
        cosines, sines = (graph.node("Unsqueeze", table, graph.constant([1])) for table in (cosines, sines))
        left = graph.node("Sub", graph.node("Mul", first, cosines), graph.node("Mul", second, sines))
        right = graph.node("Add", graph.node("Mul", second, cosines), graph.node("Mul", first, sines))
        return graph.node("Concat", left, right, *rest, axis=-1)


def as_stored(codes: np.ndarray, form: Format, portable: bool) -> np.ndarray:
    """Return codes as the file holds them: packed and, for DequantizeLinear of 8 bits, less their zero."""
    if portable and form.bits == 8:
        return (codes ^ np.uint8(form.zero)).view(np.int8)
    return packed(codes, form.bits)


def _code_dtype(form: Format, portable: bool) -> type[np.generic]:
    if form.bits > 8:
        return np.float32 if form.bits == 32 else np.uint16
    return np.int8 if portable and form.bits == 8 else np.uint8


def gated(graph: Graph, activation: str, gate: str, up: str) -> str:
    """Return act(gate) * up, or what `clamped_swiglu` of spec.py says."""
    clamped = clamped_parameters(activation)
    if clamped is None:
        return graph.node("Mul", _activated(graph, activation, gate), up)
    alpha, limit = clamped
    gate = graph.node("Clip", gate, "", graph.constant(float(limit)))
    up = graph.node("Clip", up, graph.constant(float(-limit)), graph.constant(float(limit)))
    sigmoid = graph.node("Sigmoid", graph.node("Mul", gate, graph.constant(float(alpha))))
    up = graph.node("Add", up, graph.constant(1.0))
    return graph.node("Mul", graph.node("Mul", gate, sigmoid), up)


def _activated(graph: Graph, activation: str, x: str) -> str:
    if activation == "silu":
        return graph.node("Mul", x, graph.node("Sigmoid", x))
    return graph.node("Gelu", x, approximate="none" if activation == "gelu" else "tanh")
