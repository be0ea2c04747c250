"""What all layers of a graph share about its sequences: sizes, positions, masks and tables of angles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto

from dymoe_compile.export.onnx.graph import Graph
from dymoe_runtime.model.rope import inverse_frequencies, is_long, rotary
from dymoe_runtime.spec import Rope

IDS, MASK = "input_ids", "attention_mask"
LOWEST = float(np.finfo(np.float32).min)


class Sequences:
    """Values that come from the inputs of a graph: IDS int64 [batch, new], and MASK int64 [batch, past + new].

    Each is made when it is first asked for. `context` is the longest that a sequence may become.
    """

    def __init__(self, graph: Graph, context: int) -> None:
        self._graph, self.context = graph, context
        self._made: dict[object, str] = {}

    def split(self, x: str, sizes: Sequence[int]) -> str:
        """Return x [tokens, ...] as [batch, new, *sizes]."""
        graph = self._graph
        shape = self._once("shape", lambda: graph.node("Shape", IDS))
        wanted = self._once(("split", *sizes), lambda: graph.node("Concat", shape, graph.constant(list(sizes)), axis=0))
        return graph.node("Reshape", x, wanted)

    @property
    def ids(self) -> str:
        """Return the ids of all tokens, int64 [tokens]."""
        graph = self._graph
        return self._once("ids", lambda: graph.node("Reshape", IDS, graph.constant([-1])))

    @property
    def lengths(self) -> str:
        """Return the tokens of each sequence less 1, int32 [batch]."""
        graph = self._graph

        def make() -> str:
            one = graph.constant([1])
            total = graph.node("ReduceSum", MASK, one, keepdims=0)
            return graph.node("Cast", graph.node("Sub", total, one), to=TensorProto.INT32)

        return self._once("lengths", make)

    @property
    def total(self) -> str:
        """Return past + new, int32 []."""
        graph = self._graph

        def make() -> str:
            size = graph.node("Gather", graph.node("Shape", MASK), graph.constant(np.array(1, np.int64)), axis=0)
            return graph.node("Cast", size, to=TensorProto.INT32)

        return self._once("total", make)

    @property
    def _all_positions(self) -> str:
        """Return the position of each token of the sequences, int64 [batch, past + new]."""
        graph = self._graph

        def make() -> str:
            counted = graph.node("CumSum", MASK, graph.constant(np.array(1, np.int64)))
            return graph.node("Sub", counted, graph.constant([1]))

        return self._once("all positions", make)

    @property
    def _positions(self) -> str:
        """Return the position of each new token, int64 [batch, new]."""
        graph = self._graph

        def make() -> str:
            new = graph.node("Shape", IDS, start=1, end=2)
            return graph.node(
                "Slice", self._all_positions, graph.node("Neg", new), graph.constant([2**31 - 1]), graph.constant([1])
            )

        return self._once("positions", make)

    @property
    def positions(self) -> str:
        """Return the position of each new token, float32 [tokens, 1]."""
        graph = self._graph

        def make() -> str:
            flat = graph.node("Reshape", self._positions, graph.constant([-1, 1]))
            return graph.node("Cast", flat, to=TensorProto.FLOAT)

        return self._once("flat positions", make)

    def mask(self, window: int | None, chunk: int | None) -> str:
        """Return what to add to scores, 0 or LOWEST, float32 [batch, 1, 1, new, past + new]."""
        return self._once(("mask", window, chunk), lambda: self._make_mask(window, chunk))

    def _make_mask(self, window: int | None, chunk: int | None) -> str:
        graph = self._graph
        key = graph.node("Unsqueeze", self._all_positions, graph.constant([1]))
        query = graph.node("Unsqueeze", self._positions, graph.constant([2]))
        valid = graph.node("Unsqueeze", graph.node("Cast", MASK, to=TensorProto.BOOL), graph.constant([1]))
        seen = graph.node("And", graph.node("LessOrEqual", key, query), valid)
        if window:
            first = graph.node("Sub", query, graph.constant([window]))
            seen = graph.node("And", seen, graph.node("Greater", key, first))
        if chunk:
            size = graph.constant([chunk])
            same = graph.node("Equal", graph.node("Div", key, size), graph.node("Div", query, size))
            seen = graph.node("And", seen, same)
        added = graph.node("Where", seen, graph.constant(0.0), graph.constant(LOWEST))
        return graph.node("Unsqueeze", added, graph.constant([1, 2]))

    def angles(self, rope: Rope, head_dim: int) -> tuple[str, str]:
        """Return the cosines and sines of the new tokens, float32 [tokens, n / 2] each, for the n columns that turn."""
        graph, long = self._graph, is_long(rope, self.context)
        factor = rope.long_attention_factor if long else rope.attention_factor

        def make(operator: str) -> str:
            frequencies = graph.constant(inverse_frequencies(rope, head_dim, long)[None].astype(np.float32))
            angles = self._once(("angles", rope, head_dim), lambda: graph.node("Mul", self.positions, frequencies))
            return graph.node("Mul", graph.node(operator, angles), graph.constant(float(factor)))

        cosines, sines = (
            self._once((name, rope, head_dim), lambda name=name: make(name))  # type: ignore[misc]
            for name in ("Cos", "Sin")
        )
        return cosines, sines

    def tables(self, rope: Rope, head_dim: int) -> tuple[str, str]:
        """Return the cosines and sines of all positions of the context, float32 [context, n / 2] each, as constants."""

        def make(index: int) -> str:
            table = rotary(rope, head_dim).table(0, self.context, self.context)[index]
            return self._graph.constant(np.ascontiguousarray(table[:, : table.shape[1] // 2], np.float32))

        cosines, sines = (
            self._once(("table", index, rope, head_dim), lambda index=index: make(index))  # type: ignore[misc]
            for index in (0, 1)
        )
        return cosines, sines

    def _once(self, key: object, make: Callable[[], str]) -> str:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
