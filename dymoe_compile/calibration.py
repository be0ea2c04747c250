"""One pass of the calibration tokens through the original model, a layer in memory at a time.

Each layer's experts are quantized and written on the way, and what its router did is noted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from dymoe_compile.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.progress import Advance, Progress
from dymoe_compile.quantize import quantize_expert
from dymoe_compile.sensitivity import Original
from dymoe_compile.texts import Windows
from dymoe_compile.writer import BundleWriter
from dymoe_runtime.activations import ACTIVATIONS
from dymoe_runtime.bundle import LayerEntry, expert_layout
from dymoe_runtime.decoder import Decoder, Routing
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tiers import pack_record

# Tokens whose gates are kept per layer, to fit thresholds on.
GATE_SAMPLE = 4096


@dataclass
class LayerStatistics:
    """What the router of one layer did on the calibration tokens."""

    frequency: list[float]  # [experts], share of tokens
    gate_mass: list[float]  # [experts], share of all gates
    gates: torch.Tensor  # [sample, k], of single tokens
    chunk_importance: torch.Tensor  # [windows, experts], as prefill sees it
    chunk_energy: torch.Tensor  # [windows, experts], sum of squared gates
    recall: list[float]  # [ranks]: was the guess of this rank, made one layer earlier, chosen


def calibrate(
    checkpoint: Checkpoint,
    windows: Windows,
    ladder: tuple[int, ...],
    seed: int,
    writer: BundleWriter,
    progress: Progress,
) -> tuple[Original, dict[int, LayerStatistics], dict[int, LayerEntry]]:
    """Run all windows through the original model, a layer at a time, quantizing each layer's experts on the way."""
    spec = checkpoint.spec
    run = LayerRun(checkpoint, windows, ladder, seed, writer)
    statistics, layers, start, x = run.resume()
    with progress("experts", len(spec.moe_layers) * spec.num_experts) as advance:
        for _ in range(len(layers) * spec.num_experts):
            advance()
        for layer in range(start, spec.num_layers):
            x = run.layer(layer, x, statistics, layers, advance)
    held_out = x[windows.train.numel() :].split(windows.held_out.shape[1])
    return Original(held_out, run.decoder.logits), statistics, layers


