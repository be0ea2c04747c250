"""How much memory the expert arena has just now: less while a prompt runs, and once the limit is lowered."""

from __future__ import annotations

import time
from dataclasses import replace

from dymoe_runtime.budget import Budget, pass_tokens
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
        self._lent_bytes = 0  # by the arena to the pass of a prompt
        self._limit = imposed_limit()
        self._looked = time.monotonic() if heeds_limit else None

    def heed_limit(self) -> None:
        """Give memory back where the limit has been lowered; DymoeError where too little would be left."""
        if self._looked is None or time.monotonic() < self._looked + LOOK_S:
            return
        self._looked = time.monotonic()
        limit, before = imposed_limit(), self._limit
        self._limit = limit
        if limit >= before or (memory := memory_limit()) >= self.budget.memory:
            return
        self.budget = replace(self.budget, memory=memory)
        if memory < self.budget.need:
            raise DymoeError(
                f"the memory limit has been lowered to {format_size(memory)}, and the least that works "
                f"is {format_size(self.budget.need)}; raise it again or give a smaller --context"
            )
        self._lent_bytes = 0
        self._store.resize(self.budget.arena)

    def make_for_pass(self, left: int, used: int) -> int:
        """How many of the `left` tokens of a prompt to run next, with memory lent; it uses experts of `used` bytes."""
        tokens = pass_tokens(left, used, self.budget)
        self._lend(self.budget.lent(tokens))
        return tokens

    def take_back(self) -> None:
        """The prompt has ended."""
        self._lend(0)

    def _lend(self, nbytes: int) -> None:
        if nbytes != self._lent_bytes:
            return_freed_memory()
            self._store.resize(self.budget.arena - nbytes)
            self._lent_bytes = nbytes
