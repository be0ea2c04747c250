"""Whether something pays, found out while it runs."""

from __future__ import annotations

import statistics

# Tokens of a turn, and how many trials long the faster way is kept.
TURN = 4
KEPT = 18


class Trial:
    """Says token by token whether to do something: a turn without it, two with it, one without; then what was faster.

    What is tried must not change results. The first token of a turn, for which it still matters what the token before
    it did, does not count. Both ways come equally late on average, for a cache that fills makes later tokens faster;
    medians decide, for single tokens are disturbed. What a prompt leaves in memory is replaced in the first tokens,
    which are run without it and not tried.
    """

    def __init__(self, turn: int = TURN, kept: int = KEPT) -> None:
        self._turns = [False] * turn + [True] * 2 * turn + [False] * turn
        self._kept = kept
        self._begin()
        self._left = len(self._turns)

    def _begin(self) -> None:
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._tokens = 0  # of this trial
        self._left = 0  # tokens for which the decision stands
        self.on = self._turns[0]

    def changed(self) -> None:
        """What is timed is something else from now on: a trial that is under way begins anew."""
        if not self._left:
            self._begin()

    def took(self, seconds: float) -> None:
        """A token has taken so long, done as `on` said."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._begin()
            return
        if self._tokens and self.on == self._turns[self._tokens - 1]:
            self._times[self.on].append(seconds)
        self._tokens += 1
        if self._tokens < len(self._turns):
            self.on = self._turns[self._tokens]
        else:
            self.on = statistics.median(self._times[True]) < statistics.median(self._times[False])
            self._left = self._kept * len(self._turns)
