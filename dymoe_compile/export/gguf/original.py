"""The weights of a checkpoint in a GGUF file, for llama.cpp's own quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.export.gguf.architectures import architecture_of
from dymoe_compile.export.gguf.vocabulary import vocabulary_of
from dymoe_compile.export.gguf.writer import name_of, write_model
from dymoe_compile.export.matrices import Format, Rows
from dymoe_compile.export.original import OriginalSource
from dymoe_compile.export.source import ROWS_AT_ONCE, Expert
from dymoe_compile.job.progress import Progress
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.spec import MATRICES, ExpertKey

HALF, FULL = Format(16), Format(32)


class StoredSource(OriginalSource):
    """The weights of a checkpoint: bfloat16 where they are that, else float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        first = checkpoint.expert(ExpertKey(self.spec.moe_layers[0], 0))
        self.expert_form = HALF if all(first[name].dtype == torch.bfloat16 for name in MATRICES) else FULL

    def dense_form(self, name: str) -> Format:
        return HALF if self._checkpoint.tensor(name).dtype == torch.bfloat16 else FULL

    def dense(self, name: str) -> Iterator[Rows]:
        form = self.dense_form(name)
        for rows in torch.split(self._checkpoint.tensor(name), ROWS_AT_ONCE):
            yield _numbers(rows, form)

    def experts(self, layer: int) -> Iterator[Expert]:
        for expert in range(self.spec.num_experts):
            tensors = self._checkpoint.expert(ExpertKey(layer, expert))
            matrices = {name: _numbers(tensors.pop(name), self.expert_form) for name in MATRICES}
            yield Expert(matrices, {name: tensor.float().numpy() for name, tensor in tensors.items()})


def write_original(bundle: Bundle, checkpoint: Checkpoint, file: Path, progress: Progress) -> dict[str, int]:
    """Write the checkpoint of `bundle` to a new GGUF file; return name -> bytes of its tensors.

    Raises DymoeError if llama.cpp cannot run the model.
    """
    architecture, vocabulary = architecture_of(bundle.spec), vocabulary_of(bundle)
    with progress("original", bundle.spec.num_layers) as advance:
        return write_model(file, StoredSource(checkpoint), architecture, vocabulary, name_of(bundle), {}, advance)


def _numbers(tensor: torch.Tensor, form: Format) -> np.ndarray:
    """Return a tensor as float32, or as the bits of its bfloat16 numbers."""
    if form == FULL:
        return tensor.float().numpy()
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
