"""Holding a time per token by changing the operating point, without going to and fro."""

from __future__ import annotations

import statistics

# Tokens of which the median decides.
TOKENS = 24
# A better point is tried where tokens take less than this share of the time allowed.
SPARE = 0.8
# Decisions for which a point that was too slow is left alone: at first, and doubled each time it is again.
BARRED = 4


class Pace:
    """Says which of some points, by rising cost, to run so that a token takes at most `target_s`."""

    def __init__(self, points: int, start: int, target_s: float, tokens: int = TOKENS) -> None:
        self.index = start
        self._points, self._target_s, self._tokens = points, target_s, tokens
        self._times: list[float] = []
        self._decisions = 0
        self._barred_until = [0] * points
        self._bars = [BARRED] * points

    def took(self, seconds: float) -> bool:
        """A token has taken so long; whether `index` is another now."""
        self._times.append(seconds)
        if len(self._times) < self._tokens:
            return False
        median = statistics.median(self._times)
        self._times.clear()
        self._decisions += 1
        better = self.index + 1
        if median > self._target_s and self.index > 0:
            self._barred_until[self.index] = self._decisions + self._bars[self.index]
            self._bars[self.index] *= 2
            self.index -= 1
            return True
        if median < SPARE * self._target_s and better < self._points and self._barred_until[better] <= self._decisions:
            self.index = better
            return True
        return False
