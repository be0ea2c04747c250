"""What the quality benchmarks share: held-out windows, rules out of compile.json, baselines, and intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dymoe_compile.calibration import moments
from dymoe_compile.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.quantize import Moments
from dymoe_compile.reference import CheckpointExperts, open_reference
from dymoe_compile.sensitivity import Decoding, Original, Rule, Static
from dymoe_runtime.activations import ACTIVATIONS
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.decoder import Decoder, Routing, in_groups
from dymoe_runtime.dense import BundleDense
from dymoe_runtime.evaluate import Score, score_window
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.text import Tokenizer

WINDOW = 512
SAMPLES = 2000

# [experts, rows, cols] by matrix name
Stack = dict[str, torch.Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Whole windows of texts, and what the original model makes of them."""

    ids: np.ndarray  # int64 [n, W]
    domains: list[str]  # of each window
    original: Original


def load_windows(model: Path, texts: Sequence[str], nbytes: int) -> tuple[np.ndarray, list[str]]:
    """The first `nbytes` of each text, cut into whole windows."""
    tokenizer = Tokenizer.load(model)
    windows, domains = [], []
    for text in texts:
        ids = tokenizer.encode(Path(text).read_bytes()[:nbytes].decode(errors="ignore"))
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            windows.append(np.array(ids[start : start + WINDOW]))
            domains.append(Path(text).stem)
    if not windows:
        raise SystemExit(f"{nbytes} bytes of each text hold no window of {WINDOW} tokens; give more")
    return np.stack(windows), domains


def held_out(model: Path, texts: Sequence[str], nbytes: int) -> HeldOut:
    ids, domains = load_windows(model, texts, nbytes)
    decoder = open_reference(model)
    return HeldOut(ids, domains, Original([decoder.forward(window) for window in ids], decoder.logits))


def compared_rules(bundle: Bundle) -> dict[tuple[str, str], Rule]:
    """(name, kind) -> every rule that was measured while compiling; kind mixed are the thresholds fitted per layer."""
    findings = json.loads((bundle.path / "compile.json").read_text())
    pinned = tuple(layer.pinned for layer in bundle.policy.layers)
    rules: dict[tuple[str, str], Rule] = {}
    for entry in findings["compared"]:
        key = entry["name"], entry["kind"]
        if entry["kind"] == "static":
            rules[key] = Static(tuple(map(tuple, entry["tiers"])))
        else:
            decode = tuple(map(tuple, entry["decode"]))
            mine = () if entry["kind"] == "uniform" else pinned
            rules[key] = Decoding(TierRule(bundle.manifest.ladder, decode, decode, mine))
    return rules


def emitted_rules(bundle: Bundle) -> dict[str, Rule]:
    """Name -> the rule of every operating point of the policy."""
    pinned = tuple(layer.pinned for layer in bundle.policy.layers)
    ladder = bundle.manifest.ladder
    return {
        point.name: Decoding(TierRule(ladder, point.decode, point.prefill, pinned if point.kind == "mixed" else ()))
        for point in bundle.policy.points
    }


