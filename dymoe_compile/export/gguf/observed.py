"""What a pass of calibration text says of each matrix: the energy of its inputs, and the harm of rounding it.

The harm of a matrix is the squared error that it adds to the residual stream that leaves its layer, for each token, if
its weights are rounded to 4 bits. Matrices of experts are rounded one expert at a time; those of the dense part are
rounded one at a time for the first windows only. What comes before the experts of a layer is read by them through a
norm, so that a relative error of the stream there is one of their output, too: its error grows as the stream does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.torch_ops import run_expert
from dymoe_compile.checkpoint.window_decoder import window_decoder
from dymoe_compile.export.matrices import Format, rounded, values_of
from dymoe_compile.export.source import ROWS_AT_ONCE
from dymoe_compile.export.walk import Seen, Walk
from dymoe_compile.job.progress import Progress
from dymoe_runtime.bundle.bundle import dense_kind
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.score import score_window
from dymoe_runtime.spec import MATRICES, ModelSpec

# The rounding whose harm is measured.
ROUNDING = Format(4, 32)
# Tokens for which the dense part is rounded.
PROBED = 4096


@dataclass
class Inputs:
    """Sums of squared inputs of a matrix by column, float64 [cols], and the number of inputs; one for each expert."""

    sums: np.ndarray  # [matrices, cols]
    counts: np.ndarray  # [matrices]

    @classmethod
    def none(cls, matrices: int, cols: int) -> Inputs:
        """Return sums of no inputs."""
        return cls(np.zeros((matrices, cols)), np.zeros(matrices, np.int64))

    def add(self, index: int, x: np.ndarray) -> None:
        """Add inputs x [n, cols] of one matrix."""
        self.sums[index] += np.square(x, dtype=np.float64).sum(axis=0)
        self.counts[index] += len(x)


@dataclass
class Observed:
    """What a pass of text has shown, by names of the bundle; `LAYER.MATRIX` are matrices of all experts of a layer.

    `errors` are squared errors per token in the residual stream; that of the head, named `head`, is a KL. `noise` are
    the squared errors of the rounded weights, relative to the squared weights, both weighted by the inputs.
    """

    inputs: dict[str, Inputs] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    energy: dict[int, np.ndarray] = field(default_factory=dict)  # layer -> [experts], squares of outputs per token
    tokens: int = 0


def observe(checkpoint: Checkpoint, ids: np.ndarray, kernels: Kernels, scratch: Path, progress: Progress) -> Observed:
    """Return what windows of ids int64 [windows, W] show in a pass through the original model."""
    observed = Observed(tokens=ids.size)
    layers = _Layers(checkpoint, kernels, observed, max(1, PROBED // ids.shape[1]))
    walk = Walk(checkpoint, layers, ids, scratch)
    with progress("importance", checkpoint.spec.num_layers) as advance:
        for layer in checkpoint.spec.moe_layers:
            sums = _ExpertSums(checkpoint.spec, layer)
            for seen in walk.experts(layer):
                sums.add(seen)
            sums.finish(observed)
            advance()
        walk.pass_dense(checkpoint.spec.num_layers)
        layers.grow_errors()
        layers.observe_head(ids, walk.windows())
    return observed


class _ExpertSums:
    """The sums over the experts of one layer."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        self._layer, self._activation = layer, spec.activation
        shapes = spec.expert_shapes
        self._inputs = {name: Inputs.none(spec.num_experts, shapes[name][1]) for name in MATRICES}
        self._errors = dict.fromkeys(MATRICES, 0.0)
        self._off, self._whole = dict.fromkeys(MATRICES, 0.0), dict.fromkeys(MATRICES, 0.0)
        self._energy = np.zeros(spec.num_experts)

    def add(self, seen: Seen) -> None:
        """Add one expert."""
        index = seen.key.expert
        self._energy[index] = float((seen.out * seen.shares).square().sum(dtype=torch.float64))
        for name in MATRICES:
            x = seen.middle if name == "down" else seen.x
            # As the descent weights its moments: by the routing weight, see `quantize/moments.py`.
            self._inputs[name].add(index, (x * seen.shares.sqrt()).numpy())
            self._inputs[name].counts[index] = len(x)
            coarse = _rounded(seen.tensors[name])
            _, out = run_expert({**seen.tensors, name: coarse}, seen.x, self._activation)
            self._errors[name] += float(((out - seen.out) * seen.shares).square().sum(dtype=torch.float64))
            off, whole = _weighted(seen.tensors[name], coarse, self._inputs[name].sums[index])
            self._off[name] += off
            self._whole[name] += whole

    def finish(self, observed: Observed) -> None:
        """Keep the sums of the layer."""
        observed.energy[self._layer] = self._energy / observed.tokens
        for name in MATRICES:
            key = f"{self._layer}.{name}"
            observed.inputs[key] = self._inputs[name]
            observed.errors[key] = self._errors[name] / observed.tokens
            observed.noise[key] = self._off[name] / max(self._whole[name], 1e-30)


