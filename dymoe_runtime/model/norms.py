"""The norms of the residual stream and of what layers add to it: `NORMS` of spec.py has their kinds."""

from __future__ import annotations

import numpy as np

from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.mixer import Dense
from dymoe_runtime.spec import ModelSpec


class Norms:
    """All norms of a model, by their names."""

    def __init__(self, spec: ModelSpec, dense: Dense, kernels: Kernels) -> None:
        self._spec, self._dense, self._kernels = spec, dense, kernels
        self._ones = np.ones(spec.hidden_size, np.float32)

    def apply(self, name: str, x: np.ndarray) -> np.ndarray:
        """Return x [T, H] normalized with the weights called `name`."""
        bias = self._dense.vector(f"{name}_bias") if self._spec.norm == "layer_bias" else None
        return self._normalized(x, self._dense.vector(name), bias)

    def without_weights(self, x: np.ndarray) -> np.ndarray:
        """Return x [T, H] normalized without weights."""
        return self._normalized(x, self._ones, None)

    def _normalized(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        if self._spec.norm == "rms":
            return self._kernels.norm(x, weight, self._spec.norm_eps)
        return self._kernels.layer_norm(x, weight, bias, self._spec.norm_eps)
