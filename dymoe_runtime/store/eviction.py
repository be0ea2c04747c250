"""Choice of the segment to evict: the least used one, where uses decay as tokens pass."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import DECAY

# Uses are divided by the weight of a new use when it exceeds this, long before it overflows.
RESCALE_AT = 1e30


class Eviction:
    """Decayed counts of uses, which survive eviction, and the cheapest segment that may be evicted.

    `shape` is (layers, experts per layer). `prior` [layers, experts], if given, is how often a token is expected to use
    each expert. It guides the first evictions, and counts as `prior_tokens` tokens. `worth` [layers, experts,
    segments], if given, is the cost of not having a segment when it is used; uses are multiplied by it. With
    `per_layer`, an expert evicts one of its own layer, unless another layer clearly has more evictable experts.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        segments: int,
        decay: float = DECAY,
        prior: np.ndarray | None = None,
        prior_tokens: float = 0.0,
        worth: np.ndarray | None = None,
        per_layer: bool = False,
        rescale_at: float = RESCALE_AT,
    ) -> None:
        uses = np.zeros((*shape, segments))
        if prior is not None:
            uses += prior_tokens * prior[:, :, None]
        # Uses are counted one at a time, for which lists are faster; costs are searched all at once, in an array.
        self._uses: list[list[list[float]]] = uses.tolist()
        self._tokens = prior_tokens  # weighted as uses are
        self._decay = decay
        self._worth = None if worth is None else worth.tolist()
        self._per_layer = per_layer
        self._rescale_at = rescale_at
        self._weight = 1.0
        self._cost = np.full(shape, np.inf)  # of evicting an expert's last segment; inf if it must stay
        self._keys = [ExpertKey(layer, expert) for layer in range(shape[0]) for expert in range(shape[1])]

    def tick(self, tokens: int = 1) -> None:
        """Advance by `tokens` tokens; each makes later uses count a little more than earlier ones."""
        self._tokens += self._weight * tokens
        for _ in range(tokens):
            self._weight *= self._decay
            if self._weight > self._rescale_at:
                self._uses = (np.asarray(self._uses) / self._weight).tolist()
                self._cost /= self._weight
                self._tokens /= self._weight
                self._weight = 1.0

    def use(self, key: ExpertKey, segments: int, tokens: int = 1, first: int = 0) -> None:
        """Count a use by `tokens` tokens of an expert's segments [first, segments)."""
        uses = self._uses[key.layer][key.expert]
        for segment in range(first, segments):
            uses[segment] += self._weight * tokens

    def rates(self) -> np.ndarray:
        """Return the recent uses of each expert per token, [layers, experts], at most 1."""
        return np.minimum(np.asarray(self._uses)[:, :, 0] / max(self._tokens, 1e-9), 1.0)

    def keep(self, key: ExpertKey) -> None:
        """Bar all segments of the expert from eviction."""
        self._cost[key.layer, key.expert] = np.inf

    def offer(self, key: ExpertKey, segment: int) -> None:
        """Allow the eviction of `segment`, which is the expert's last."""
        self._cost[key.layer, key.expert] = self.worth(key, segment)

    def worth(self, key: ExpertKey, segment: int) -> float:
        """Return the cost of not having the segment: its decayed uses, times its `worth` if given."""
        uses = self._uses[key.layer][key.expert][segment]
        return uses if self._worth is None else uses * self._worth[key.layer][key.expert][segment]

    def cost(self, key: ExpertKey) -> float:
        """Return the cost of evicting the expert's last segment, inf if it must stay."""
        return float(self._cost[key])

    def cheapest(self, spared: Collection[ExpertKey], layer: int | None = None) -> ExpertKey | None:
        """Return the expert whose last segment should be evicted, or None if only `spared` experts are left.

        `layer` is the layer of the expert that needs room.
        """
        cost, passed = self._cost, {}
        try:
            if self._per_layer and layer is not None:
                for key in spared:
                    passed[key], cost[key] = cost[key], np.inf
                fullest = self._fullest(cost, layer)
                index = fullest * cost.shape[1] + int(cost[fullest].argmin())
            else:
                # Spared experts are seldom the cheapest, so this is faster than masking them all.
                while (key := self._keys[index := int(cost.argmin())]) in spared and cost[key] < np.inf:
                    passed[key], cost[key] = cost[key], np.inf
            key = self._keys[index]
            return key if cost[key] < np.inf else None
        finally:
            for key, value in passed.items():
                cost[key] = value

    @staticmethod
    def _fullest(cost: np.ndarray, layer: int) -> int:
        """Return `layer`, or the layer with the most evictable experts if it has at least two more."""
        evictable = (cost < np.inf).sum(axis=1)
        most = int(evictable.argmax())
        return layer if evictable[layer] and evictable[layer] + 1 >= evictable[most] else most
