"""What lower precision costs, measured on the bundle itself: KL to the original model on held-out text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from dymoe_compile.progress import Advance
from dymoe_runtime import kernels
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.decoder import Decoder, Dense, Routing, in_groups
from dymoe_runtime.dense import BundleDense
from dymoe_runtime.evaluate import Head, Score, score_window
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ExpertKey

# The settings of the layers so far; rules that agree on them share their hidden states.
Prefix = tuple[Hashable, ...]


class Rule(Protocol):
    """Decides the tiers of whole windows."""

    def setting(self, layer: int) -> Hashable: ...  # rules with equal settings decide alike in that layer

    def choose(self, layer: int, windows: Sequence[Routing]) -> np.ndarray: ...  # int64 [T, k]


@dataclass(frozen=True)
class Decoding:
    """A TierRule as it decodes: token by token."""

    rule: TierRule

    def setting(self, layer: int) -> Hashable:
        return "decode", self.rule.decode[layer], self.rule.pinned[layer] if self.rule.pinned else ()

    def choose(self, layer: int, windows: Sequence[Routing]) -> np.ndarray:
        return np.concatenate([self.rule.choose(layer, replace(window, token_weights=None)) for window in windows])


@dataclass(frozen=True)
class Prefilling:
    """A TierRule as it reads a prompt: a window is a chunk."""

    rule: TierRule

    def setting(self, layer: int) -> Hashable:
        return "prefill", self.rule.prefill[layer], self.rule.pinned[layer] if self.rule.pinned else ()

    def choose(self, layer: int, windows: Sequence[Routing]) -> np.ndarray:
        return np.concatenate([self.rule.choose(layer, window) for window in windows])


@dataclass(frozen=True)
class Static:
    """One tier for each expert, whatever the token: what dynamic rules are compared with."""

    tiers: tuple[tuple[int, ...], ...]  # [layers][experts]

    def setting(self, layer: int) -> Hashable:
        return "static", self.tiers[layer]

    def choose(self, layer: int, windows: Sequence[Routing]) -> np.ndarray:
        return np.concatenate([np.array(self.tiers[layer])[window.experts] for window in windows])


@dataclass(frozen=True)
class Original:
    """The model before quantization: final hidden states of each window [T, H], and its head."""

    hidden: Sequence[np.ndarray]
    head: Head


@dataclass
class Measurement:
    """How one rule did."""

    windows: list[Score] = field(default_factory=list)
    used: dict[int, int] = field(default_factory=dict)  # tier -> (token, expert) pairs, all layers
    # layer -> share of the router's choices that are those of the first rule
    router_overlap: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> Score:
        total = Score()
        for window in self.windows:
            total.add(window)
        return total

    @property
    def kl(self) -> float:
        score = self.score
        return score.kl_sum / score.compared


@dataclass
class _Branch:
    """Tokens of all windows that share a prefix: routing of one layer, and the outputs asked for."""

    h: np.ndarray
    routing: Routing
    outputs: dict[Hashable, np.ndarray]
    tiers: dict[Hashable, np.ndarray]


class Measurer:
    """Measures rules on `windows` [n, W], a layer at a time and all rules together.

    An expert is read once for all rules, and layers in which rules agree are computed once.
    """

    def __init__(self, bundle: Bundle, windows: np.ndarray, original: Original, dense: Dense | None = None) -> None:
        """`dense`: weights in place of the bundle's own."""
        self._bundle = bundle
        self._windows = windows
        self._original = original
        self._decoder = Decoder(bundle.spec, dense or BundleDense(bundle), no_experts)

    def measure(self, rules: Sequence[Rule], advance: Advance = lambda: None) -> list[Measurement]:
        """One Measurement per rule; `advance` is called once a layer."""
        results = [Measurement() for _ in rules]
        states: dict[Prefix, list[np.ndarray]] = {(): [self._decoder.dense.embed(ids) for ids in self._windows]}
        for layer in range(self._bundle.spec.num_layers):
            if layer in self._bundle.spec.dense_layers:
                states = {prefix: self._dense_layer(layer, xs) for prefix, xs in states.items()}
            else:
                states = self._moe_layer(layer, states, rules, results)
            advance()
        for index in range(len(self._windows)):
            self._score(index, states, rules, results)
        return results

    def _prefix(self, rule: Rule, layers: int) -> Prefix:
        return tuple(rule.setting(layer) for layer in self._bundle.spec.moe_layers if layer < layers)

    def _dense_layer(self, layer: int, xs: list[np.ndarray]) -> list[np.ndarray]:
        return [self._decoder.feed_forward(layer, self._decoder.attend(layer, x)[0]) for x in xs]

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
                branch.tiers[setting] = rule.choose(layer, self._split(branch.routing))
                branch.outputs[setting] = branch.routing.residual.copy()
            for tier, count in enumerate(np.bincount(branch.tiers[setting].reshape(-1)).tolist()):
                if count:
                    result.used[tier] = result.used.get(tier, 0) + count
            same = (branch.routing.experts[:, :, None] == base[:, None, :]).any(-1)
            result.router_overlap[layer] = float(same.mean())
        for expert in range(self._bundle.spec.num_experts):
            self._run_expert(ExpertKey(layer, expert), list(branches.values()))
        return {
            (*prefix, setting): in_groups(output, self._windows.shape[1])
            for prefix, branch in branches.items()
            for setting, output in branch.outputs.items()
        }

    def _route(self, layer: int, xs: list[np.ndarray]) -> _Branch:
        """Attention window by window, then the router for all tokens at once."""
        attended = [self._decoder.attend(layer, window, None, True) for window in xs]
        x = np.concatenate([window for window, _ in attended])
        weights = np.concatenate([weight for _, weight in attended if weight is not None])
        h = self._decoder.norm(f"layers.{layer}.mlp_norm", x)
        return _Branch(h, Routing(*self._decoder.route(layer, h), x, weights), {}, {})

    def _split(self, routing: Routing) -> list[Routing]:
        """The routing of each window."""
        length = self._windows.shape[1]
        assert routing.token_weights is not None
        parts = (
            in_groups(t, length) for t in (routing.experts, routing.gates, routing.residual, routing.token_weights)
        )
        return [Routing(*part) for part in zip(*parts, strict=True)]

    def _run_expert(self, key: ExpertKey, branches: Sequence[_Branch]) -> None:
        """Add the output of one expert, at each tier that a branch wants it, to that branch's outputs."""
        segments = self._bundle.read_record(key)
        for branch in branches:
            mine = branch.routing.experts == key.expert
            for tier in self._bundle.layout.ladder:
                masks = {setting: mine & (tiers == tier) for setting, tiers in branch.tiers.items()}
                tokens, ranks = np.nonzero(np.any(list(masks.values()), axis=0))  # each token once
                if not len(tokens):
                    continue
                out = kernels.ffn(self._bundle.layout, tier, segments, branch.h[tokens], self._bundle.spec.activation)
                out *= branch.routing.gates[tokens, ranks, None]
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
        """Score one window by all rules, against logits of the original that are computed once."""
        ids, logits = self._windows[index], self._original.head(self._original.hidden[index])
        scores: dict[Prefix, Score] = {}
        for rule, result in zip(rules, results, strict=True):
            prefix = self._prefix(rule, self._bundle.spec.num_layers)
            if prefix not in scores:
                scores[prefix] = score_window(ids, states[prefix][index], self._decoder.logits, (logits, _same))
            result.windows.append(scores[prefix])


def no_experts(layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
    """For decoders whose experts the compiler runs itself, between their other parts."""
    raise AssertionError("the experts of this decoder are run from outside")


def _same(logits: np.ndarray) -> np.ndarray:
    return logits
