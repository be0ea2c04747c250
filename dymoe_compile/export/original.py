"""The weights of a checkpoint in float32: a graph of them is what other graphs, and other programs, compare with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.export.matrices import Format, Rows
from dymoe_compile.export.source import ROWS_AT_ONCE, Expert
from dymoe_runtime.spec import MATRICES, ExpertKey


class OriginalSource:
    """The weights of a checkpoint, each as float32."""

    expert_form = Format(32)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.spec = checkpoint.spec

    def vector(self, name: str) -> np.ndarray:
        return self._checkpoint.tensor(name).float().numpy()

    def dense_form(self, name: str) -> Format:
        return Format(32)

    def dense(self, name: str) -> Iterator[Rows]:
        for rows in torch.split(self._checkpoint.tensor(name), ROWS_AT_ONCE):
            yield rows.float().numpy()

    def experts(self, layer: int) -> Iterator[Expert]:
        for expert in range(self.spec.num_experts):
            tensors = self._checkpoint.expert(ExpertKey(layer, expert))
            arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
            matrices = {name: arrays.pop(name) for name in MATRICES}
            yield Expert(matrices, arrays)
