"""The decoder of a model as a graph: what `dymoe_runtime/model/decoder.py` computes, in the same order."""

from __future__ import annotations

from collections.abc import Callable

from onnx import GraphProto, TensorProto, ValueInfoProto

from dymoe_compile.export.onnx.attention import PAST, PRESENT, Attention
from dymoe_compile.export.onnx.blocks import Blocks
from dymoe_compile.export.onnx.experts import ExpertsGraph
from dymoe_compile.export.onnx.graph import Graph, value
from dymoe_compile.export.onnx.sequence import IDS, MASK, Sequences
from dymoe_compile.export.source import Source
from dymoe_runtime.spec import AttentionSpec, MlpSpec, MoeSpec, SharedSpec

LOGITS = "logits"


class DecoderGraph:
    """Builds the graph of a model: ids, mask and KV cache in; logits and KV cache out."""

    def __init__(self, graph: Graph, source: Source, context: int, portable: bool) -> None:
        self._graph, self._spec = graph, source.spec
        self._blocks = Blocks(graph, source, portable)
        self._sequences = Sequences(graph, context)

    def build(self, advance: Callable[[], object] = lambda: None) -> GraphProto:
        """Return the graph; `advance` is called once per layer."""
        spec = self._spec
        x = self._blocks.scaled(self._blocks.embed("embed", self._sequences.ids), spec.embed_scale)
        for layer in range(spec.num_layers):
            x = self._layer(layer, x)
            advance()
        self._logits(x)
        return self._graph.finished("decoder", self._inputs(), self._outputs())

    def _inputs(self) -> list[ValueInfoProto]:
        declared = [value(IDS, TensorProto.INT64, ["batch", "new"]), value(MASK, TensorProto.INT64, ["batch", "total"])]
        return [*declared, *self._caches(PAST, "past")]

    def _outputs(self) -> list[ValueInfoProto]:
        logits = value(LOGITS, TensorProto.FLOAT, ["batch", "new", self._spec.vocab_size])
        return [logits, *self._caches(PRESENT, "total")]

    def _caches(self, pattern: str, length: str) -> list[ValueInfoProto]:
        declared = []
        for layer, known in enumerate(self._spec.layers):
            assert isinstance(known.mixer, AttentionSpec)
            for part in ("key", "value"):
                shape: list[int | str] = ["batch", known.mixer.kv_heads, length, known.mixer.head_dim]
                declared.append(value(pattern.format(layer=layer, part=part), TensorProto.FLOAT, shape))
        return declared

    def _layer(self, layer: int, x: str) -> str:
        """Return the residual stream [tokens, H] after a layer."""
        mixed = self._mix(layer, x)
        part = self._spec.layers[layer].feed_forward
        parallel = self._spec.layers[layer].parallel
        if isinstance(part, MlpSpec):
            if parallel:
                return mixed
            h = self._expert_input(layer, mixed)
            return self._joined(layer, mixed, self._blocks.mlp(f"layers.{layer}.mlp", h))
        y = self._experts(layer, part, x if parallel else mixed)
        if part.shared is not None and not parallel:
            y = self._with_shared(layer, part.shared, mixed, y)
        return self._joined(layer, mixed, y)

    def _mix(self, layer: int, x: str) -> str:
        """Return the residual stream after the mixer."""
        known, blocks = self._spec.layers[layer], self._blocks
        assert isinstance(known.mixer, AttentionSpec)
        h = blocks.norm(f"layers.{layer}.attn_norm", x) if known.pre_norms else x
        y = Attention(blocks, self._sequences, layer, known.mixer).output(h)
        if known.post_norms:
            y = blocks.norm(f"layers.{layer}.attn_post_norm", y)
        beside = self._beside(layer, h) if known.parallel else ""
        y = self._graph.node("Add", y, beside) if beside else y
        return self._graph.node("Add", x, blocks.scaled(y, known.residual_scale))

    def _beside(self, layer: int, h: str) -> str:
        """Return what the dense MLP or the shared expert of a parallel layer makes of h; empty if it has neither."""
        part = self._spec.layers[layer].feed_forward
        if isinstance(part, MlpSpec):
            return self._blocks.mlp(f"layers.{layer}.mlp", h)
        return "" if part.shared is None else self._shared(layer, part.shared, h)

    def _experts(self, layer: int, part: MoeSpec, read: str) -> str:
        """Return the output of the routed experts for the residual stream that they read."""
        h = self._expert_input(layer, read)
        router_input = self._blocks.norm_without_weights(read) if part.router.plain_norm else h
        return ExpertsGraph(self._blocks, layer).output(h, router_input)

    def _expert_input(self, layer: int, x: str) -> str:
        norm = self._spec.layers[layer].feed_norm
        return x if norm is None else self._blocks.norm(f"layers.{layer}.{norm}", x)

    def _with_shared(self, layer: int, shared: SharedSpec, x: str, y: str) -> str:
        """Return y plus the output of the shared expert, for the residual stream x after the mixer."""
        prefix, blocks = f"layers.{layer}.", self._blocks
        if shared.own_norms:
            h, y = blocks.norm(f"{prefix}shared_norm", x), blocks.norm(f"{prefix}experts_post_norm", y)
        else:
            h = self._expert_input(layer, x)
        return self._graph.node("Add", y, self._shared(layer, shared, h))

    def _shared(self, layer: int, shared: SharedSpec, h: str) -> str:
        """Return the output of the shared expert for its input h."""
        prefix, graph, blocks = f"layers.{layer}.", self._graph, self._blocks
        y = blocks.mlp(f"{prefix}shared", h)
        if shared.own_norms:
            y = blocks.norm(f"{prefix}shared_post_norm", y)
        if shared.gated:
            gate = graph.node("Unsqueeze", blocks.vector(f"{prefix}shared_gate"), graph.constant([1]))
            y = graph.node("Mul", y, graph.node("Sigmoid", graph.node("MatMul", h, gate)))
        return blocks.scaled(y, shared.scale)

    def _joined(self, layer: int, x: str, y: str) -> str:
        """Return the residual stream x with the output y of the feed-forward part."""
        known, blocks = self._spec.layers[layer], self._blocks
        if known.post_norms:
            y = blocks.norm(f"layers.{layer}.mlp_post_norm", y)
        joined = self._graph.node("Add", x, blocks.scaled(y, known.residual_scale))
        if known.scalar:
            joined = self._graph.node("Mul", joined, blocks.vector(f"layers.{layer}.scalar"))
        return joined

    def _logits(self, x: str) -> None:
        spec, blocks = self._spec, self._blocks
        logits = blocks.linear(spec.head, blocks.norm("norm", x))
        logits = blocks.softcapped(blocks.scaled(logits, spec.logit_scale), spec.logit_softcap)
        self._graph.named("Identity", [LOGITS], self._sequences.split(logits, [spec.vocab_size]))
