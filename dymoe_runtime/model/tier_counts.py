"""Counts of the tiers at which experts ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class TierCounts:
    """Numbers of (token, expert) pairs by tier; tier 0 counts skipped pairs.

    `last` has, by layer, the tiers of the last decoded token, in the order of falling routing weight.
    """

    used: dict[int, int] = field(default_factory=dict)
    last: dict[int, Sequence[int]] = field(default_factory=dict)

    def add(self, tiers: np.ndarray) -> None:
        """Count the tiers of an array of any shape, one for each pair."""
        for tier, count in enumerate(np.bincount(tiers.reshape(-1)).tolist()):
            if count:
                self.used[tier] = self.used.get(tier, 0) + count

    def add_token(self, layer: int, tiers: Sequence[int]) -> None:
        """Count the tiers of a decoded token in a layer."""
        self.last[layer] = tiers
        for tier in set(tiers):
            self.used[tier] = self.used.get(tier, 0) + tiers.count(tier)

    def add_all(self, other: TierCounts) -> None:
        """Add the counts of `other`."""
        for tier, count in other.used.items():
            self.used[tier] = self.used.get(tier, 0) + count

    def clear(self) -> None:
        """Reset the counts, and forget the last token."""
        self.used.clear()
        self.last.clear()

    @property
    def pairs(self) -> int:
        """Return the number of pairs."""
        return sum(self.used.values())

    @property
    def bits_mean(self) -> float:
        """Return the mean tier of all pairs, or 0 if there are none."""
        return self.mean(float) if self.used else 0.0

    def mean(self, value: Callable[[int], float]) -> float:
        """Return the mean of `value(tier)` over all pairs, of which there must be at least one."""
        return sum(value(tier) * count for tier, count in self.used.items()) / self.pairs

    def shares(self) -> dict[str, float]:
        """Return the share of pairs at each tier, lowest tier first."""
        return {str(tier): self.used[tier] / self.pairs for tier in sorted(self.used)}
