"""The original model at full precision, as a decoder: what bundles are compared with."""

from __future__ import annotations

import os

import numpy as np
import torch

from dymoe_compile.checkpoint import Checkpoint, CheckpointDense
from dymoe_runtime.activations import ACTIVATIONS
from dymoe_runtime.decoder import Decoder, Routing
from dymoe_runtime.spec import ExpertKey

# Experts kept as float32 between calls; beyond this they are read again each time.
KEEP_BYTES = 2 << 30


class CheckpointExperts:
    """Routed experts straight from a checkpoint, float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._activation = ACTIVATIONS[checkpoint.spec.activation]
        self._kept: dict[ExpertKey, dict[str, torch.Tensor]] = {}
        self._room = KEEP_BYTES

    def __call__(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        y = np.zeros_like(h)
        for expert in np.unique(routing.experts).tolist():
            tokens, ranks = np.nonzero(routing.experts == expert)  # each token once
            out = self.apply(self._expert(ExpertKey(layer, expert)), torch.from_numpy(h[tokens]))
            y[tokens] += out.numpy() * routing.gates[tokens, ranks, None]
        return y

    def apply(self, expert: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        hidden = self._activation(x @ expert["gate"].T) * (x @ expert["up"].T)
        return hidden @ expert["down"].T

    def _expert(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        if key in self._kept:
            return self._kept[key]
        expert = {name: matrix.float() for name, matrix in self._checkpoint.expert(key).items()}
        self._room -= sum(4 * matrix.numel() for matrix in expert.values())
        if self._room > 0:
            self._kept[key] = expert
        return expert


def open_reference(path: str | os.PathLike[str]) -> Decoder:
    """Decoder of the checkpoint directory `path` in float32; entry point `dymoe.references`."""
    checkpoint = Checkpoint.open(path)
    return Decoder(checkpoint.spec, CheckpointDense(checkpoint), CheckpointExperts(checkpoint))
