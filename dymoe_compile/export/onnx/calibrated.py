"""Experts of a checkpoint as whole numbers of 4 bits, calibrated by a pass of text through the original model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dymoe_compile.calibrate.calibration import spilled
from dymoe_compile.calibrate.texts import Windows, load_texts, make_windows
from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.torch_ops import run_expert
from dymoe_compile.checkpoint.window_decoder import window_decoder
from dymoe_compile.export.matrices import Format, Rows, WholeNumbers, rounded
from dymoe_compile.export.original import OriginalSource
from dymoe_compile.export.source import DENSE_FORM, Expert
from dymoe_compile.job.progress import Progress
from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.moments import Moments, moments
from dymoe_compile.quantize.whole import quantize_whole
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.spec import MATRICES, ExpertKey
from dymoe_runtime.text.tokenizer import Tokenizer

# Used where a bundle does not say with how much text it was calibrated.
DEFAULT_TOKENS = 65536


class CalibratedSource(OriginalSource):
    """The weights of a checkpoint: experts of 4 bits with 32 columns to a scale, other matrices of 8 bits."""

    expert_form = Format(4, 32)

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray, kernels: Kernels, scratch: Path) -> None:
        """Calibrate with windows of ids int64 [windows, W]. Hidden states may go to files in `scratch`."""
        super().__init__(checkpoint)
        self._descent = load_descent(kernels)
        self._decoder = window_decoder(self.spec, CheckpointDense(checkpoint), kernels)
        self._ids, self._scratch = ids, scratch
        self._x = self._hidden()  # the residual stream that enters the layer `_next`
        self._next = 0
        for row, window in zip(ids, self._windows(self._x), strict=True):
            window[:] = self._decoder.embed(row)

    def dense_form(self, name: str) -> Format:
        return DENSE_FORM

    def dense(self, name: str) -> Iterator[Rows]:
        for rows in super().dense(name):
            assert isinstance(rows, np.ndarray)
            yield rounded(rows, DENSE_FORM)

    @torch.inference_mode()
    def experts(self, layer: int) -> Iterator[Expert]:
        """Yield the experts of `layer`; raise DymoeError if the model's activations are not finite."""
        while self._next < layer:  # layers without experts
            self._mix(self._next)
            for window in self._windows(self._x):
                window[:] = self._decoder.feed_forward(self._next, window, window)
            self._next += 1
        parallel = self.spec.layers[layer].parallel
        routed = self._route(layer) if parallel else None
        self._mix(layer)
        h, chosen, weights = routed or self._route(layer)
        y = self._hidden()
        y[:] = 0
        for expert in range(self.spec.num_experts):
            yield self._expert(ExpertKey(layer, expert), h, chosen, weights, y)
        for window, output in zip(self._windows(self._x), self._windows(y), strict=True):
            window[:] = self._decoder.finish(layer, window, output)
        self._next = layer + 1

    def _expert(self, key: ExpertKey, h: np.ndarray, chosen: np.ndarray, weights: np.ndarray, y: np.ndarray) -> Expert:
        """Add the output of one expert for h [T, H] to y [T, H]; return it quantized.

        `chosen` and `weights` are [T, k].
        """
        tensors = {name: tensor.float() for name, tensor in self._checkpoint.expert(key).items()}
        tokens, ranks = np.nonzero(chosen == key.expert)  # a token chooses an expert once
        x, shares = torch.from_numpy(h[tokens]), torch.from_numpy(weights[tokens, ranks, None])
        middle, out = run_expert(tensors, x, self.spec.activation)
        y[tokens] += (out * shares).numpy()
        into, inside = moments(x, shares), moments(middle, shares)
        matrices: dict[str, Rows] = {
            name: self._quantized(tensors[name], inside if name == "down" else into) for name in MATRICES
        }
        return Expert(matrices, {name: t.numpy() for name, t in tensors.items() if name not in MATRICES})

    def _quantized(self, weight: torch.Tensor, seen: Moments) -> WholeNumbers:
        codes, scales = quantize_whole(weight, self.expert_form.bits, self.expert_form.block, self._descent, seen)
        return WholeNumbers(codes.numpy(), scales.numpy())

    def _mix(self, layer: int) -> None:
        for window in self._windows(self._x):
            window[:], _ = self._decoder.mix(layer, window)
        if not all(np.isfinite(window).all() for window in self._windows(self._x)):
            raise DymoeError(f"layer {layer}: the model's activations are not finite; copy the checkpoint again")

    def _route(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what the experts read, [T, H], and the routing, [T, k] each."""
        h, found = self._hidden(), []
        for window, normed in zip(self._windows(self._x), self._windows(h), strict=True):
            normed[:], *choice = self._decoder.route(layer, window)
            found.append(choice)
        chosen, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return h, chosen, weights

    def _windows(self, x: np.ndarray) -> list[np.ndarray]:
        return np.split(x, len(self._ids))

    def _hidden(self) -> np.ndarray:
        """Return an array for hidden states, float32 [T, H]: in memory or, if it is too large, in a file."""
        shape = self._ids.size, self.spec.hidden_size
        if not spilled(*shape):
            return np.empty(shape, np.float32)
        with tempfile.TemporaryFile(dir=self._scratch) as file:
            return np.asarray(np.memmap(file, np.float32, "w+", shape=shape))


def open_calibrated(
    bundle: Bundle, path: Path, calibration: Sequence[str], kernels: Kernels, scratch: Path, progress: Progress
) -> CalibratedSource:
    """Open the checkpoint `path` of a bundle, to be quantized with as much text as the bundle was.

    Raises DymoeError if the bundle was not compiled from this checkpoint, or there is too little text.
    """
    checkpoint = Checkpoint.open(path)
    _check_origin(bundle, checkpoint, path, progress)
    windows = _windows_of(bundle, calibration)
    bundle.spec.check_ids(windows.train.reshape(-1).tolist())
    return CalibratedSource(checkpoint, windows.train, kernels, scratch)


def _check_origin(bundle: Bundle, checkpoint: Checkpoint, path: Path, progress: Progress) -> None:
    expected = bundle.manifest.provenance.get("source_sha256")
    step = 1 << 24
    with progress("reading", checkpoint.total_bytes() // step + 1) as advance:
        found = checkpoint.digest(advance, step)
    if expected is not None and found != expected:
        raise DymoeError(f"{path}: not the checkpoint that {bundle.path} was compiled from; give that to --checkpoint")


def _windows_of(bundle: Bundle, calibration: Sequence[str]) -> Windows:
    known = bundle.manifest.provenance
    tokens, seed = int(known.get("calibration_token_limit", DEFAULT_TOKENS)), int(known.get("seed", 0))
    encode: Callable[[str], list[int]] = Tokenizer.load(bundle.path).encode
    return make_windows(load_texts(calibration), encode, bundle.spec.max_context, tokens, seed)
