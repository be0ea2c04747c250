"""Whether something pays, found out while it runs."""

from __future__ import annotations

import statistics

# Tokens of a try, and for how many tries the faster way is kept.
TOKENS = 12
KEPT = 24


class Trial:
    """Says token by token whether to do something: with it, without it, then for long what was faster.

    What is tried must not change results. A try counts by its median, for single tokens are disturbed.
    """

    def __init__(self, tokens: int = TOKENS, kept: int = KEPT) -> None:
        self._tokens, self._kept = tokens, kept
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._left = 0  # tokens for which the decision stands
        self.on = True

    def took(self, seconds: float) -> None:
        """A token has taken so long, done as `on` said."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._times = {True: [], False: []}
            return
        self._times[self.on].append(seconds)
        if len(self._times[self.on]) < self._tokens:
            return
        if len(self._times[not self.on]) < self._tokens:
            self.on = not self.on
            return
        self.on = statistics.median(self._times[True]) < statistics.median(self._times[False])
        self._left = self._kept * self._tokens
