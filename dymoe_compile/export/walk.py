"""A walk of calibration text through the original model, layer by layer, with one expert in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dymoe_compile.calibrate.texts import Windows, load_texts, make_windows
from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.torch_ops import run_expert
from dymoe_compile.job.progress import Progress
from dymoe_compile.plan.sizes import spilled
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.text.tokenizer import Tokenizer

# Used where a bundle does not say with how much text it was calibrated.
DEFAULT_TOKENS = 65536


class Layers(Protocol):
    """The layers of a model, part by part, as `model.decoder.Decoder` runs them."""

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Return the embeddings [T, H] of ids [T]."""

    def mix(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the residual stream [T, H] after the mixer of `layer`, and token weights."""

    def route(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the experts' inputs [T, H], the experts [T, k] and their routing weights [T, k]."""

    def feed_forward(self, layer: int, x: np.ndarray, read: np.ndarray) -> np.ndarray:
        """Return the residual stream [T, H] after the dense MLP of `layer`."""

    def finish(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the residual stream [T, H] after `layer`, from the one after its mixer and its experts' output."""


@dataclass(frozen=True)
class Seen:
    """One expert, and the n tokens that have chosen it.

    `tensors` are its matrices and biases, float32; x [n, H] its inputs, `shares` [n, 1] its routing weights, `middle`
    [n, I] its hidden activations and `out` [n, H] its outputs.
    """

    key: ExpertKey
    tensors: dict[str, torch.Tensor]
    x: torch.Tensor
    shares: torch.Tensor
    middle: torch.Tensor
    out: torch.Tensor


class Walk:
    """A walk of windows of ids int64 [windows, W] through the layers of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, layers: Layers, ids: np.ndarray, scratch: Path) -> None:
        """Embed all ids. Hidden states may go to files in `scratch`."""
        self._checkpoint, self._layers = checkpoint, layers
        self._spec = checkpoint.spec
        self._ids, self._scratch = ids, scratch
        self._x = self._hidden()  # the residual stream that enters the layer `_next`
        self._next = 0
        for row, window in zip(ids, self.windows(), strict=True):
            window[:] = layers.embed(row)

    @torch.inference_mode()
    def experts(self, layer: int) -> Iterator[Seen]:
        """Walk to `layer`, and yield its experts in order; raise DymoeError if activations are not finite.

        Layers are asked for in order. The walk goes on once all experts were taken.
        """
        self.pass_dense(layer)
        routed = self._route(layer) if self._spec.layers[layer].parallel else None
        self._mix(layer)
        h, chosen, weights = routed or self._route(layer)
        y = self._hidden()
        y[:] = 0
        for expert in range(self._spec.num_experts):
            yield self._expert(ExpertKey(layer, expert), h, chosen, weights, y)
        for window, output in zip(self.windows(), np.split(y, len(self._ids)), strict=True):
            window[:] = self._layers.finish(layer, window, output)
        self._next = layer + 1

    def pass_dense(self, stop: int) -> None:
        """Walk through layers without experts up to the layer `stop`."""
        while self._next < stop:
            self._mix(self._next)
            for window in self.windows():
                window[:] = self._layers.feed_forward(self._next, window, window)
            self._next += 1

    def windows(self) -> list[np.ndarray]:
        """Return the residual stream of each window, [W, H]."""
        return np.split(self._x, len(self._ids))

    def _expert(self, key: ExpertKey, h: np.ndarray, chosen: np.ndarray, weights: np.ndarray, y: np.ndarray) -> Seen:
        """Add the output of one expert for h [T, H] to y [T, H]; return what it has seen.

        `chosen` and `weights` are [T, k].
        """
        tensors = {name: tensor.float() for name, tensor in self._checkpoint.expert(key).items()}
        tokens, ranks = np.nonzero(chosen == key.expert)  # a token chooses an expert once
        x, shares = torch.from_numpy(h[tokens]), torch.from_numpy(weights[tokens, ranks, None])
        middle, out = run_expert(tensors, x, self._spec.activation)
        y[tokens] += (out * shares).numpy()
        return Seen(key, tensors, x, shares, middle, out)

    def _mix(self, layer: int) -> None:
        for window in self.windows():
            window[:], _ = self._layers.mix(layer, window)
        if not all(np.isfinite(window).all() for window in self.windows()):
            raise DymoeError(f"layer {layer}: the model's activations are not finite; copy the checkpoint again")

    def _route(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what the experts read, [T, H], and the routing, [T, k] each."""
        h, found = self._hidden(), []
        for window, normed in zip(self.windows(), np.split(h, len(self._ids)), strict=True):
            normed[:], *choice = self._layers.route(layer, window)
            found.append(choice)
        chosen, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return h, chosen, weights

    def _hidden(self) -> np.ndarray:
        """Return an array for hidden states, float32 [T, H]: in memory or, if it is too large, in a file."""
        shape = self._ids.size, self._spec.hidden_size
        if not spilled(*shape):
            return np.empty(shape, np.float32)
        with tempfile.TemporaryFile(dir=self._scratch) as file:
            return np.asarray(np.memmap(file, np.float32, "w+", shape=shape))


def open_origin(bundle: Bundle, path: Path, progress: Progress) -> Checkpoint:
    """Open the checkpoint `path`; raise DymoeError unless it is the one that `bundle` was compiled from."""
    checkpoint = Checkpoint.open(path)
    expected = bundle.manifest.provenance.get("source_sha256")
    step = 1 << 24
    with progress("reading", checkpoint.total_bytes() // step + 1) as advance:
        found = checkpoint.digest(advance, step)
    if expected is not None and found != expected:
        raise DymoeError(f"{path}: not the checkpoint that {bundle.path} was compiled from; give that to --checkpoint")
    return checkpoint


def windows_of(bundle: Bundle, calibration: Sequence[str]) -> Windows:
    """Return windows of the texts `calibration`, as much as `bundle` was calibrated with.

    Without texts, they are the compiler's own. Raises DymoeError if there is too little text, or if its tokens are not
    the model's.
    """
    known = bundle.manifest.provenance
    tokens, seed = int(known.get("calibration_token_limit", DEFAULT_TOKENS)), int(known.get("seed", 0))
    encode: Callable[[str], list[int]] = Tokenizer.load(bundle.path).encode
    windows = make_windows(load_texts(calibration), encode, bundle.spec.max_context, tokens, seed)
    bundle.spec.check_ids(windows.train.reshape(-1).tolist())
    return windows
