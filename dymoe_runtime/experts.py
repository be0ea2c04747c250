"""The seam between decoder and store: choose tiers, fetch, compute, combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dymoe_runtime import kernels
from dymoe_runtime.decoder import Routing
from dymoe_runtime.policy import TierRule
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import ExpertStore, Want

# More than the highest tier.
TIERS = 16

# (layer, residual) -> (experts, gates) that the layer's router would choose.
Guess = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class TierStats:
    """How many (token, expert) pairs ran at each tier."""

    used: dict[int, int] = field(default_factory=dict)

    def add(self, tiers: torch.Tensor) -> None:
        for tier, count in enumerate(tiers.reshape(-1).bincount().tolist()):
            if count:
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
        groups = group_pairs(routing.experts, tiers)
        wants = [Want(ExpertKey(layer, expert), max(by_tier)) for expert, by_tier in groups.items()]
        delivery = self.store.begin(wants)
        if self.look_ahead is not None:
            self.store.look_ahead(self.look_ahead.wants(layer + 1, routing, self.rule), wants)
        y = torch.zeros_like(h)
        gates = routing.gates.reshape(-1, 1)
        for want, segments in delivery:
            for tier, pairs in groups[want.key.expert].items():
                tokens = pairs // routing.experts.shape[1]
                out = kernels.ffn(self.store.layout, tier, segments, h[tokens], self._activation)
                y.index_add_(0, tokens, out * gates[pairs])
        return y


def group_pairs(experts: torch.Tensor, tiers: torch.Tensor) -> dict[int, dict[int, torch.Tensor]]:
    """expert -> tier -> indices into the flattened [T, k] of the pairs that run so; skipped ones are left out."""
    keys = (experts * TIERS + tiers).reshape(-1)
    ordered, order = keys.sort(stable=True)
    values, counts = ordered.unique_consecutive(return_counts=True)
    groups: dict[int, dict[int, torch.Tensor]] = {}
    for value, pairs in zip(values.tolist(), order.split(counts.tolist()), strict=True):
        expert, tier = divmod(value, TIERS)
        if tier:
            groups.setdefault(expert, {})[tier] = pairs
    return groups
