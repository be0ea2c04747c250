"""How much memory the expert arena has just now: less while a prompt runs, and once the limit is lowered."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from dymoe_runtime.budget import Budget, pass_tokens
from dymoe_runtime.decoder import Experts, Routing
from dymoe_runtime.device import format_size, imposed_limit, memory_limit, return_freed_memory
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.store import ExpertStore

# How often to see whether the memory limit has been lowered.
LOOK_S = 0.5


class Room:
    """Keeps the arena of `store` as large as `budget` allows."""

    def __init__(self, budget: Budget, store: ExpertStore, heeds_limit: bool) -> None:
        self.budget = budget
        self._store = store
        self._tokens = 0  # of the pass of a prompt that memory is lent to
        self._limit = imposed_limit()
        self._looked = time.monotonic() if heeds_limit else None

    def heed_limit(self) -> None:
        """Give memory back where the limit has been lowered; DymoeError where too little would be left."""
        if self._looked is None or time.monotonic() < self._looked + LOOK_S:
            return
        self._looked = time.monotonic()
        limit = imposed_limit()
        if limit >= self._limit or (memory := memory_limit()) >= self.budget.memory:
            self._limit = limit
            return
        if memory < self.budget.need:
            raise DymoeError(
                f"the memory limit has been lowered to {format_size(memory)}, and the least that works "
                f"is {format_size(self.budget.need)}; raise it again or give a smaller --context"
            )
        self._limit, self.budget = limit, replace(self.budget, memory=memory)
        self._fit()

    def heeding(self, experts: Experts) -> Experts:
        """`experts`, before each call of which the limit is heeded: a pass of a prompt may take many seconds.

        What such a pass has borrowed beyond the arena's least comes back only at its end.
        """

        def heed(layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
            self.heed_limit()
            return experts(layer, h, routing)

        return heed

    def make_for_pass(self, left: int, used: int) -> int:
        """How many of the `left` tokens of a prompt to run next, with memory lent; it uses experts of `used` bytes."""
        tokens = pass_tokens(left, used, self.budget)
        self._lend(tokens)
        return tokens

    def take_back(self) -> None:
        """The prompt has ended."""
        self._lend(0)

    def _lend(self, tokens: int) -> None:
        before, self._tokens = self.budget.lent(self._tokens), tokens
        if self.budget.lent(tokens) != before:
            return_freed_memory()
            self._fit()

    def _fit(self) -> None:
        self._store.resize(self.budget.arena - self.budget.lent(self._tokens))
