"""What lower precision costs, measured on the bundle itself: KL to the original model on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dymoe_compile.progress import Advance
from dymoe_runtime import kernels
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.decoder import Decoder, Routing
from dymoe_runtime.dense import BundleDense
from dymoe_runtime.evaluate import Head, Score, score_window
from dymoe_runtime.policy import Thresholds, TierRule, tiers_by_mass
from dymoe_runtime.spec import ExpertKey

# The thresholds of the layers so far; rules that agree on them share their hidden states.
Prefix = tuple[Thresholds, ...]


@dataclass(frozen=True)
class Original:
    """The model before quantization: final hidden states of each window [T, H], and its head."""

    hidden: Sequence[torch.Tensor]
    head: Head


@dataclass
class Measurement:
    """How one rule did when decoding."""

    score: Score = field(default_factory=Score)
    used: dict[int, int] = field(default_factory=dict)  # tier -> (token, expert) pairs, all layers


@dataclass
class _Branch:
    """Tokens of all windows that share a prefix: routing of one layer, and the outputs asked for."""

    h: torch.Tensor
    routing: Routing
    outputs: dict[Thresholds, torch.Tensor]
    tiers: dict[Thresholds, torch.Tensor]


class Measurer:
    """Measures rules on `windows` [n, W], a layer at a time and all rules together.

    An expert is read once for all rules, and layers in which rules agree are computed once.
    """

    def __init__(self, bundle: Bundle, windows: torch.Tensor, original: Original) -> None:
        self._bundle = bundle
        self._windows = windows
        self._original = original
        self._decoder = Decoder(bundle.spec, BundleDense(bundle), self._no_experts)

    @torch.inference_mode()
    def measure(self, rules: Sequence[TierRule], advance: Advance = lambda: None) -> list[Measurement]:
        """One Measurement per rule; `advance` is called once a layer."""
        results = [Measurement() for _ in rules]
        states: dict[Prefix, list[torch.Tensor]] = {(): [self._decoder.dense.embed(ids) for ids in self._windows]}
        for layer in range(self._bundle.spec.num_layers):
            if layer in self._bundle.spec.dense_layers:
                states = {prefix: self._dense_layer(layer, xs) for prefix, xs in states.items()}
            else:
                states = self._moe_layer(layer, states, rules, results)
            advance()
        for rule, result in zip(rules, results, strict=True):
            self._score(states[self._prefix(rule, self._bundle.spec.num_layers)], result.score)
        return results

    def _prefix(self, rule: TierRule, layers: int) -> Prefix:
        return tuple(rule.decode[layer] for layer in self._bundle.spec.moe_layers if layer < layers)

    def _dense_layer(self, layer: int, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._decoder.feed_forward(layer, self._decoder.attend(layer, x)[0]) for x in xs]

    def _moe_layer(
        self,
        layer: int,
        states: dict[Prefix, list[torch.Tensor]],
        rules: Sequence[TierRule],
        results: Sequence[Measurement],
    ) -> dict[Prefix, list[torch.Tensor]]:
        branches = {prefix: self._route(layer, xs) for prefix, xs in states.items()}
        for rule, result in zip(rules, results, strict=True):
            branch, thresholds = branches[self._prefix(rule, layer)], rule.decode[layer]
            if thresholds not in branch.tiers:
                branch.tiers[thresholds] = tiers_by_mass(branch.routing.gates, thresholds, rule.ladder)
                branch.outputs[thresholds] = torch.zeros_like(branch.h)
            for tier, count in zip(
                *(t.tolist() for t in branch.tiers[thresholds].unique(return_counts=True)), strict=True
            ):
                result.used[tier] = result.used.get(tier, 0) + count
        for expert in range(self._bundle.spec.num_experts):
            self._run_expert(ExpertKey(layer, expert), list(branches.values()))
        return {
            (*prefix, thresholds): list((branch.routing.residual + output).split(self._windows.shape[1]))
            for prefix, branch in branches.items()
            for thresholds, output in branch.outputs.items()
        }

    def _route(self, layer: int, xs: list[torch.Tensor]) -> _Branch:
        """Attention window by window, then the router for all tokens at once."""
        x = torch.cat([self._decoder.attend(layer, window)[0] for window in xs])
        h = self._decoder.norm(f"layers.{layer}.mlp_norm", x)
        return _Branch(h, Routing(*self._decoder.route(layer, h), x), {}, {})

    def _run_expert(self, key: ExpertKey, branches: Sequence[_Branch]) -> None:
        """Add the output of one expert, at each tier that a branch wants it, to that branch's outputs."""
        segments = self._bundle.read_record(key)
        for tier in self._bundle.layout.ladder:
            for branch in branches:
                mine = branch.routing.experts == key.expert
                masks = {thresholds: mine & (tiers == tier) for thresholds, tiers in branch.tiers.items()}
                union = torch.stack(list(masks.values())).any(0)
                tokens, ranks = union.nonzero(as_tuple=True)
                if not len(tokens):
                    continue
                out = kernels.ffn(self._bundle.layout, tier, segments, branch.h[tokens], self._bundle.spec.activation)
                out *= branch.routing.gates[tokens, ranks, None]
                for thresholds, mask in masks.items():
                    wanted = mask[tokens, ranks]
                    branch.outputs[thresholds].index_add_(0, tokens[wanted], out[wanted])

    def _score(self, xs: Sequence[torch.Tensor], score: Score) -> None:
        for ids, x, hidden in zip(self._windows, xs, self._original.hidden, strict=True):
            score.add(score_window(ids, x, self._decoder.logits, (hidden, self._original.head)))

    @staticmethod
    def _no_experts(layer: int, h: torch.Tensor, routing: Routing) -> torch.Tensor:
        raise AssertionError("experts are run by the measurer itself")
