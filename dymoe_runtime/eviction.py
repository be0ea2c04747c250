"""Which segment leaves memory first: the one whose expert was used least, uses fading as tokens pass."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from dymoe_runtime.spec import ExpertKey

# Uses count for less as later uses come: the weight of a use grows by this factor per token. At 1 nothing is
# forgotten (LFU), at 2 the last use is about all that counts (LRU).
GROWTH = 1.01
RESCALE_AT = 1e30


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
        self._uses = np.zeros((*shape, segments))
        if prior is not None:
            self._uses += prior_tokens * prior[:, :, None]
        self._tokens = prior_tokens  # weighed as uses are
        self._growth = growth
        self._worth = worth
        self._per_layer = per_layer
        self._weight = 1.0
        self._cost = np.full(shape, np.inf)  # of an expert's last segment; inf where it must stay

    def tick(self, tokens: int = 1) -> None:
        """Tokens have passed: uses from now on count a little more than earlier ones."""
        self._tokens += self._weight * tokens
        for _ in range(tokens):
            self._weight *= self._growth
            if self._weight > RESCALE_AT:
                self._uses /= self._weight
                self._cost /= self._weight
                self._tokens /= self._weight
                self._weight = 1.0

    def use(self, key: ExpertKey, segments: int, tokens: int = 1, first: int = 0) -> None:
        """So many tokens use the segments of an expert from `first` up to `segments`."""
        self._uses[key][first:segments] += self._weight * tokens

    def rates(self) -> np.ndarray:
        """How often a token uses each expert, of late: [layers, experts], at most 1."""
        return np.minimum(self._uses[:, :, 0] / max(self._tokens, 1e-9), 1.0)

    def hold(self, key: ExpertKey) -> None:
        """The expert has no segment that may leave."""
        self._cost[key] = np.inf

    def offer(self, key: ExpertKey, segment: int) -> None:
        """This segment, the expert's last, may leave."""
        self._cost[key] = self.worth(key, segment)

    def worth(self, key: ExpertKey, segment: int) -> float:
        """What it costs to be without the segment."""
        uses = float(self._uses[key][segment])
        return uses if self._worth is None else uses * float(self._worth[key][segment])

    def cost(self, key: ExpertKey) -> float:
        """Of evicting the expert's last segment; inf where it must stay."""
        return float(self._cost[key])

    def cheapest(self, spared: Collection[ExpertKey], layer: int | None = None) -> ExpertKey | None:
        """The expert whose last segment should leave for one of `layer`; None where none may."""
        cost = self._cost
        if spared:
            cost = cost.copy()
            for key in spared:
                cost[key] = np.inf
        if self._per_layer and layer is not None:
            fullest = self._fullest(cost, layer)
            index = fullest * cost.shape[1] + int(cost[fullest].argmin())
        else:
            index = int(cost.argmin())
        key = ExpertKey(*divmod(index, cost.shape[1]))
        return key if cost[key] < np.inf else None

    @staticmethod
    def _fullest(cost: np.ndarray, layer: int) -> int:
        """`layer` if no other has clearly more experts that may leave, else the one with most."""
        there = (cost < np.inf).sum(axis=1)
        most = int(there.argmax())
        return layer if there[layer] and there[layer] + 1 >= there[most] else most
