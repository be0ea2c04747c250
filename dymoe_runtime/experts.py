"""The seam between decoder and store: choose tiers, fetch, compute, combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dymoe_runtime import kernels
from dymoe_runtime.decoder import Routing
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import ExpertStore, Want

# (layer, residual) -> (experts, gates) that the layer's router would choose.
Guess = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class TierStats:
    """How many (token, expert) pairs ran at each tier."""

    used: dict[int, int] = field(default_factory=dict)

    def add(self, tiers: torch.Tensor) -> None:
        for tier, count in zip(*(t.tolist() for t in tiers.unique(return_counts=True)), strict=True):
            self.used[tier] = self.used.get(tier, 0) + count

    @property
    def bits_mean(self) -> float:
        total = sum(self.used.values())
        return sum(tier * count for tier, count in self.used.items()) / total if total else 0.0

    def shares(self) -> dict[str, float]:
        total = sum(self.used.values())
        return {str(tier): self.used[tier] / total for tier in sorted(self.used)}


@dataclass(frozen=True)
class LookAhead:
    """Reads the next layer's likely experts while this one computes.

    `ranks[layer]` is how many guesses per token were worth reading when the policy was measured.
    """

    guess: Guess
    ranks: dict[int, int]
    width: int  # experts per layer, however many tokens there are

    def wants(self, layer: int, routing: Routing, rule: TierRule) -> list[Want]:
        """Experts of `layer` to read ahead, likeliest first."""
        ranks = self.ranks.get(layer, 0)
        if not ranks:
            return []
        experts, gates = self.guess(layer, routing.residual)
        guessed = Routing(experts, gates, routing.residual, routing.token_weights)
        tiers = rule.choose(layer, guessed)[:, :ranks].reshape(-1)
        experts, gates = experts[:, :ranks].reshape(-1), gates[:, :ranks].reshape(-1)
        mass = torch.zeros(int(experts.max()) + 1).index_add_(0, experts, gates)
        highest = torch.zeros(len(mass), dtype=torch.int64).scatter_reduce_(0, experts, tiers, "amax")
        likely = mass.argsort(descending=True)[: self.width].tolist()
        return [Want(ExpertKey(layer, e), int(highest[e])) for e in likely if mass[e] > 0 and highest[e] > 0]


class StoredExperts:
    """Routed experts out of an ExpertStore, each at the tier that `rule` chooses."""

    def __init__(
        self, store: ExpertStore, rule: TierRule, activation: str, look_ahead: LookAhead | None = None
    ) -> None:
        self.store = store
        self.rule = rule
        self.stats = TierStats()
        self._activation = activation
        self.look_ahead = look_ahead

    def __call__(self, layer: int, h: torch.Tensor, routing: Routing) -> torch.Tensor:
        tiers = self.rule.choose(layer, routing)
        self.stats.add(tiers)
        wants = _wants(layer, routing.experts, tiers)
        delivery = self.store.begin(wants)
        if self.look_ahead is not None:
            self.store.look_ahead(self.look_ahead.wants(layer + 1, routing, self.rule), wants)
        y = torch.zeros_like(h)
        for want, segments in delivery:
            mine = routing.experts == want.key.expert
            for tier in tiers[mine].unique().tolist():
                if tier:
                    self._add(y, h, routing, mine & (tiers == tier), tier, segments)
        return y

    def _add(
        self, y: torch.Tensor, h: torch.Tensor, routing: Routing, where: torch.Tensor, tier: int, segments: Any
    ) -> None:
        """Add the gate-weighted output of one expert at one tier for the tokens in `where` [T, k]."""
        tokens, ranks = where.nonzero(as_tuple=True)
        out = kernels.ffn(self.store.layout, tier, segments, h[tokens], self._activation)
        y.index_add_(0, tokens, out * routing.gates[tokens, ranks, None])


def _wants(layer: int, experts: torch.Tensor, tiers: torch.Tensor) -> Sequence[Want]:
    """Each active expert once, at the highest tier that any token gives it; by rank for one token."""
    highest: dict[int, int] = {}
    for expert, tier in zip(experts.reshape(-1).tolist(), tiers.reshape(-1).tolist(), strict=True):
        highest[expert] = max(tier, highest.get(expert, 0))
    order = highest if len(experts) == 1 else sorted(highest)
    return [Want(ExpertKey(layer, expert), highest[expert]) for expert in order if highest[expert]]
