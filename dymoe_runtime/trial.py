"""Whether something pays, found out while it runs."""

from __future__ import annotations

import statistics

# Tokens of each way in a try, and how often as many the faster way is kept.
TOKENS = 12
KEPT = 24


class Trial:
    """Says token by token whether to do something: by turns with and without it, then for long what was faster.

    What is tried must not change results. Turns are of one token, for a cache that fills makes later tokens
    faster; medians decide, for single tokens are disturbed.
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
            return
        self._times[self.on].append(seconds)
        self.on = not self.on
        if all(len(times) == self._tokens for times in self._times.values()):
            self.on = statistics.median(self._times[True]) < statistics.median(self._times[False])
            self._times = {True: [], False: []}
            self._left = self._kept * self._tokens
