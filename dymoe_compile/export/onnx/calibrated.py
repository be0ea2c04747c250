"""Experts of a checkpoint as whole numbers of 4 bits, calibrated by a pass of text through the original model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.window_decoder import window_decoder
from dymoe_compile.export.matrices import Format, Rows, WholeNumbers, rounded
from dymoe_compile.export.original import OriginalSource
from dymoe_compile.export.source import DENSE_FORM, Expert
from dymoe_compile.export.walk import Seen, Walk, open_origin, windows_of
from dymoe_compile.job.progress import Progress
from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.moments import Moments, moments
from dymoe_compile.quantize.whole import quantize_whole
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.spec import MATRICES


class CalibratedSource(OriginalSource):
    """The weights of a checkpoint: experts of 4 bits with 32 columns to a scale, other matrices of 8 bits."""

    expert_form = Format(4, 32)

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray, kernels: Kernels, scratch: Path) -> None:
        """Calibrate with windows of ids int64 [windows, W]. Hidden states may go to files in `scratch`."""
        super().__init__(checkpoint)
        self._descent = load_descent(kernels)
        decoder = window_decoder(self.spec, CheckpointDense(checkpoint), kernels)
        self._walk = Walk(checkpoint, decoder, ids, scratch)

    def dense_form(self, name: str) -> Format:
        return DENSE_FORM

    def dense(self, name: str) -> Iterator[Rows]:
        for rows in super().dense(name):
            assert isinstance(rows, np.ndarray)
            yield rounded(rows, DENSE_FORM)

    @torch.inference_mode()
    def experts(self, layer: int) -> Iterator[Expert]:
        """Yield the experts of `layer`; raise DymoeError if the model's activations are not finite."""
        for seen in self._walk.experts(layer):
            yield self._expert(seen)

    def _expert(self, seen: Seen) -> Expert:
        into, inside = moments(seen.x, seen.shares), moments(seen.middle, seen.shares)
        matrices: dict[str, Rows] = {
            name: self._quantized(seen.tensors[name], inside if name == "down" else into) for name in MATRICES
        }
        return Expert(matrices, {name: t.numpy() for name, t in seen.tensors.items() if name not in MATRICES})

    def _quantized(self, weight: torch.Tensor, seen: Moments) -> WholeNumbers:
        codes, scales = quantize_whole(weight, self.expert_form.bits, self.expert_form.block, self._descent, seen)
        return WholeNumbers(codes.numpy(), scales.numpy())


def open_calibrated(
    bundle: Bundle, path: Path, calibration: Sequence[str], kernels: Kernels, scratch: Path, progress: Progress
) -> CalibratedSource:
    """Open the checkpoint `path` of a bundle, to be quantized with as much text as the bundle was.

    Raises DymoeError if the bundle was not compiled from this checkpoint, or there is too little text.
    """
    checkpoint = open_origin(bundle, path, progress)
    return CalibratedSource(checkpoint, windows_of(bundle, calibration).train, kernels, scratch)