class _Dense(CheckpointDense):
    """The dense weights of a checkpoint, which sums the squares of what they multiply; one can be rounded."""

    def __init__(self, checkpoint: Checkpoint, observed: Observed) -> None:
        super().__init__(checkpoint)
        self._observed = observed
        self._shapes = checkpoint.spec.tensor_shapes()
        self._coarse: tuple[str, torch.Tensor] | None = None

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        if self._coarse is None and dense_kind(name, self._shapes[name]):
            inputs = self._observed.inputs.setdefault(name, Inputs.none(1, x.shape[1]))
            inputs.add(0, x)
        return super().linear(name, x)

    @contextmanager
    def rounding(self, name: str) -> Iterator[None]:
        """Round a matrix within this context, in which nothing is observed."""
        self._coarse = name, _rounded(self._tensor(name).float())
        try:
            yield
        finally:
            self._coarse = None

    def noise(self, name: str) -> float:
        """Return the squared error of a rounded matrix relative to its squares, weighted by the inputs so far."""
        weight = super()._tensor(name).float()  # even while it is rounded
        off, whole = _weighted(weight, _rounded(weight), self._observed.inputs[name].sums[0])
        return off / max(whole, 1e-30)

    def plain_noise(self, name: str) -> float:
        """Return the squared error of a rounded matrix relative to its squares."""
        weight = self._tensor(name).float()
        return float((_rounded(weight) - weight).square().sum() / weight.square().sum().clamp_min(1e-30))

    def _tensor(self, name: str) -> torch.Tensor:
        if self._coarse is not None and self._coarse[0] == name:
            return self._coarse[1]
        return super()._tensor(name)


