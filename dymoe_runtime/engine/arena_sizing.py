"""Resizing of the expert arena: it shrinks while a prompt runs, and when the memory limit is lowered."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from dymoe_runtime.engine.budget import Budget, pass_tokens
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.routing import Experts, PromptRouting, Routing
from dymoe_runtime.process import imposed_limit, memory_limit, return_freed_memory
from dymoe_runtime.store.store import ExpertStore
from dymoe_runtime.units import format_size

# Time between checks of the memory limit.
CHECK_INTERVAL_S = 0.5


class ArenaSizer:
    """Keeps the arena of a store as large as the budget allows."""

    def __init__(
        self,
        budget: Budget,
        store: ExpertStore[Any],
        batch_invariant: bool,
        follows_limit: bool,
        interval_s: float = CHECK_INTERVAL_S,
    ) -> None:
        """Size the arena of `store`; `follows_limit` says whether a lowered memory limit shrinks it.

        `batch_invariant` is that of `pass_tokens`.
        """
        self.budget = budget
        self._store = store
        self._batch_invariant = batch_invariant
        self._tokens = 0  # of the prompt pass that borrows memory now; 0 if none does
        self._limit = imposed_limit()
        self._interval_s = interval_s
        self._checked = time.monotonic() if follows_limit else None

    def check_limit(self) -> None:
        """Shrink the arena if the memory limit has been lowered since the last check.

        Raises DymoeError if the new limit is below what this process needs. Does nothing if the last check was less
        than `interval_s` ago.
        """
        if self._checked is None or time.monotonic() < self._checked + self._interval_s:
            return
        self._checked = time.monotonic()
        limit = imposed_limit()
        if limit >= self._limit or (memory := memory_limit()) >= self.budget.memory_bytes:
            self._limit = limit
            return
        if memory < self.budget.need_bytes:
            raise DymoeError(
                f"the memory limit has been lowered to {format_size(memory)}, and the least that works "
                f"is {format_size(self.budget.need_bytes)}; raise it again or give a smaller --context"
            )
        self._limit, self.budget = limit, replace(self.budget, memory_bytes=memory)
        self._fit()

    def pass_tokens(self, left: int, used_bytes: int) -> int:
        """Return how many of the `left` tokens of a prompt its next pass runs.

        `used_bytes` are the bytes of all experts that the prompt uses.
        """
        return pass_tokens(left, used_bytes, self.budget, self._batch_invariant)

    def lend(self, tokens: int) -> None:
        """Lend arena memory to prompt passes of so many tokens, instead of what is lent now; 0 takes all back."""
        before, self._tokens = self.budget.borrowed_bytes(self._tokens), tokens
        if self.budget.borrowed_bytes(tokens) != before:
            return_freed_memory()
            self._fit()

    def _fit(self) -> None:
        self._store.resize(self.budget.arena_bytes - self.budget.borrowed_bytes(self._tokens))


class LimitedExperts:
    """`Experts` that check the memory limit before each call, because a pass of a prompt may take many seconds.

    For the same reason, `interrupted` is called there, too: it raises what shall end the pass.

    The arena never shrinks below its minimum. If that is not enough during a pass, the rest of the memory is given back
    when the pass ends and returns what it borrowed.
    """

    def __init__(self, experts: Experts, sizer: ArenaSizer, interrupted: Callable[[], None] = lambda: None) -> None:
        self._experts, self._sizer, self._interrupted = experts, sizer, interrupted

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        self._sizer.check_limit()
        self._interrupted()
        return self._experts.decode(layer, h, routing)

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        self._sizer.check_limit()
        self._interrupted()
        return self._experts.prefill(layer, h, routing)
