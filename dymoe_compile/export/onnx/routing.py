"""Routers in a graph: the experts that each token chooses, and their weights. `RouterSpec` of spec.py says how."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from dymoe_compile.export.onnx.blocks import Blocks
from dymoe_runtime.spec import RouterSpec

LOWEST = float(np.finfo(np.float32).min)


def is_plain(router: RouterSpec) -> bool:
    """Return whether the weights are the softmax of the chosen experts' logits, and the highest logits are chosen."""
    of_chosen = router.score == "softmax_of_chosen" or (router.score == "softmax" and router.normalize)
    changed = router.selection_bias or router.expert_scale or router.scales_input or router.scale != 1
    return of_chosen and not changed and router.groups == 1 and not (router.eps or router.least_sum)


class RouterGraph:
    """The router of one layer."""

    def __init__(self, blocks: Blocks, layer: int) -> None:
        self._blocks, self._graph = blocks, blocks.graph
        self._router = blocks.spec.moe.router
        self._name = f"layers.{layer}.router"

    def logits(self, x: str) -> str:
        """Return the router's logits, [tokens, experts], for its input x [tokens, H]."""
        return self._blocks.softcapped(self._blocks.linear(self._name, x), self._router.softcap)

    def choose(self, logits: str) -> tuple[str, str]:
        """Return the experts that are chosen, int64 [tokens, k], and their weights, float32 [tokens, k]."""
        graph, router = self._graph, self._router
        scores = self._scores(logits)
        _, experts = graph.nodes("TopK", 2, self._wanted(logits, scores), graph.constant([router.top_k]), axis=-1)
        weights = graph.node("GatherElements", scores, experts, axis=1)
        if router.score == "softmax_of_chosen":
            weights = graph.node("Softmax", weights, axis=-1)
        if router.score == "sparsemixer":
            weights = self._masked_shares(logits, experts)
        return experts, self._finished(weights, experts)

    def scattered(self, experts: str, weights: str, logits: str) -> tuple[str, str]:
        """Return float32 [tokens, experts], twice: 1 where an expert is chosen, and its weight; 0 elsewhere."""
        graph = self._graph
        nothing, ones = graph.filled(logits, 0.0), graph.filled(weights, 1.0)
        chosen, shares = (graph.node("ScatterElements", nothing, experts, x, axis=1) for x in (ones, weights))
        return chosen, shares

    def _scores(self, logits: str) -> str:
        if self._router.score == "softmax":
            return self._graph.node("Softmax", logits, axis=-1)
        return self._graph.node("Sigmoid", logits) if self._router.score == "sigmoid" else logits

    def _wanted(self, logits: str, scores: str) -> str:
        """Return what experts are chosen by, [tokens, experts]."""
        router = self._router
        if not router.selection_bias and router.groups == 1:
            return logits if router.score == "sigmoid" else scores
        wanted = scores
        if router.selection_bias:
            wanted = self._graph.node("Add", wanted, self._blocks.vector(f"{self._name}_select"))
        return wanted if router.groups == 1 else self._of_best_groups(wanted)

    def _of_best_groups(self, wanted: str) -> str:
        """Return `wanted` with LOWEST outside the best groups of experts."""
        graph, router = self._graph, self._router
        groups = graph.node("Reshape", wanted, graph.constant([0, router.groups, -1]))
        counted = graph.constant([1 if router.group_score == "max" else 2])
        highest, _ = graph.nodes("TopK", 2, groups, counted, axis=-1)
        rank = graph.node("ReduceSum", highest, graph.constant([-1]), keepdims=0)
        _, best = graph.nodes("TopK", 2, rank, graph.constant([router.top_groups]), axis=-1)
        nothing, ones = graph.filled(rank, 0.0), graph.filled(best, 1.0)
        kept = graph.node("Cast", graph.node("ScatterElements", nothing, best, ones, axis=1), to=TensorProto.BOOL)
        kept = graph.node("Unsqueeze", kept, graph.constant([2]))
        return graph.node(
            "Reshape",
            graph.node("Where", kept, groups, graph.constant(LOWEST)),
            graph.constant([0, router.experts]),
        )

    def _masked_shares(self, logits: str, experts: str) -> str:
        """Return the weights of sparsemixer, [tokens, k]."""
        graph, left = self._graph, logits
        weights = []
        for rank in range(self._router.top_k):
            chosen = self._blocks.columns(experts, rank, rank + 1)
            most = graph.node("GatherElements", logits, chosen, axis=1)
            ratio = graph.node(
                "Div", graph.node("Sub", most, logits), graph.node("Max", graph.node("Abs", logits), most)
            )
            far = graph.node("Greater", ratio, graph.constant(float(self._router.threshold)))
            shares = graph.node("Exp", graph.node("Sub", left, most))
            total = graph.node(
                "ReduceSum", graph.node("Where", far, graph.constant(0.0), shares), graph.constant([-1]), keepdims=1
            )
            weights.append(graph.node("Reciprocal", total))
            gone = graph.filled(most, LOWEST)
            left = graph.node("ScatterElements", left, chosen, gone, axis=1)
        return graph.node("Concat", *weights, axis=1)

    def _finished(self, weights: str, experts: str) -> str:
        """Return the weights, normalized and scaled."""
        graph, router = self._graph, self._router
        if router.normalize:
            total = graph.node("ReduceSum", weights, graph.constant([-1]), keepdims=1)
            total = graph.node("Add", total, graph.constant(float(router.eps))) if router.eps else total
            total = graph.node("Max", total, graph.constant(float(router.least_sum))) if router.least_sum else total
            weights = graph.node("Div", weights, total)
        weights = self._blocks.scaled(weights, router.scale)
        if router.expert_scale:
            of_chosen = graph.node("Gather", self._blocks.vector(f"{self._name}_scale"), experts)
            weights = graph.node("Mul", weights, of_chosen)
        return weights