def calibration_moments(model: Path, windows: np.ndarray) -> list[dict[str, list[Moments]]]:
    """Per layer and matrix the moments of each expert's inputs, from the original model."""
    checkpoint = Checkpoint.open(model)
    spec, activation = checkpoint.spec, ACTIVATIONS[checkpoint.spec.activation]
    experts = CheckpointExperts(checkpoint)
    layers: list[dict[str, list[Moments]]] = []

    def recording(layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        found: dict[str, list[Moments]] = {"gate": [], "up": [], "down": []}
        for expert in range(spec.num_experts):
            weights = {n: w.float() for n, w in checkpoint.expert(ExpertKey(layer, expert)).items()}
            tokens, ranks = np.nonzero(routing.experts == expert)
            x, gates = torch.from_numpy(h[tokens]), torch.from_numpy(routing.gates[tokens, ranks, None])
            into = moments(x, gates)
            inside = moments(activation(x @ weights["gate"].T) * (x @ weights["up"].T), gates)
            for name, value in (("gate", into), ("up", into), ("down", inside)):
                found[name].append(value)
        layers.append(found)
        return experts(layer, h, routing)

    decoder = Decoder(spec, CheckpointDense(checkpoint), recording)
    x = decoder.dense.embed(windows.reshape(-1))
    for layer in range(spec.num_layers):
        x = np.concatenate([decoder.attend(layer, window)[0] for window in in_groups(x, windows.shape[1])])
        x = decoder.feed_forward(layer, x)
    return layers


class Simulated:
    """The model with the dense weights of a bundle and experts from float matrices, one set per tier."""

    def __init__(self, bundle: Bundle, tiers: Mapping[int, Sequence[Stack]]) -> None:
        self._tiers = tiers
        self._spec = bundle.spec
        self._activation = ACTIVATIONS[bundle.spec.activation]
        self._rule: Rule | None = None
        self._decoder = Decoder(bundle.spec, BundleDense(bundle), self._experts)

    def measure(self, rule: Rule, texts: HeldOut) -> list[Score]:
        """A score per window."""
        self._rule = rule
        scores = []
        for ids, hidden in zip(texts.ids, texts.original.hidden, strict=True):
            reference = (hidden, texts.original.head)
            scores.append(score_window(ids, self._decoder.forward(ids), self._decoder.logits, reference))
        return scores

    def _experts(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        assert self._rule is not None
        chosen = self._rule.choose(layer, [routing])
        y = np.zeros_like(h)
        for tier, layers in self._tiers.items():
            stack = layers[self._spec.moe_layers.index(layer)]
            for expert in np.unique(routing.experts[chosen == tier]).tolist():
                tokens, ranks = np.nonzero((routing.experts == expert) & (chosen == tier))  # each token once
                x = torch.from_numpy(h[tokens])
                middle = self._activation(x @ stack["gate"][expert].T) * (x @ stack["up"][expert].T)
                y[tokens] += (middle @ stack["down"][expert].T).numpy() * routing.gates[tokens, ranks, None]
        return y


def uniform(bundle: Bundle, tier: int) -> Rule:
    """Every expert at `tier`; of any ladder, as far as Simulated is concerned."""
    return Static(((tier,) * bundle.spec.num_experts,) * bundle.spec.num_layers)


def originals(model: Path) -> Iterator[tuple[int, Stack]]:
    """(index of the MoE layer, its matrices in float32)."""
    checkpoint = Checkpoint.open(model)
    for index, layer in enumerate(checkpoint.spec.moe_layers):
        experts = [checkpoint.expert(ExpertKey(layer, e)) for e in range(checkpoint.spec.num_experts)]
        yield index, {name: torch.stack([expert[name].float() for expert in experts]) for name in experts[0]}


def quantized(
    model: Path, quantize: Callable[[torch.Tensor, Moments], torch.Tensor], found: Sequence[Mapping[str, list[Moments]]]
) -> list[Stack]:
    """Every expert matrix through `quantize`, as floats."""
    return [
        {
            name: torch.stack([quantize(w, m) for w, m in zip(stack[name], found[index][name], strict=True)])
            for name in stack
        }
        for index, stack in originals(model)
    ]


def rtn(weight: torch.Tensor, bits: int, group: int = 64) -> torch.Tensor:
    """Plain rounding: best of 20 clips per group, symmetric, exact scales."""
    w = weight.view(len(weight), -1, group)
    largest = w.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    best, least = torch.zeros_like(w), torch.full_like(largest, float("inf"))
    for step in range(20):
        scale = (largest * (1 - 0.03 * step)).clamp_min(1e-12)
        value = ((w / scale + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1) - (2**bits - 1) / 2) * scale
        error = (value - w).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, value, best), torch.minimum(error, least)
    return best.view_as(weight)


def gptq(weight: torch.Tensor, found: Moments, bits: int, group: int = 64) -> torch.Tensor:
    """GPTQ (arXiv 2210.17323) with groups, scales of each group from its compensated weights."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(found.ridged().double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w, out = weight.clone(), torch.empty_like(weight)
    for start in range(0, w.shape[1], group):
        columns = w[:, start : start + group]
        largest = columns.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
        grids = [rtn_scale for rtn_scale in (largest * (1 - 0.03 * step) for step in range(20))]
        errors = torch.stack([(_nearest(columns, scale, bits) - columns).square().sum(-1) for scale in grids])
        scale = torch.stack(grids)[errors.argmin(0), torch.arange(len(w))]
        for j in range(start, min(start + group, w.shape[1])):
            out[:, j] = _nearest(w[:, j, None], scale, bits)[:, 0]
            error = (w[:, j] - out[:, j]) / upper[j, j]
            w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return out


def _nearest(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return ((w / scale.clamp_min(1e-12) + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1) - (2**bits - 1) / 2) * scale


def kl(scores: Sequence[Score]) -> float:
    return sum(s.kl_sum for s in scores) / sum(s.compared for s in scores)


def perplexity_ratio(scores: Sequence[Score], reference: Sequence[Score]) -> float:
    difference = sum(s.nll_sum for s in scores) - sum(s.nll_sum for s in reference)
    return math.exp(difference / sum(s.tokens for s in scores))


def interval_of_ratio(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval, over windows drawn together, of mean(a) / mean(b)."""
    picks = np.random.default_rng(seed).integers(len(a), size=(SAMPLES, len(a)))
    low, high = np.quantile(a[picks].mean(1) / b[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def per_window(scores: Sequence[Score]) -> np.ndarray:
    return np.array([s.kl_sum / s.compared for s in scores])


def log_softmax_nll(texts: HeldOut) -> list[Score]:
    """Scores of the original itself."""
    return [
        score_window(ids, hidden, texts.original.head)
        for ids, hidden in zip(texts.ids, texts.original.hidden, strict=True)
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
