"""The cost of lower precision, measured on the bundle itself: KL to the original model on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.kernels.interface import Kernels, ffn
from dymoe_runtime.model.routing import PromptRouting, Routing, chunk_lengths, in_groups
from dymoe_runtime.model.score import Head, Score, log_softmax, score_window
from dymoe_runtime.model.tier_counts import TierCounts
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.spec import ExpertKey

# The settings of the MoE layers so far; rules with equal settings share hidden states.
Prefix = tuple[Hashable, ...]


class LayerwiseDecoder(Protocol):
    """A decoder whose layers run part by part, as `model.decoder.Decoder` does."""

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Return the embeddings [T, H] of ids [T]."""

    def mix(self, layer: int, x: np.ndarray, *, weigh: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the residual stream [T, H] after the mixer of `layer`, and the token weights [T].

        Without `weigh`, every token weight is 1.
        """

    def route(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the experts' inputs [T, H], the experts [T, k] and their routing weights [T, k] in `layer`."""

    def feed_forward(self, layer: int, x: np.ndarray, read: np.ndarray) -> np.ndarray:
        """Return the residual stream [T, H] after the dense MLP of `layer`."""

    def only_adds(self, layer: int) -> bool:
        """Return whether `finish` does nothing but add the output of the experts."""

    def finish(self, layer: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the residual stream [T, H] after `layer`, from the one after its mixer and its experts' output."""

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits [T, vocab] of hidden states [T, H]."""


class Rule(Protocol):
    """A rule that chooses the tiers of whole windows."""

    def setting(self, layer: int) -> Hashable:
        """Return the setting of a layer; rules with equal settings choose the same tiers there."""

    def choose(self, layer: int, routing: PromptRouting) -> np.ndarray:
        """Return the tier int64 [T, k] of each routed expert; each window is one prompt chunk of `routing`."""


@dataclass(frozen=True)
class Decoding:
    """A TierRule applied as in decoding, token by token."""

    rule: TierRule

    def setting(self, layer: int) -> Hashable:
        return "decode", self.rule.decode[layer], self.rule.pinned[layer] if self.rule.pinned else ()

    def choose(self, layer: int, routing: PromptRouting) -> np.ndarray:
        return self.rule.choose(layer, Routing(routing.experts, routing.weights, routing.residual))


@dataclass(frozen=True)
class Prefilling:
    """A TierRule applied as to a prompt; each window is one prompt chunk."""

    rule: TierRule

    def setting(self, layer: int) -> Hashable:
        return "prefill", self.rule.prefill[layer], self.rule.pinned[layer] if self.rule.pinned else ()

    def choose(self, layer: int, routing: PromptRouting) -> np.ndarray:
        return self.rule.choose_for_prompt(layer, routing)


@dataclass(frozen=True)
class Static:
    """A fixed tier for each expert, whatever the token: the baseline for dynamic rules."""

    tiers: tuple[tuple[int, ...], ...]  # [layers][experts]

    def setting(self, layer: int) -> Hashable:
        return "static", self.tiers[layer]

    def choose(self, layer: int, routing: PromptRouting) -> np.ndarray:
        return np.asarray(np.array(self.tiers[layer])[routing.experts])


@dataclass(frozen=True)
class Original:
    """The model before quantization: final hidden states of each window [T, H], and its head."""

    hidden: Sequence[np.ndarray]
    head: Head


@dataclass(frozen=True)
class Guess:
    """The likeliest next token at a place of a text, its probability, and that of the original's likeliest token."""

    token: int
    probability: float
    of_original: float


@dataclass
class Measurement:
    """Scores, tier counts and router overlap of one rule, and its guesses at the places of the measurer."""

    windows: list[Score] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)
    counts: TierCounts = field(default_factory=TierCounts)  # of (token, expert) pairs, all layers
    # layer -> share of chosen experts that are also chosen under the first rule
    router_overlap: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> Score:
        """Return the total score of all windows."""
        total = Score()
        for window in self.windows:
            total.add(window)
        return total

    @property
    def kl(self) -> float:
        """Return the mean KL, in nats per token."""
        score = self.score
        return score.kl_sum / score.compared


@dataclass
class _Branch:
    """One layer for rules that share a prefix: the routing of all windows, and tiers and outputs by setting."""

    h: np.ndarray
    routing: PromptRouting
    outputs: dict[Hashable, np.ndarray]
    tiers: dict[Hashable, np.ndarray]


class Measurer:
    """Measures rules on `windows` [n, W], one layer at a time for all rules.

    Each expert is read once for all rules. Rules that have agreed in all layers so far share one computation.
    """

    def __init__(
        self,
        bundle: Bundle,
        windows: np.ndarray,
        original: Original,
        decoder: LayerwiseDecoder,
        kernels: Kernels,
        places: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Prepare to measure `bundle`; `decoder` runs its layers, except the routed experts.

        At each of `places`, (window, position) by rising window, the guesses of the next token are kept.
        """
        self._bundle = bundle
        self._kernels = kernels
        self._windows = windows
        self._original = original
        self._decoder = decoder
        self._places = places

    def measure(self, rules: Sequence[Rule], advance: Callable[[], object] = lambda: None) -> list[Measurement]:
        """Return one Measurement per rule; call `advance` once per layer."""
        results = [Measurement() for _ in rules]
        states: dict[Prefix, list[np.ndarray]] = {(): [self._decoder.embed(ids) for ids in self._windows]}
        for layer in range(self._bundle.spec.num_layers):
            if self._bundle.spec.is_moe(layer):
                states = self._moe_layer(layer, states, rules, results)
            else:
                states = {prefix: self._dense_layer(layer, xs) for prefix, xs in states.items()}
            advance()
        for index in range(len(self._windows)):
            self._score(index, states, rules, results)
        return results

    def _prefix(self, rule: Rule, layers: int) -> Prefix:
        return tuple(rule.setting(layer) for layer in self._bundle.spec.moe_layers if layer < layers)

    def _dense_layer(self, layer: int, xs: list[np.ndarray]) -> list[np.ndarray]:
        mixed = (self._decoder.mix(layer, x)[0] for x in xs)
        return [self._decoder.feed_forward(layer, x, x) for x in mixed]

    def _moe_layer(
        self,
        layer: int,
        states: dict[Prefix, list[np.ndarray]],
        rules: Sequence[Rule],
        results: Sequence[Measurement],
    ) -> dict[Prefix, list[np.ndarray]]:
        branches = {prefix: self._route(layer, states.pop(prefix)) for prefix in list(states)}
        base = branches[self._prefix(rules[0], layer)].routing.experts
        for rule, result in zip(rules, results, strict=True):
            branch, setting = branches[self._prefix(rule, layer)], rule.setting(layer)
            if setting not in branch.tiers:
                branch.tiers[setting] = rule.choose(layer, branch.routing)
                branch.outputs[setting] = self._begun(layer, branch.routing.residual)
            result.counts.add(branch.tiers[setting])
            same = (branch.routing.experts[:, :, None] == base[:, None, :]).any(-1)
            result.router_overlap[layer] = float(same.mean())
        for expert in range(self._bundle.spec.num_experts):
            self._run_expert(ExpertKey(layer, expert), list(branches.values()))
        return {
            (*prefix, setting): self._finished(layer, branch.routing.residual, output)
            for prefix, branch in branches.items()
            for setting, output in branch.outputs.items()
        }

    def _begun(self, layer: int, residual: np.ndarray) -> np.ndarray:
        """Return what the outputs of the experts are added to, [T, H]."""
        return residual.copy() if self._decoder.only_adds(layer) else np.zeros_like(residual)

    def _finished(self, layer: int, residual: np.ndarray, output: np.ndarray) -> list[np.ndarray]:
        """Return the residual stream that leaves a layer, by windows."""
        outputs = in_groups(output, self._windows.shape[1])
        if self._decoder.only_adds(layer):
            return outputs
        pairs = zip(in_groups(residual, self._windows.shape[1]), outputs, strict=True)
        return [self._decoder.finish(layer, x, y) for x, y in pairs]

    def _route(self, layer: int, xs: list[np.ndarray]) -> _Branch:
        """Run the mixer window by window, then the router for all tokens at once."""
        mixed = [self._decoder.mix(layer, window, weigh=True) for window in xs]
        x, token_weights = (np.concatenate(parts) for parts in zip(*mixed, strict=True))
        read = np.concatenate(xs) if self._bundle.spec.layers[layer].parallel else x
        h, experts, weights = self._decoder.route(layer, read)
        by_share = self._bundle.spec.moe.router.weighs_by_share
        windows = chunk_lengths(len(x), self._windows.shape[1])
        routing = PromptRouting(experts, weights, x, token_weights, windows, by_share)
        return _Branch(h, routing, {}, {})

    def _run_expert(self, key: ExpertKey, branches: Sequence[_Branch]) -> None:
        """Add the output of one expert to the outputs of every branch, at each tier that a setting chose."""
        segments = read_record(self._bundle, key)
        for branch in branches:
            mine = branch.routing.experts == key.expert
            for tier in self._bundle.layout.ladder:
                masks = {setting: mine & (tiers == tier) for setting, tiers in branch.tiers.items()}
                tokens, ranks = np.nonzero(np.any(list(masks.values()), axis=0))  # a token chooses an expert once
                if not len(tokens):
                    continue
                x, activation = branch.h[tokens], self._bundle.spec.activation
                out = ffn(self._kernels, self._bundle.layout, tier, segments, x, activation)
                out *= branch.routing.weights[tokens, ranks, None]
                for setting, mask in masks.items():
                    wanted = mask[tokens, ranks]
                    branch.outputs[setting][tokens[wanted]] += out[wanted]

    def _score(
        self,
        index: int,
        states: dict[Prefix, list[np.ndarray]],
        rules: Sequence[Rule],
        results: Sequence[Measurement],
    ) -> None:
        """Score one window for all rules, against logits of the original that are computed once."""
        ids, logits = self._windows[index], self._original.head(self._original.hidden[index])
        scores: dict[Prefix, Score] = {}
        rows = [position for window, position in self._places if window == index]
        guesses: dict[Prefix, list[Guess]] = {}
        for rule, result in zip(rules, results, strict=True):
            prefix = self._prefix(rule, self._bundle.spec.num_layers)
            if prefix not in scores:
                hidden = states[prefix][index]
                scores[prefix] = score_window(ids, hidden, self._decoder.logits, (logits, _same))
                guesses[prefix] = guesses_of(self._decoder.logits(hidden[rows]), logits[rows]) if rows else []
            result.windows.append(scores[prefix])
            result.guesses += guesses[prefix]


@np.errstate(over="ignore", invalid="ignore")  # the checks of scores for finite values raise DymoeError
def guesses_of(logits: np.ndarray, original: np.ndarray) -> list[Guess]:
    """Return the guesses by logits [n, vocab], beside those of the original model, [n, vocab]."""
    p = np.exp(log_softmax(logits))
    tokens, wanted = logits.argmax(-1), original.argmax(-1)
    every = zip(range(len(p)), tokens.tolist(), wanted.tolist(), strict=True)
    return [Guess(token, float(p[i, token]), float(p[i, other])) for i, token, other in every]


def _same(logits: np.ndarray) -> np.ndarray:
    return logits