class LayerRun:
    """One pass of the calibration windows through the original model, resumable after each layer.

    Hidden states [T, H] hold the tokens of the training windows first, then the held-out ones.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: Windows, ladder: tuple[int, ...], seed: int, writer: BundleWriter
    ) -> None:
        self.spec = checkpoint.spec
        self.decoder = Decoder(checkpoint.spec, CheckpointDense(checkpoint), self._experts)
        self._checkpoint = checkpoint
        self._ladder = ladder
        self._seed = seed
        self._writer = writer
        self._ids = torch.cat([windows.train, windows.held_out])
        self._train = len(windows.train)
        self._layout = expert_layout(checkpoint.spec, ladder)
        self._activation = ACTIVATIONS[checkpoint.spec.activation]
        self._advance: Advance = lambda: None
        self._routing: Routing | None = None
        self._entry: LayerEntry | None = None
        self._guess: torch.Tensor | None = None  # [T, k], made at the previous layer

    def resume(self) -> tuple[dict[int, LayerStatistics], dict[int, LayerEntry], int, torch.Tensor]:
        """Statistics, files, next layer and hidden states of an interrupted run, or of a fresh one."""
        for layer in reversed(range(self.spec.num_layers)):
            hidden = self._writer.load_state(f"hidden-{layer}")
            done = None if hidden is None else self._load_until(layer)
            if hidden is not None and done is not None:
                self._guess = hidden[0].get("guess")
                return *done, layer + 1, hidden[0]["x"]
        return {}, {}, 0, self.decoder.dense.embed(self._ids.reshape(-1))

    def _load_until(self, last: int) -> tuple[dict[int, LayerStatistics], dict[int, LayerEntry]] | None:
        """What an earlier run noted of the layers up to `last`, or None where any of it is missing or damaged."""
        statistics: dict[int, LayerStatistics] = {}
        layers: dict[int, LayerEntry] = {}
        for layer in self.spec.moe_layers:
            if layer > last:
                break
            loaded = self._load(layer)
            if loaded is None or not self._writer.layer_is_whole(loaded[1], self._layout):
                return None
            statistics[layer], layers[layer] = loaded
        return statistics, layers

    def layer(
        self,
        layer: int,
        x: torch.Tensor,
        statistics: dict[int, LayerStatistics],
        layers: dict[int, LayerEntry],
        advance: Advance,
    ) -> torch.Tensor:
        """Hidden states after `layer`, whose experts are written and whose statistics are noted."""
        self._advance = advance
        attended = [self.decoder.attend(layer, window, None, True) for window in x.split(self._ids.shape[1])]
        weights = torch.cat([weight for _, weight in attended if weight is not None])
        x = self.decoder.feed_forward(layer, torch.cat([window for window, _ in attended]), weights)
        if not torch.isfinite(x).all():
            raise DymoeError(
                f"layer {layer}: the model's activations are not finite; its weights or the numbers in config.json "
                "are out of range: copy the checkpoint again from the model's repository"
            )
        if layer not in self.spec.dense_layers:
            statistics[layer], layers[layer] = self._note(layer)
        self._guess = self._next_guess(layer)
        state = {"x": x} if self._guess is None else {"x": x, "guess": self._guess}
        self._writer.save_state(f"hidden-{layer}", state, {})
        self._writer.drop_state(f"hidden-{layer - 1}")
        return x

    def _experts(self, layer: int, h: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The experts seam while compiling: computes in full precision, quantizes and writes each expert."""
        y = torch.zeros_like(h)
        records = (self._expert(ExpertKey(layer, e), h, routing, y) for e in range(self.spec.num_experts))
        index = self.spec.moe_layers.index(layer)
        self._entry = self._writer.write_layer(index, layer, self._layout, records, self.spec.num_experts)
        self._routing = routing
        return y

    def _expert(self, key: ExpertKey, h: torch.Tensor, routing: Routing, y: torch.Tensor) -> np.ndarray:
        """Add one expert's output to y; its record."""
        weights = {name: matrix.float() for name, matrix in self._checkpoint.expert(key).items()}
        tokens, ranks = (routing.experts == key.expert).nonzero(as_tuple=True)
        x, gates = h[tokens], routing.gates[tokens, ranks, None]
        middle = self._activation(x @ weights["gate"].T) * (x @ weights["up"].T)
        y.index_add_(0, tokens, middle @ weights["down"].T * gates)
        self._advance()
        return pack_record(self._layout, quantize_expert(weights, self._ladder, _importance(x, middle, gates)))

    def _note(self, layer: int) -> tuple[LayerStatistics, LayerEntry]:
        assert self._routing is not None and self._entry is not None and self._routing.token_weights is not None
        tokens = self._train * self._ids.shape[1]
        routing = Routing(
            self._routing.experts[:tokens],
            self._routing.gates[:tokens],
            self._routing.residual[:tokens],
            self._routing.token_weights[:tokens],
        )
        guess = None if self._guess is None else self._guess[:tokens]
        seen = layer_statistics(routing, self._train, self.spec.num_experts, guess, self._seed)
        tensors = {name: value for name, value in vars(seen).items() if isinstance(value, torch.Tensor)}
        values = {name: value for name, value in vars(seen).items() if not isinstance(value, torch.Tensor)}
        self._writer.save_state(f"layer-{layer}", tensors, {"statistics": values, "entry": asdict(self._entry)})
        return seen, self._entry

    def _load(self, layer: int) -> tuple[LayerStatistics, LayerEntry] | None:
        state = self._writer.load_state(f"layer-{layer}")
        if state is None:
            return None
        tensors, values = state
        entry = values["entry"]
        entry["crc32"] = tuple(tuple(row) for row in entry["crc32"])
        return LayerStatistics(**{**values["statistics"], **tensors}), LayerEntry(**entry)

    def _next_guess(self, layer: int) -> torch.Tensor | None:
        """What this layer's residual stream makes the next layer's router choose."""
        if layer + 1 not in self.spec.moe_layers or layer in self.spec.dense_layers:
            return None
        assert self._routing is not None
        return self.decoder.look_ahead(layer + 1, self._routing.residual)[0]


def layer_statistics(
    routing: Routing, windows: int, experts: int, guess: torch.Tensor | None, seed: int
) -> LayerStatistics:
    """Statistics of one layer from the routing of all training tokens, `windows` equal windows of them.

    `guess` [T, k] is what the previous layer expected this router to choose.
    """
    tokens = len(routing.experts)
    counts = torch.bincount(routing.experts.reshape(-1), minlength=experts)
    mass = torch.zeros(experts).index_add_(0, routing.experts.reshape(-1), routing.gates.reshape(-1))
    assert routing.token_weights is not None
    importance = routing.gates * routing.token_weights[:, None]
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:GATE_SAMPLE]
    return LayerStatistics(
        frequency=_rounded(counts / tokens),
        gate_mass=_rounded(mass / mass.sum()),
        gates=routing.gates[sample],
        chunk_importance=_per_window(routing.experts, importance.clamp_min(1e-12), windows, experts),
        chunk_energy=_per_window(routing.experts, routing.gates.square(), windows, experts),
        recall=[] if guess is None else _recall(guess, routing.experts),
    )


def _recall(guess: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    """Share of tokens whose guess of each rank was among the chosen experts."""
    found = (guess[:, :, None] == chosen[:, None, :]).any(-1)
    return _rounded(found.float().mean(0))


def _per_window(experts: torch.Tensor, values: torch.Tensor, windows: int, size: int) -> torch.Tensor:
    """Sum `values` [T, k] by expert within each window, [windows, size]."""
    where = torch.arange(windows).repeat_interleave(experts.numel() // windows) * size + experts.reshape(-1)
    return torch.zeros(windows * size).index_add_(0, where, values.reshape(-1)).view(windows, size)


def _importance(x: torch.Tensor, middle: torch.Tensor, gates: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gate-weighted mean square of what multiplies each column; empty where too few tokens came by to tell."""
    if len(x) < x.shape[1]:
        return {}
    into, inside = (gates * x.square()).mean(0), (gates * middle.square()).mean(0)
    return {"gate": into, "up": into, "down": inside}


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