class _Layers:
    """The layers of the original model, which measures the harm of rounding dense matrices for its first windows."""

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels, observed: Observed, windows: int) -> None:
        self._dense = _Dense(checkpoint, observed)
        self._decoder = window_decoder(checkpoint.spec, self._dense, kernels)
        self._observed, self._spec = observed, checkpoint.spec
        self._windows = windows
        self._left: dict[str, int] = {}
        self._grown: dict[
            int, list[float]
        ] = {}  # layer -> squares of the stream that experts read, and of their output
        self.route = self._decoder.route

    def embed(self, ids: np.ndarray) -> np.ndarray:
        x = self._decoder.embed(ids)
        if self._takes("embed"):
            with self._dense.rounding("embed"):
                self._add("embed", self._decoder.embed(ids), x)
        return x

    def mix(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y, weights = self._decoder.mix(layer, x)
        kinds = ("attn", "delta", *(("mlp", "shared") if self._spec.layers[layer].parallel else ()))
        for name in self._matrices(layer, kinds):
            with self._dense.rounding(name):
                self._add(name, self._decoder.mix(layer, x)[0], y)
        return y, weights

    def feed_forward(self, layer: int, x: np.ndarray, read: np.ndarray) -> np.ndarray:
        y = self._decoder.feed_forward(layer, x, read)
        for name in self._matrices(layer, ("mlp",)):
            with self._dense.rounding(name):
                self._add(name, self._decoder.feed_forward(layer, x, read), y)
        return y

    def finish(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        done = self._decoder.finish(layer, x, y)
        before, added = (float(np.square(values, dtype=np.float64).sum()) for values in (x, done - x))
        known = self._grown.setdefault(layer, [0.0, 0.0])
        known[0], known[1] = known[0] + before, known[1] + added
        kinds = () if self._spec.layers[layer].parallel else ("shared",)
        for name in self._matrices(layer, kinds):
            with self._dense.rounding(name):
                self._add(name, self._decoder.finish(layer, x, y), done)
        return done

    def grow_errors(self) -> None:
        """Make the errors before the experts of a layer those that leave the layer."""
        for layer, (before, added) in self._grown.items():
            names = [name for name in self._observed.errors if name.startswith(f"layers.{layer}.attn.")]
            for name in (*names, *(["embed"] if layer == 0 else [])):
                self._observed.errors[name] *= 1 + added / max(before, 1e-30)

    def observe_head(self, ids: np.ndarray, windows: list[np.ndarray]) -> None:
        """Measure the KL of a rounded head, for windows of ids [windows, W] and their hidden states [W, H]."""
        head = self._spec.head
        kls = []
        for row, window in list(zip(ids, windows, strict=True))[: self._windows]:
            logits = self._decoder.logits(window)
            with self._dense.rounding(head):
                coarse = self._decoder.logits(window)
            score = score_window(row, coarse, _same, (logits, _same))
            kls.append(score.kl_sum / score.compared)
        self._observed.errors["head"] = float(np.mean(kls))
        self._observed.noise["head"] = self._dense.noise(head)
        self._observed.noise["embed"] = self._dense.plain_noise("embed")

    def _matrices(self, layer: int, kinds: tuple[str, ...]) -> list[str]:
        """Return the matrices of these kinds to round for this window."""
        prefix = f"layers.{layer}."
        names = [name for name, shape in self._spec.each_tensor() if name.startswith(prefix)]
        shapes = self._spec.tensor_shapes()
        return [name for name in names if dense_kind(name, shapes[name]) in kinds and self._takes(name)]

    def _takes(self, name: str) -> bool:
        """Return whether a matrix is to be rounded for one more window."""
        self._left[name] = self._left.get(name, self._windows) - 1
        return self._left[name] >= 0

    def _add(self, name: str, coarse: np.ndarray, exact: np.ndarray) -> None:
        """Add the squared error of a window to that of a matrix."""
        error = float(np.square(coarse - exact, dtype=np.float64).sum()) / (len(exact) * self._windows)
        self._observed.errors[name] = self._observed.errors.get(name, 0.0) + error
        if name != "embed" and name not in self._observed.noise:
            self._observed.noise[name] = self._dense.noise(name)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    coarse = torch.empty_like(weight)
    for rows, exact in zip(torch.split(coarse, ROWS_AT_ONCE), torch.split(weight, ROWS_AT_ONCE), strict=True):
        rows.copy_(torch.from_numpy(values_of(rounded(exact.numpy(), ROUNDING), ROUNDING)))
    return coarse


def _weighted(weight: torch.Tensor, coarse: torch.Tensor, energy: np.ndarray) -> tuple[float, float]:
    """Return the squared error and the squares of a weight [rows, cols], by the energy of its inputs [cols]."""
    by_column = torch.from_numpy(energy)
    off, whole = ((values.double().square() @ by_column).sum() for values in (coarse - weight, weight))
    return float(off), float(whole)


def _same(logits: np.ndarray) -> np.ndarray:
    return logits
