"""The arena gives memory to prompts, and back to the system where the limit is lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine import arena_sizing
from dymoe_runtime.engine import load as load_module
from dymoe_runtime.engine.arena_sizing import ArenaSizer, LimitedExperts
from dymoe_runtime.engine.budget import CHUNK, Budget
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.routing import NoExperts, PromptRouting, Routing

NEED, LEAST, SPARE = 4 << 20, 500_000, 128_000
BUDGET = Budget(
    memory_bytes=NEED + 300_000,
    process_bytes=0,
    floor_process_bytes=0,
    dense_bytes=NEED - LEAST,
    state_bytes=0,
    workspace_bytes=0,
    min_arena_bytes=LEAST,
    full_arena_bytes=2_000_000,
    chunk_bytes=60_000,
    spare_bytes=SPARE,
)


class Sized:
    """An arena sizer at once after each other check, and the sizes that it asked of its store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, follows_limit: bool = True) -> None:
        self.asked: list[int] = []
        store: Any = SimpleNamespace(resize=self.asked.append)
        self._monkeypatch = monkeypatch
        self.limit(BUDGET.memory_bytes + 1)
        self.sizer = ArenaSizer(BUDGET, store, batch_invariant=True, follows_limit=follows_limit, interval_s=0.0)

    def limit(self, nbytes: int) -> None:
        """Set the limit of this process."""
        for name in ("imposed_limit", "memory_limit"):
            self._monkeypatch.setattr(arena_sizing, name, lambda: nbytes)


def test_a_limit_that_is_lowered_while_memory_is_lent_leaves_it_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    sized = Sized(monkeypatch)
    assert sized.sizer.pass_tokens(CHUNK, 0) == CHUNK
    sized.sizer.lend(CHUNK)
    lower = replace(BUDGET, memory_bytes=NEED + 50_000)
    sized.limit(lower.memory_bytes)
    sized.sizer.check_limit()
    sized.sizer.lend(0)
    assert sized.asked == [BUDGET.arena_bytes - SPARE, lower.arena_bytes - SPARE, lower.arena_bytes]
    assert sized.sizer.budget == lower


def test_a_limit_that_is_lowered_below_what_is_needed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sized = Sized(monkeypatch)
    sized.limit(NEED - 1)
    with pytest.raises(DymoeError, match=r"lowered to 4\.0 MiB.*least that works is 4\.0 MiB.*smaller --context"):
        sized.sizer.check_limit()
    sized.limit(NEED)
    sized.sizer.check_limit()
    assert sized.sizer.budget.memory_bytes == NEED


def test_a_limit_that_leaves_the_budget_alone_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sized = Sized(monkeypatch)
    for limit in (BUDGET.memory_bytes, BUDGET.memory_bytes + 1):  # lowered, and raised
        sized.limit(limit)
        sized.sizer.check_limit()
    assert sized.asked == [] and sized.sizer.budget == BUDGET


def test_an_arena_of_a_given_size_follows_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sized = Sized(monkeypatch, follows_limit=False)
    sized.limit(0)
    sized.sizer.check_limit()
    assert sized.asked == [] and sized.sizer.budget == BUDGET


def test_the_limit_is_checked_before_each_layers_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    sized = Sized(monkeypatch)
    experts, h = LimitedExperts(NoExperts(), sized.sizer), np.ones((2, 3), np.float32)
    chosen, weights = np.zeros((2, 1), np.int64), np.ones((2, 1), np.float32)
    calls: list[Callable[[], np.ndarray]] = [
        lambda: experts.decode(0, h, Routing(chosen, weights, h)),
        lambda: experts.prefill(0, h, PromptRouting(chosen, weights, h, weights[:, 0], [2])),
    ]
    for number, call in enumerate(calls):
        lower = replace(BUDGET, memory_bytes=NEED + 1000 * (9 - number))
        sized.limit(lower.memory_bytes)
        assert not call().any()
        assert sized.asked[number:] == [lower.arena_bytes]


def test_the_arena_is_smaller_while_a_prompt_runs(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the activations of so many tokens take; the tokens are what they are with memory for all."""
    quarter, found, arenas = shipped.expert_bytes() // 4, [], list[tuple[int, int]]()

    def plan(*args: Any, **kwargs: Any) -> Budget:
        budget = plan_budget(*args, **kwargs)
        floor_process = budget.process_bytes
        memory = budget.need_bytes + quarter
        return replace(budget, floor_process_bytes=floor_process, memory_bytes=memory, spare_bytes=2 << 20)

    def observe(name: str) -> None:
        real = getattr(Decoder, name)

        def observed(decoder: Decoder, ids: np.ndarray, *args: Any) -> np.ndarray:
            arenas.append((len(ids), model.store.arena_bytes))
            return real(decoder, ids, *args)

        monkeypatch.setattr(Decoder, name, observed)

    observe("forward")
    observe("prefill")
    for short in (False, True):
        if short:
            monkeypatch.setattr(load_module, "plan_budget", plan)
        with load_model(shipped, RunOptions(tier=4, context=256)) as model:
            whole = model.store.arena_bytes
            found.append([model.prefill(list(range(200))), model.decode(1), model.prefill([2, 3]), model.decode(4)])
            assert model.store.arena_bytes == whole
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert [tokens for tokens, _ in arenas] == [200, 1, 2, 1] * 2
    assert len({arena for _, arena in arenas[:4]}) == 1  # nothing is lent where there is room
    of_200, of_1, of_2, again = (arena for _, arena in arenas[4:])
    assert of_1 == again == whole
    assert whole - of_200 > 1 << 20 > whole - of_2 >= 0  # in whole chunks of the arena
