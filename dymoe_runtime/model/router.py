"""Routers: the experts that they choose, and early guesses of that choice for prefetch."""

from __future__ import annotations

import numpy as np

from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.mixer import Dense
from dymoe_runtime.spec import ModelSpec


class Routers:
    """The routers of all layers, each behind the norm of its layer's feed-forward part."""

    def __init__(self, spec: ModelSpec, dense: Dense, kernels: Kernels) -> None:
        self._spec, self._dense, self._kernels = spec, dense, kernels

    def route(self, layer: int, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the routing of normalized h [T, H].

        Returns (experts, weights), int64 and float32 [T, k], highest weight first.
        """
        return self._select(self._dense.linear(f"layers.{layer}.router", h))

    def route_residual(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (h, experts, weights): the norm of the residual stream x [T, H], and its routing by `route`."""
        h = self._norm(layer, x)
        return h, *self.route(layer, h)

    def guess(
        self, layer: int, residual: np.ndarray, predictor: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Guess the routing of `layer` from an earlier layer's residual stream [T, H].

        `predictor` [experts, H + 1], applied to the norm of the residual stream, is added to the router's logits; its
        last column is a bias. Returns (experts, weights) as `route` does.
        """
        h = self._norm(layer, residual)
        logits = self._dense.linear(f"layers.{layer}.router", h)
        if predictor is not None:
            logits = logits + self._kernels.matmul(h, np.ascontiguousarray(predictor[:, :-1])) + predictor[:, -1]
        return self._select(logits)

    def _select(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._kernels.route(logits, self._spec.top_k, self._spec.moe.router.normalize)

    def _norm(self, layer: int, x: np.ndarray) -> np.ndarray:
        return self._kernels.norm(x, self._dense.vector(f"layers.{layer}.mlp_norm"), self._spec.norm_eps)
