"""What the quality benchmarks share: held-out windows, rules out of compile.json, baselines, and intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.original import CheckpointExperts, open_original
from dymoe_compile.checkpoint.torch_ops import ACTIVATIONS
from dymoe_compile.checkpoint.window_decoder import bundle_decoder, window_decoder
from dymoe_compile.policy.sensitivity import Decoding, Original, Rule, Static
from dymoe_compile.quantize.moments import Moments, moments
from dymoe_runtime.bundle.bundle import FINDINGS, Bundle
from dymoe_runtime.bundle.tiers import BLOCK
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.routing import PromptRouting, Routing, in_groups
from dymoe_runtime.model.score import Score, score_window
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.text.tokenizer import Tokenizer

WINDOW = 512
SAMPLES = 2000

# [experts, rows, cols] by matrix name
Stack = dict[str, torch.Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Whole windows of texts, with the hidden states of the original model."""

    ids: np.ndarray  # int64 [n, W]
    domains: list[str]  # of each window
    original: Original


def load_windows(model: Path, texts: Sequence[str], nbytes: int) -> tuple[np.ndarray, list[str]]:
    """Return whole windows [n, W] of the first `nbytes` of each text, and the name of the text of each."""
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


def held_out(model: Path, texts: Sequence[str], nbytes: int, kernels: Kernels) -> HeldOut:
    """Run the first `nbytes` of each text through the original model."""
    ids, domains = load_windows(model, texts, nbytes)
    original = open_original(model, kernels)
    return HeldOut(ids, domains, Original([original.hidden(window) for window in ids], original.logits))


