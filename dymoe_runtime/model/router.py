"""Routers: the experts that they choose, and early guesses of that choice for prefetch."""

from __future__ import annotations

import numpy as np

from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.mixer import Dense
from dymoe_runtime.model.norms import Norms
from dymoe_runtime.spec import ModelSpec


class Routers:
    """The routers of all layers, each behind the norm of its layer's feed-forward part."""

    def __init__(self, spec: ModelSpec, dense: Dense, kernels: Kernels) -> None:
        self._spec, self._dense, self._kernels = spec, dense, kernels
        self._router = spec.moe.router
        self._norms = Norms(spec, dense, kernels)

    def route_residual(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the input of the experts of `layer`, and their routing, for a residual stream x [T, H].

        Returns (h, experts, weights): h [T, H] is the norm of x; experts and weights are int64 and float32 [T, k],
        highest weight first. If routing weights multiply the input of experts, h includes them, and weights are 1.
        """
        h = self.expert_input(layer, x)
        logits = self.logits(layer, self.router_input(layer, x) if self._router.plain_norm else h)
        experts, weights = self.select(layer, logits)
        if self._router.scales_input:
            return h * weights, experts, np.ones_like(weights)
        return h, experts, weights

    def guess(
        self, layer: int, residual: np.ndarray, predictor: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Guess the routing of `layer` from an earlier layer's residual stream [T, H].

        `predictor` [experts, H + 1], applied to the router's input, is added to the router's logits; its last column is
        a bias. Returns (experts, weights) as `route_residual` does. They are chosen as the router chooses, its bias for
        the selection included.
        """
        h = self.router_input(layer, residual)
        logits = self.logits(layer, h)
        if predictor is not None:
            logits = logits + self._kernels.matmul(h, np.ascontiguousarray(predictor[:, :-1])) + predictor[:, -1]
        return self.select(layer, logits)

    def expert_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Return what the experts of `layer` read for a residual stream x [T, H]."""
        norm = self._spec.layers[layer].feed_norm
        return x if norm is None else self._norms.apply(f"layers.{layer}.{norm}", x)

    def router_input(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Return what the router of `layer` reads for a residual stream x [T, H]."""
        if self._router.plain_norm:
            return self._norms.without_weights(x)
        return self.expert_input(layer, x)

    def logits(self, layer: int, h: np.ndarray) -> np.ndarray:
        """Return the router's logits [T, experts] for its input h [T, H]."""
        return self._dense.linear(f"layers.{layer}.router", h)

    def select(self, layer: int, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (experts, weights) [T, k] for a router's logits [T, experts]."""
        router, prefix = self._router, f"layers.{layer}.router"
        select = self._dense.vector(f"{prefix}_select") if router.selection_bias else None
        scale = self._dense.vector(f"{prefix}_scale") if router.expert_scale else None
        return self._kernels.route(logits, router, select, scale)
