"""One pass of the calibration tokens through the original model, with one layer in memory at a time.

The pass quantizes and writes the experts of each layer, and records statistics of its router.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from dymoe_compile.calibrate.predictor import LookAheadFit, LookAheadProbe
from dymoe_compile.calibrate.statistics import LayerStatistics, layer_statistics, significant
from dymoe_compile.calibrate.texts import Windows
from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.torch_ops import run_expert
from dymoe_compile.checkpoint.window_decoder import window_decoder
from dymoe_compile.job.progress import Advance, Progress
from dymoe_compile.job.writer import BundleWriter
from dymoe_compile.plan.sizes import spilled
from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.moments import moments
from dymoe_compile.quantize.mxfp4 import mxfp4_expert
from dymoe_compile.quantize.quantize import quantize_expert
from dymoe_runtime.bundle.bundle import LayerEntry, expert_layout
from dymoe_runtime.bundle.tiers import MXFP4, pack_record, split_record
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.interface import Kernels, ffn
from dymoe_runtime.model.routing import PromptRouting, chunk_lengths, in_groups
from dymoe_runtime.model.score import Head
from dymoe_runtime.spec import ExpertKey

# Names of `LookAheadProbe.past` in the saved state.
PAST = ("past-1", "past-2")
# Tokens on which an expert's error is measured: its last ones, since the held-out tokens come last.
ERROR_SAMPLE = 64


@dataclass
class LayerResults:
    """Results of the layers that are done: router statistics and file entries, by layer."""

    statistics: dict[int, LayerStatistics] = field(default_factory=dict)
    layers: dict[int, LayerEntry] = field(default_factory=dict)

    def add(self, layer: int, statistics: LayerStatistics, entry: LayerEntry) -> None:
        """Add the results of one layer."""
        self.statistics[layer], self.layers[layer] = statistics, entry


@dataclass(frozen=True)
class Calibrated:
    """Results of a calibration, and the original model's final hidden states of each held-out window, [T, H]."""

    statistics: Mapping[int, LayerStatistics]
    layers: Mapping[int, LayerEntry]
    hidden: Sequence[np.ndarray]
    head: Head


def calibrate(
    checkpoint: Checkpoint,
    windows: Windows,
    ladder: tuple[int, ...],
    seed: int,
    writer: BundleWriter,
    kernels: Kernels,
    progress: Progress,
) -> Calibrated:
    """Run all windows through the original model, layer by layer; quantize and write the experts of each layer.

    An interrupted run continues after its last saved layer. Raises DymoeError if the model's activations are not
    finite.
    """
    spec = checkpoint.spec
    run = LayerRun(checkpoint, windows, ladder, seed, writer, kernels)
    done, start, x = run.resume()
    with progress("experts", spec.total_experts) as advance:
        for _ in range(len(done.layers) * spec.num_experts):
            advance()
        for layer in range(start, spec.num_layers):
            found = run.layer(layer, x, advance)
            if found is not None:
                done.add(layer, *found)
    held_out = in_groups(x[windows.train.size :], windows.held_out.shape[1])
    return Calibrated(done.statistics, done.layers, held_out, run.decoder.logits)


@dataclass
class _Judged:
    """Errors of one layer's experts so far, and the experts with too few tokens to calibrate."""

    errors: dict[int, list[float]]  # tier -> [experts]
    data_free: list[int] = field(default_factory=list)


class _Routed(NamedTuple):
    """What the router of a layer has chosen, and how well earlier layers guess that."""

    h: np.ndarray  # [T, H], the input of the experts
    experts: np.ndarray  # int64 [T, k]
    weights: np.ndarray  # float32 [T, k]
    guesses: LookAheadFit


