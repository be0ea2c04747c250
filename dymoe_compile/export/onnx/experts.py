"""Routed experts in a graph: onnxruntime's operators QMoE and MoE, or a loop over the chosen experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from dymoe_compile.export.matrices import Format, Rows, WholeNumbers, grown
from dymoe_compile.export.onnx.blocks import Blocks, as_stored, gated
from dymoe_compile.export.onnx.graph import CONTRIB, Graph, TensorWriter, value
from dymoe_compile.export.onnx.routing import RouterGraph, is_plain
from dymoe_compile.export.source import Expert
from dymoe_runtime.spec import ModelSpec, clamped_parameters


def is_fused(spec: ModelSpec, form: Format) -> bool:
    """Return whether one operator has what the experts of a model need."""
    gates = spec.activation == "silu" or clamped_parameters(spec.activation) is not None
    return gates and (form.is_whole or is_plain(spec.moe.router))


class ExpertsGraph:
    """The routed experts of one layer.

    Their matrices are two stacks: `gate_up` [experts, 2 I, H], with rows of gate and up in turn, and `down`
    [experts, H, I].
    """

    def __init__(self, blocks: Blocks, layer: int) -> None:
        self._blocks, self._graph, self._spec = blocks, blocks.graph, blocks.spec
        self._layer, self._form = layer, blocks.source.expert_form
        self._fused = is_fused(blocks.spec, self._form) and not blocks.portable
        self._router = RouterGraph(blocks, layer)
        hidden, width = self._spec.hidden_size, self._spec.expert_width
        # QMoE takes whole blocks only. What is added is zero.
        self._hidden, self._width = (self._form.padded(n) if self._fused else n for n in (hidden, width))

    def output(self, h: str, router_input: str) -> str:
        """Return the weighted sum of the experts' outputs for h [tokens, H]; the router reads `router_input`."""
        self._store()
        logits = self._router.logits(router_input)
        if self._fused and is_plain(self._spec.moe.router):
            return self._by_operator(h, logits, "")
        experts, weights = self._router.choose(logits)
        if self._spec.moe.router.scales_input:
            h = self._graph.node("Mul", h, weights)
            weights = self._graph.filled(weights, 1.0)
        if self._fused:
            return self._by_operator(h, *self._router.scattered(experts, weights, logits))
        return self._by_loop(h, experts, weights)

    def _store(self) -> None:
        """Write the stacks, one expert after another."""
        experts, hidden, width = self._spec.num_experts, self._hidden, self._width
        gate_up = self._stack("gate_up", (experts, 2 * width, hidden))
        down = self._stack("down", (experts, hidden, width))
        biases = {}
        if self._spec.expert_vectors:
            sizes = {"gate_up_bias": 2 * width, "down_bias": hidden}
            biases = {n: self._graph.writer(self._name(n), np.float32, (experts, size)) for n, size in sizes.items()}
        for expert in self._blocks.source.experts(self._layer):
            self._append(gate_up, _interleaved(*(self._grown(expert, name) for name in ("gate", "up"))))
            self._append(down, self._grown(expert, "down"))
            if biases:
                gate, up = (_longer(expert.vectors[f"{name}_bias"], width) for name in ("gate", "up"))
                biases["gate_up_bias"].append(np.stack([gate, up], axis=1).reshape(-1))
                biases["down_bias"].append(_longer(expert.vectors["down_bias"], hidden))

    def _stack(self, name: str, shape: tuple[int, int, int]) -> list[TensorWriter]:
        """Add a stack of matrices and, of whole numbers, their scales; return the writers."""
        form = self._form
        if not form.is_whole:
            return [self._graph.writer(self._name(name), np.float32, shape)]
        dtype = np.int8 if self._blocks.portable and form.bits == 8 else np.uint8
        codes = (*shape[:2], shape[2] * form.bits // 8)
        scales = (*shape[:2], form.blocks(shape[2]))
        return [
            self._graph.writer(self._name(name), dtype, codes),
            self._graph.writer(self._name(f"{name}.scales"), np.float32, scales),
        ]

    def _append(self, writers: list[TensorWriter], rows: Rows) -> None:
        if isinstance(rows, WholeNumbers):
            writers[0].append(as_stored(rows.codes, self._form, self._blocks.portable))
            writers[1].append(rows.scales)
        else:
            writers[0].append(rows)

    def _grown(self, expert: Expert, name: str) -> Rows:
        shape = (self._hidden, self._width) if name == "down" else (self._width, self._hidden)
        return grown(expert.matrices[name], self._form, shape)

    def _by_operator(self, h: str, scores: str, weights: str) -> str:
        """Return the experts' outputs by QMoE or MoE.

        Without `weights`, `scores` are logits, whose softmax over the chosen experts are the weights. Otherwise the
        experts of the highest scores are chosen, and `weights` [tokens, experts] are theirs.
        """
        graph, spec, hidden = self._graph, self._spec, self._spec.hidden_size
        if self._hidden != hidden:
            pads = graph.constant([0, 0, 0, self._hidden - hidden])
            h = graph.node("Pad", h, pads)
        names = self._name("gate_up"), self._name("down")
        biases = [self._name(f"{name}_bias") if spec.expert_vectors else "" for name in ("gate_up", "down")]
        attributes = self._attributes(normalized=not weights)
        if self._form.is_whole:
            stacks = [x for name, bias in zip(names, biases, strict=True) for x in (name, f"{name}.scales", bias)]
            form = dict(expert_weight_bits=self._form.bits, block_size=self._form.block)
            y = graph.node("QMoE", h, scores, *stacks, *[""] * 6, weights, domain=CONTRIB, **attributes, **form)
        else:
            stacks = [x for pair in zip(names, biases, strict=True) for x in pair]
            y = graph.node("MoE", h, scores, *stacks, domain=CONTRIB, **attributes)
        return self._blocks.columns(y, 0, hidden) if self._hidden != hidden else y

    def _attributes(self, normalized: bool) -> dict[str, Any]:
        clamped = clamped_parameters(self._spec.activation)
        alpha, limit = clamped or (1.0, None)
        return {
            "k": self._spec.top_k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": alpha,
            "activation_beta": 0.0 if clamped is None else 1.0,
            "normalize_routing_weights": int(normalized),
            **({} if limit is None else {"swiglu_limit": limit}),
        }

    def _by_loop(self, h: str, experts: str, weights: str) -> str:
        """Return the experts' outputs by a loop over the experts that any token has chosen."""
        graph = self._graph
        used, *_ = graph.nodes("Unique", 1, graph.node("Reshape", experts, graph.constant([-1])), sorted=1)
        nothing = graph.filled(h, 0.0)
        body = graph.body()
        number, going, so_far = (f"layers.{self._layer}.{name}" for name in ("number", "going", "so_far"))
        body.named("Identity", [f"{going}.next"], going)
        body.named("Identity", [f"{so_far}.next"], self._with_expert(body, used, number, so_far, h, experts, weights))
        shape: list[int | str] = ["tokens", self._spec.hidden_size]
        inputs = [value(number, TensorProto.INT64, []), value(going, TensorProto.BOOL, [])]
        inputs.append(value(so_far, TensorProto.FLOAT, shape))
        outputs = [value(f"{going}.next", TensorProto.BOOL, []), value(f"{so_far}.next", TensorProto.FLOAT, shape)]
        inner = body.finished(f"layers.{self._layer}.expert", inputs, outputs)
        true = graph.constant(np.array(True))
        return graph.node("Loop", graph.node("Size", used), true, nothing, body=inner)

    def _with_expert(self, body: Graph, used: str, number: str, so_far: str, h: str, experts: str, weights: str) -> str:
        """Return `so_far` [tokens, H] with the weighted output of the expert `used[number]` added."""
        expert = body.node("Gather", used, number)
        chosen = body.node("Cast", body.node("Equal", experts, expert), to=TensorProto.FLOAT)  # [tokens, k]
        share = body.node("ReduceSum", body.node("Mul", chosen, weights), body.constant([1]), keepdims=1)
        taken = body.node("ReduceMax", chosen, body.constant([1]), keepdims=0)
        rows = body.node("Transpose", body.node("NonZero", taken), perm=[1, 0])  # [rows, 1]
        flat = body.node("Reshape", rows, body.constant([-1]))
        x, share = (body.node("Gather", source, flat) for source in (h, share))
        y = body.node("Mul", self._mlp(body, expert, x), share)
        return body.node("ScatterND", so_far, rows, y, reduction="add")

    def _mlp(self, body: Graph, expert: str, x: str) -> str:
        """Return the output [rows, H] of an expert for x [rows, H]."""
        both = self._product(body, "gate_up", expert, x)
        halves = body.node("Reshape", both, body.constant([-1, self._width, 2]))
        gate, up = (body.node("Gather", halves, body.constant(np.array(i, np.int64)), axis=2) for i in (0, 1))
        return self._product(body, "down", expert, gated(body, self._spec.activation, gate, up))

    def _product(self, body: Graph, name: str, expert: str, x: str) -> str:
        weight = self._matrix(body, name, expert)
        bias = ""
        if self._spec.expert_vectors:
            bias = body.node("Gather", self._name(f"{name}_bias"), expert)
        return body.node("Gemm", x, weight, bias, transB=1)

    def _matrix(self, body: Graph, name: str, expert: str) -> str:
        """Return a matrix of an expert as float32 [rows, cols]."""
        codes = body.node("Gather", self._name(name), expert)
        if not self._form.is_whole:
            return codes
        scales = body.node("Gather", self._name(f"{name}.scales"), expert)
        zero = ""
        if self._form.bits == 4:
            cols = self._width if name == "down" else self._hidden
            codes = _unpacked(body, codes, cols)
            zero = body.node("Expand", body.constant(np.array(self._form.zero, np.uint8)), body.node("Shape", scales))
        return body.node("DequantizeLinear", codes, scales, zero, axis=1, block_size=self._form.block)

    def _name(self, name: str) -> str:
        return f"layers.{self._layer}.experts.{name}"


def _unpacked(body: Graph, pairs: str, cols: int) -> str:
    """Return codes uint8 [rows, cols] of bytes [rows, cols / 2] that hold two each, the first in the low bits."""
    low = body.node("BitwiseAnd", pairs, body.constant(np.array(15, np.uint8)))
    high = body.node("BitShift", pairs, body.constant(np.array(4, np.uint8)), direction="RIGHT")
    both = [body.node("Unsqueeze", half, body.constant([2])) for half in (low, high)]
    return body.node("Reshape", body.node("Concat", *both, axis=2), body.constant([0, cols]))


def _interleaved(gate: Rows, up: Rows) -> Rows:
    """Return the rows of gate and up in turn."""
    if isinstance(gate, WholeNumbers) and isinstance(up, WholeNumbers):
        return WholeNumbers(_in_turn(gate.codes, up.codes), _in_turn(gate.scales, up.scales))
    assert isinstance(gate, np.ndarray) and isinstance(up, np.ndarray)
    return _in_turn(gate, up)


def _in_turn(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=1).reshape(2 * len(first), -1)


def _longer(vector: np.ndarray, length: int) -> np.ndarray:
    return np.pad(vector, (0, length - len(vector))).astype(np.float32)
