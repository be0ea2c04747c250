"""Which segment leaves memory first: the one whose expert was used least, uses fading as tokens pass."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from dymoe_runtime.spec import ExpertKey

# Uses count for less as later uses come: the weight of a use grows by this factor per token. At 1 nothing is
# forgotten (LFU), at 2 the last use is about all that counts (LRU).
GROWTH = 1.01
RESCALE_AT = 1e30

# What leaves memory: what was used least, in all layers or in the layer that needs room, or what costs least to lose.
EVICTIONS = ("global", "per-layer", "by-cost")


class Eviction:
    """Counts of use that survive eviction, and the cheapest segment among those that may leave.

    `shape` is (layers, experts per layer). `prior` [layers, experts], if given, says how often a token is expected to
    use each expert, so that an early eviction is not blind; it counts as `prior_tokens` tokens would. `worth` [layers,
    experts, segments], if given, multiplies uses: what it costs to do without the segment. With `per_layer` what comes
    for a layer displaces what is of that layer, once it has its share of memory.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        segments: int,
        growth: float = GROWTH,
        prior: np.ndarray | None = None,
        prior_tokens: float = 0.0,
        worth: np.ndarray | None = None,
        per_layer: bool = False,
    ) -> None:
        uses = np.zeros((*shape, segments))
        if prior is not None:
            uses += prior_tokens * prior[:, :, None]
        # One number after another is counted, for which lists are faster; the cheapest is found among all.
        self._uses: list[list[list[float]]] = uses.tolist()
        self._tokens = prior_tokens  # weighed as uses are
        self._growth = growth
        self._worth = None if worth is None else worth.tolist()
        self._per_layer = per_layer
        self._weight = 1.0
        self._cost = np.full(shape, np.inf)  # of an expert's last segment; inf where it must stay
        self._keys = [ExpertKey(layer, expert) for layer in range(shape[0]) for expert in range(shape[1])]

    def tick(self, tokens: int = 1) -> None:
        """Tokens have passed: uses from now on count a little more than earlier ones."""
        self._tokens += self._weight * tokens
        for _ in range(tokens):
            self._weight *= self._growth
            if self._weight > RESCALE_AT:
                self._uses = (np.asarray(self._uses) / self._weight).tolist()
                self._cost /= self._weight
                self._tokens /= self._weight
                self._weight = 1.0

    def use(self, key: ExpertKey, segments: int, tokens: int = 1, first: int = 0) -> None:
        """So many tokens use the segments of an expert from `first` up to `segments`."""
        uses = self._uses[key.layer][key.expert]
        for segment in range(first, segments):
            uses[segment] += self._weight * tokens

    def rates(self) -> np.ndarray:
        """How often a token uses each expert, of late: [layers, experts], at most 1."""
        return np.minimum(np.asarray(self._uses)[:, :, 0] / max(self._tokens, 1e-9), 1.0)

    def hold(self, key: ExpertKey) -> None:
        """The expert has no segment that may leave."""
        self._cost[key.layer, key.expert] = np.inf

    def offer(self, key: ExpertKey, segment: int) -> None:
        """This segment, the expert's last, may leave."""
        self._cost[key.layer, key.expert] = self.worth(key, segment)

    def worth(self, key: ExpertKey, segment: int) -> float:
        """What it costs to be without the segment."""
        uses = self._uses[key.layer][key.expert][segment]
        return uses if self._worth is None else uses * self._worth[key.layer][key.expert][segment]

    def cost(self, key: ExpertKey) -> float:
        """Of evicting the expert's last segment; inf where it must stay."""
        return float(self._cost[key])

    def cheapest(self, spared: Collection[ExpertKey], layer: int | None = None) -> ExpertKey | None:
        """The expert whose last segment should leave for one of `layer`; None where none may."""
        cost, passed = self._cost, {}
        try:
            if self._per_layer and layer is not None:
                for key in spared:
                    passed[key], cost[key] = cost[key], np.inf
                fullest = self._fullest(cost, layer)
                least = fullest * cost.shape[1] + int(cost[fullest].argmin())
            else:
                # What is spared is seldom the cheapest.
                while (key := self._keys[least := int(cost.argmin())]) in spared and cost[key] < np.inf:
                    passed[key], cost[key] = cost[key], np.inf
            key = self._keys[least]
            return key if cost[key] < np.inf else None
        finally:
            for key, value in passed.items():
                cost[key] = value

    @staticmethod
    def _fullest(cost: np.ndarray, layer: int) -> int:
        """`layer` if no other has clearly more experts that may leave, else the one with most."""
        there = (cost < np.inf).sum(axis=1)
        most = int(there.argmax())
        return layer if there[layer] and there[layer] + 1 >= there[most] else most