class LayerRun:
    """One pass of the calibration windows through the original model, resumable after each layer.

    Hidden states [T, H] hold the tokens of the training windows first, then the held-out ones.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Windows,
        ladder: tuple[int, ...],
        seed: int,
        writer: BundleWriter,
        kernels: Kernels,
    ) -> None:
        self.spec = checkpoint.spec
        self.decoder = window_decoder(checkpoint.spec, CheckpointDense(checkpoint), kernels)
        self._checkpoint = checkpoint
        self._kernels = kernels
        self._descent = load_descent(kernels)
        self._ladder = ladder
        self._seed = seed
        self._writer = writer
        self._ids = np.concatenate([windows.train, windows.held_out])
        self._train = windows.train.size
        self._layout = expert_layout(checkpoint.spec, ladder)
        self._probe = LookAheadProbe(self.decoder, self._train, self._ids.size, seed)

    def resume(self) -> tuple[LayerResults, int, np.ndarray]:
        """Return (results so far, next layer, hidden states entering it), of an interrupted run or of a fresh one."""
        for layer in reversed(range(self.spec.num_layers)):
            hidden = self._writer.load_state(f"hidden-{layer}")
            done = None if hidden is None else self._load_until(layer)
            if hidden is not None and done is not None:
                tensors = hidden[0]
                self._probe.resume([tensors[name].numpy() for name in PAST if name in tensors])
                x = self._hidden()
                for part, name in zip(np.split(x, [len(tensors["train"])]), ("train", "held_out"), strict=True):
                    torch.from_numpy(part).copy_(tensors[name])
                return done, layer + 1, x
        x = self._hidden()
        for ids, window in zip(self._ids, self._windows(x), strict=True):
            window[:] = self.decoder.embed(ids)
        return LayerResults(), 0, x

    def layer(self, layer: int, x: np.ndarray, advance: Advance) -> tuple[LayerStatistics, LayerEntry] | None:
        """Run hidden states x [T, H] through `layer`, in place, and save the results for a later run.

        Returns the router statistics and the file entry of the experts, or None for a layer without experts. Raises
        DymoeError if the result is not finite.
        """
        # In a parallel layer, the router reads what enters the mixer, which overwrites it here.
        early = self.spec.is_moe(layer) and self.spec.layers[layer].parallel
        routed = self._route(layer, x) if early else None
        token_weights = np.empty(len(x), np.float32)
        for window, weights in zip(self._windows(x), self._windows(token_weights), strict=True):
            window[:], weights[:] = self.decoder.mix(layer, window, weigh=True)
        found = None
        if self.spec.is_moe(layer):
            found = self._run_experts(layer, x, routed or self._route(layer, x), token_weights, advance)
        else:
            self._probe.forget()
            for window in self._windows(x):
                window[:] = self.decoder.feed_forward(layer, window, window)
        if not all(np.isfinite(window).all() for window in self._windows(x)):
            raise DymoeError(
                f"layer {layer}: the model's activations are not finite; its weights or the numbers in config.json "
                "are out of range: copy the checkpoint again from the model's repository"
            )
        if found is not None:
            self._save(layer, *found)
        self._save_hidden(layer, x)
        return found

    def _hidden(self) -> np.ndarray:
        """Return an array for hidden states, float32 [T, H]: in memory or, if it is too large, in a file."""
        shape = self._ids.size, self.spec.hidden_size
        return self._writer.scratch(shape) if spilled(*shape) else np.empty(shape, np.float32)

    def _windows(self, x: np.ndarray) -> list[np.ndarray]:
        return in_groups(x, self._ids.shape[1])

    def _route(self, layer: int, x: np.ndarray) -> _Routed:
        """Ask the router of a layer about the residual stream x [T, H], which it reads."""
        h = self._hidden()
        chosen = []
        for window, normed in zip(self._windows(x), self._windows(h), strict=True):
            normed[:], *choice = self.decoder.route(layer, window)
            chosen.append(choice)
        experts, weights = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
        return _Routed(h, experts, weights, self._probe.judge(layer, experts, x))

    def _run_experts(
        self, layer: int, x: np.ndarray, routed: _Routed, token_weights: np.ndarray, advance: Advance
    ) -> tuple[LayerStatistics, LayerEntry]:
        """Add what the experts make of their input to x [T, H]; quantize and write each expert on the way."""
        h, experts, weights, fit = routed
        self._probe.remember(x)  # before the experts add to it
        judged = _Judged({tier: [] for tier in self._ladder})
        y = x  # what the experts add to
        if not self.decoder.only_adds(layer):
            y = self._hidden()
            y[:] = 0

        def records() -> Iterator[np.ndarray]:
            for expert in range(self.spec.num_experts):
                yield self._expert(ExpertKey(layer, expert), h, (experts, weights), y, judged)
                advance()

        index = self.spec.moe_layers.index(layer)
        entry = self._writer.write_layer(index, layer, self._layout, records(), self.spec.num_experts)
        if y is not x:
            for window, output in zip(self._windows(x), self._windows(y), strict=True):
                window[:] = self.decoder.finish(layer, window, output)
        train = slice(0, self._train)
        by_share = self.spec.moe.router.weighs_by_share
        windows = chunk_lengths(self._train, self._ids.shape[1])
        routing = PromptRouting(experts[train], weights[train], x[train], token_weights[train], windows, by_share)
        seen = layer_statistics(routing, self.spec.num_experts, self._seed)
        found = replace(
            seen,
            look_ahead={"router": fit.router, "linear": fit.linear, "two_ahead": fit.two_ahead},
            predictor=fit.predictor,
            expert_error={str(tier): errors for tier, errors in judged.errors.items()},
            data_free=judged.data_free,
        )
        return found, entry

    def _expert(
        self, key: ExpertKey, h: np.ndarray, chosen: tuple[np.ndarray, np.ndarray], y: np.ndarray, judged: _Judged
    ) -> np.ndarray:
        """Add the output of one expert for h [T, H] to y [T, H], and return its quantized record.

        `chosen` is (experts, weights), [T, k] each.
        """
        matrices = {name: matrix.float() for name, matrix in self._checkpoint.expert(key).items()}
        tokens, ranks = np.nonzero(chosen[0] == key.expert)  # a token chooses an expert once
        x, weights = torch.from_numpy(h[tokens]), torch.from_numpy(chosen[1][tokens, ranks, None])
        middle, out = run_expert(matrices, x, self.spec.activation)
        torch.from_numpy(y).index_add_(0, torch.from_numpy(tokens), out * weights)
        # Tokens come in order, training windows first; held-out tokens must not affect the quantization.
        train = int((tokens < self._train).sum())
        into, inside = moments(x[:train], weights[:train]), moments(middle[:train], weights[:train])
        by_name = {"gate": into, "up": into, "down": inside}
        vectors = {name: matrices.pop(name).numpy() for name in self._layout.vectors}
        if self.spec.expert_grid == MXFP4:
            codes = mxfp4_expert(matrices, self._ladder)
        else:
            codes = quantize_expert(matrices, self._ladder, self._descent, by_name, self.spec.expert_grid)
        record = pack_record(self._layout, codes, vectors)
        self._judge(key, record, x[-ERROR_SAMPLE:], out[-ERROR_SAMPLE:], weights[-ERROR_SAMPLE:], judged)
        if not (into.enough and inside.enough):
            judged.data_free.append(key.expert)
        return record

    def _judge(
        self,
        key: ExpertKey,
        record: np.ndarray,
        x: torch.Tensor,
        out: torch.Tensor,
        weights: torch.Tensor,
        judged: _Judged,
    ) -> None:
        """Append the relative squared error of a record at each tier, computed as the runtime does, to `judged`.

        Raises DymoeError if it is not finite.
        """
        segments = split_record(self._layout, record)
        square = (weights * out).square().sum().item()
        for tier, errors in judged.errors.items():
            ours = ffn(self._kernels, self._layout, tier, segments, x.numpy(), self.spec.activation)
            off = torch.from_numpy(ours) - out
            errors.append(significant((weights * off).square().sum().item() / square) if square > 0 else 0.0)
            if not math.isfinite(square + errors[-1]):
                raise DymoeError(
                    f"expert {key}: the square of its output at {tier} bits is not finite; its weights are out of "
                    "range: copy the checkpoint again"
                )

    def _save_hidden(self, layer: int, x: np.ndarray) -> None:
        """Save the hidden states after `layer`.

        Training rows are rounded to bf16, in x too, so that a resumed run continues with the same values. Held-out
        rows stay float32, because quality is measured against them.
        """
        train = x[: self._train]
        half = torch.from_numpy(train).to(torch.bfloat16)
        torch.from_numpy(train).copy_(half)
        whole = {"held_out": x[len(train) :], **dict(zip(PAST, self._probe.past, strict=False))}
        tensors = {name: torch.from_numpy(values) for name, values in whole.items()}
        self._writer.save_state(f"hidden-{layer}", {"train": half, **tensors}, {})
        self._writer.drop_state(f"hidden-{layer - 1}")

    def _save(self, layer: int, statistics: LayerStatistics, entry: LayerEntry) -> None:
        arrays = {name: value for name, value in vars(statistics).items() if isinstance(value, np.ndarray)}
        values = {name: value for name, value in vars(statistics).items() if name not in arrays}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._writer.save_state(f"layer-{layer}", tensors, {"statistics": values, "entry": asdict(entry)})

    def _load(self, layer: int) -> tuple[LayerStatistics, LayerEntry] | None:
        state = self._writer.load_state(f"layer-{layer}")
        if state is None:
            return None
        tensors, values = state
        entry = values["entry"]
        entry["crc32"] = tuple(tuple(row) for row in entry["crc32"])
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return LayerStatistics(**{**values["statistics"], **arrays}), LayerEntry(**entry)

    def _load_until(self, last: int) -> LayerResults | None:
        """Return the saved results of the layers up to `last`, or None if any of them is missing or damaged."""
        done = LayerResults()
        for layer in self.spec.moe_layers:
            if layer > last:
                break
            loaded = self._load(layer)
            if loaded is None or not self._writer.layer_is_whole(loaded[1], self._layout):
                return None
            done.add(layer, *loaded)
        return done