def calibration_windows(bundle: Bundle, model: Path, texts: Sequence[str]) -> np.ndarray:
    """Return windows [n, W] of as many random tokens of the texts as the bundle was calibrated on."""
    windows, _ = load_windows(model, texts, 1 << 30)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).numpy()
    tokens = int(bundle.manifest.provenance["calibration_tokens"])
    return windows[order[: tokens // windows.shape[1]]]


def compared_rules(bundle: Bundle) -> dict[tuple[str, str], Rule]:
    """Return every rule that was measured while compiling, by (name, kind).

    Rules of the kind mixed have thresholds fitted per layer.
    """
    findings = json.loads((bundle.path / FINDINGS).read_text())
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
    """Return the rule of every operating point of the policy, by its name."""
    return {point.name: Decoding(TierRule.of(point, bundle.policy)) for point in bundle.policy.points}


def through_layers(
    decoder: Decoder, windows: np.ndarray, experts: Callable[[int, np.ndarray, Routing], np.ndarray]
) -> np.ndarray:
    """Run windows [n, W] through a decoder, layer by layer; return their hidden states [n * W, H].

    `experts(layer, h, routing)` returns what the experts of a layer make of h, [n * W, H] each.
    """
    x = decoder.embed(windows.reshape(-1))
    for layer in range(decoder.spec.num_layers):
        entered = x
        x = np.concatenate([decoder.mix(layer, window)[0] for window in in_groups(x, windows.shape[1])])
        read = decoder.read(layer, x, entered)
        if decoder.spec.is_moe(layer):
            h, chosen, weights = decoder.route(layer, read)
            x = x + experts(layer, h, Routing(chosen, weights, x))
        else:
            x = decoder.feed_forward(layer, x, read)
    return x


def choose_tiers(rule: Rule, layer: int, routing: Routing) -> np.ndarray:
    """Return the tiers int64 [T, k] that a rule for decoding chooses; all tokens count alike."""
    token_weights = np.ones(len(routing.experts), np.float32)
    whole = PromptRouting(routing.experts, routing.weights, routing.residual, token_weights, [len(token_weights)])
    return rule.choose(layer, whole)


def calibration_moments(model: Path, windows: np.ndarray, kernels: Kernels) -> list[dict[str, list[Moments]]]:
    """Return the moments of each expert's inputs in the original model, by MoE layer and matrix."""
    checkpoint = Checkpoint.open(model)
    spec, activation = checkpoint.spec, ACTIVATIONS[checkpoint.spec.activation]
    original = CheckpointExperts(checkpoint)
    layers: list[dict[str, list[Moments]]] = []

    def recording(layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        found: dict[str, list[Moments]] = {"gate": [], "up": [], "down": []}
        for expert in range(spec.num_experts):
            matrices = {n: matrix.float() for n, matrix in checkpoint.expert(ExpertKey(layer, expert)).items()}
            tokens, ranks = np.nonzero(routing.experts == expert)  # a token chooses an expert once
            x, weights = torch.from_numpy(h[tokens]), torch.from_numpy(routing.weights[tokens, ranks, None])
            into = moments(x, weights)
            inside = moments(activation(x @ matrices["gate"].T) * (x @ matrices["up"].T), weights)
            for name, value in (("gate", into), ("up", into), ("down", inside)):
                found[name].append(value)
        layers.append(found)
        return original.decode(layer, h, routing)

    through_layers(window_decoder(spec, CheckpointDense(checkpoint), kernels), windows, recording)
    return layers


class Simulated:
    """The model with the dense weights of a bundle and experts from float matrices, one set per tier.

    What enters a matrix of an expert is rounded to 8 bits, as our kernels and those of llama.cpp round it.
    """

    def __init__(self, bundle: Bundle, tiers: Mapping[int, Sequence[Stack]], kernels: Kernels) -> None:
        self._tiers = tiers
        self._spec = bundle.spec
        self._activation = ACTIVATIONS[bundle.spec.activation]
        self._decoder = bundle_decoder(bundle, kernels)

    def measure(self, rule: Rule, texts: HeldOut) -> list[Score]:
        """Return a score per window."""
        scores = []
        for ids, hidden in zip(texts.ids, texts.original.hidden, strict=True):
            x = through_layers(self._decoder, ids[None], partial(self._experts, rule))
            scores.append(score_window(ids, x, self._decoder.logits, (hidden, texts.original.head)))
        return scores

    def _experts(self, rule: Rule, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        chosen = choose_tiers(rule, layer, routing)
        y = np.zeros_like(h)
        for tier, layers in self._tiers.items():
            stack = layers[self._spec.moe_layers.index(layer)]
            for expert in np.unique(routing.experts[chosen == tier]).tolist():
                tokens, ranks = np.nonzero((routing.experts == expert) & (chosen == tier))
                x = in_8_bits(torch.from_numpy(h[tokens]))
                middle = self._activation(x @ stack["gate"][expert].T) * (x @ stack["up"][expert].T)
                out = (in_8_bits(middle) @ stack["down"][expert].T).numpy()
                y[tokens] += out * routing.weights[tokens, ranks, None]
        return y


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    """Return float32 [T, n] rounded to whole numbers up to 127 times a scale for each BLOCK of columns."""
    blocks = F.pad(x, (0, -x.shape[1] % BLOCK)).view(len(x), -1, BLOCK)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / scale).round() * scale).view(len(x), -1)[:, : x.shape[1]]


def uniform(bundle: Bundle, tier: int) -> Rule:
    """Return the rule that runs every expert at `tier`, which for `Simulated` need not be of the bundle's ladder."""
    return Static(((tier,) * bundle.spec.num_experts,) * bundle.spec.num_layers)


def originals(model: Path) -> Iterator[tuple[int, Stack]]:
    """Yield each MoE layer: its index among them, and its matrices in float32."""
    checkpoint = Checkpoint.open(model)
    for index, layer in enumerate(checkpoint.spec.moe_layers):
        experts = [checkpoint.expert(ExpertKey(layer, e)) for e in range(checkpoint.spec.num_experts)]
        yield index, {name: torch.stack([expert[name].float() for expert in experts]) for name in experts[0]}


def quantized(
    model: Path, quantize: Callable[[torch.Tensor, Moments], torch.Tensor], found: Sequence[Mapping[str, list[Moments]]]
) -> list[Stack]:
    """Return every expert matrix of the model after `quantize`, as floats, by MoE layer."""
    return [
        {
            name: torch.stack([quantize(w, m) for w, m in zip(stack[name], found[index][name], strict=True)])
            for name in stack
        }
        for index, stack in originals(model)
    ]


def rtn(weight: torch.Tensor, bits: int, group: int = 64) -> torch.Tensor:
    """Round a matrix plainly: best of 20 clips per group, symmetric, exact scales."""
    w = weight.view(len(weight), -1, group)
    largest = w.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    best, lowest = torch.zeros_like(w), torch.full_like(largest, float("inf"))
    for step in range(20):
        scale = (largest * (1 - 0.03 * step)).clamp_min(1e-12)
        value = ((w / scale + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1) - (2**bits - 1) / 2) * scale
        error = (value - w).square().sum(-1, keepdim=True)
        best, lowest = torch.where(error < lowest, value, best), torch.minimum(error, lowest)
    return best.view_as(weight)


def kl(scores: Sequence[Score]) -> float:
    """Return the mean KL of all windows, in nats per token."""
    return sum(s.kl_sum for s in scores) / sum(s.compared for s in scores)


def perplexity_ratio(scores: Sequence[Score], reference: Sequence[Score]) -> float:
    """Return the perplexity of all windows over that of a reference."""
    difference = sum(s.nll_sum for s in scores) - sum(s.nll_sum for s in reference)
    return math.exp(difference / sum(s.tokens for s in scores))


def interval_of_ratio(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95% bootstrap interval of mean(a) / mean(b), over windows drawn together."""
    picks = np.random.default_rng(seed).integers(len(a), size=(SAMPLES, len(a)))
    low, high = np.quantile(a[picks].mean(1) / b[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def per_window(scores: Sequence[Score]) -> np.ndarray:
    """Return the mean KL of each window, [n]."""
    return np.array([s.kl_sum / s.compared for s in scores])


def score_original(texts: HeldOut) -> list[Score]:
    """Return a score per window of the original itself."""
    return [
        score_window(ids, hidden, texts.original.head)
        for ids, hidden in zip(texts.ids, texts.original.hidden, strict=True)
    ]


def row_header(judged: HeldOut) -> list[str]:
    """Return the columns of `row_of`."""
    domains = sorted(set(judged.domains))
    return ["", "bits", "KL", "PPL ratio", *(f"{d} {what}" for d in domains for what in ("KL", "PPL ratio"))]


def row_of(
    label: str, bits: float, scores: Sequence[Score], judged: HeldOut, reference: Sequence[Score]
) -> list[object]:
    """Return a row of a table: label, bits, KL and perplexity ratio, in all and by text."""
    row: list[object] = [label, f"{bits:.2f}", f"{kl(scores):.4f}", f"{perplexity_ratio(scores, reference):.4f}"]
    for domain in sorted(set(judged.domains)):
        mine = [i for i, d in enumerate(judged.domains) if d == domain]
        few, original = [scores[i] for i in mine], [reference[i] for i in mine]
        row += [f"{kl(few):.4f}", f"{perplexity_ratio(few, original):.4f}"]
    return row


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
