"""The original model at full precision, with which bundles are compared."""

from __future__ import annotations

import os

import numpy as np
import torch

from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.torch_ops import run_expert
from dymoe_compile.checkpoint.window_decoder import window_decoder
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.routing import PromptRouting, Routing
from dymoe_runtime.spec import ExpertKey, ModelSpec

# Bytes of float32 experts kept between calls; the others are read again for each call.
KEEP_BYTES = 2 << 30


class CheckpointExperts:
    """`Experts` read from a checkpoint, in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._activation = checkpoint.spec.activation
        self._kept: dict[ExpertKey, dict[str, torch.Tensor]] = {}
        self._room = KEEP_BYTES

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        return self._run(layer, h, routing.experts, routing.weights)

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        return self._run(layer, h, routing.experts, routing.weights)

    def _run(self, layer: int, h: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        y = np.zeros_like(h)
        for expert in np.unique(experts).tolist():
            tokens, ranks = np.nonzero(experts == expert)  # a token chooses an expert once
            expert_weights = self._expert(ExpertKey(layer, expert))
            _, out = run_expert(expert_weights, torch.from_numpy(h[tokens]), self._activation)
            y[tokens] += out.numpy() * weights[tokens, ranks, None]
        return y

    def _expert(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        if key in self._kept:
            return self._kept[key]
        expert = {name: matrix.float() for name, matrix in self._checkpoint.expert(key).items()}
        self._room -= sum(4 * matrix.numel() for matrix in expert.values())
        if self._room > 0:
            self._kept[key] = expert
        return expert


class OriginalModel:
    """A checkpoint in float32, with the members of `score.WindowModel`."""

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels) -> None:
        experts = CheckpointExperts(checkpoint)
        self.decoder = window_decoder(checkpoint.spec, CheckpointDense(checkpoint), kernels, experts)

    @property
    def spec(self) -> ModelSpec:
        """Return the spec of the model."""
        return self.decoder.spec

    def hidden(self, ids: np.ndarray) -> np.ndarray:
        """Return the final hidden states [T, H] of a window of ids [T]."""
        return self.decoder.forward(ids)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Return the logits [rows, vocab] of hidden states [rows, H]."""
        return self.decoder.logits(hidden)


def open_original(path: str | os.PathLike[str], kernels: Kernels) -> OriginalModel:
    """Open the checkpoint directory `path` in float32; raise DymoeError if it is not complete."""
    return OriginalModel(Checkpoint.open(path), kernels)
