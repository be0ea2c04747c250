"""A memory limit that is lowered while a model runs: memory is given back, or the run ends with a sentence."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers import reader_threads

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine import arena_sizing as sizing_module
from dymoe_runtime.engine import load as load_module
from dymoe_runtime.engine.arena_sizing import ArenaSizer
from dymoe_runtime.engine.experts import StoredExperts
from dymoe_runtime.engine.load import load_model, load_scorer
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is checked all the time, and a prompt borrows nothing: that is over half of its arena."""
    monkeypatch.setattr(load_module, "ArenaSizer", partial(ArenaSizer, interval_s=0.0))
    monkeypatch.setattr(
        load_module, "plan_budget", lambda *args, **kwargs: replace(plan_budget(*args, **kwargs), spare_bytes=0)
    )


@pytest.mark.usefixtures("watchful")
def test_a_limit_that_is_lowered_is_heeded(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [[], []]
    for lowered, decoded in zip((False, True), tokens, strict=True):
        with load_model(shipped, RunOptions(tier=4, context=256)) as model:
            logits = model.prefill(list(range(40)))
            before = model.store.arena_bytes
            for number in range(24):
                if lowered and number == 8:
                    assert model.store.arena_bytes == before
                    limit = model.budget.need_bytes + shipped.expert_bytes() // 4
                    for name in ("imposed_limit", "memory_limit"):
                        monkeypatch.setattr(sizing_module, name, lambda: limit)  # noqa: B023
                decoded.append(int(logits.argmax()))
                logits = model.decode(decoded[-1])
            assert (model.store.arena_bytes < before // 2) == lowered
            assert model.store.resident_bytes() <= model.store.arena_bytes
            if lowered:
                for name in ("imposed_limit", "memory_limit"):
                    monkeypatch.setattr(sizing_module, name, lambda: 1 << 20)
                with pytest.raises(Exception, match=r"limit has been lowered to 1\.0 MiB"):
                    model.decode(1)
    assert tokens[0] == tokens[1]
    assert not reader_threads()


@pytest.mark.usefixtures("watchful")
def test_a_limit_that_is_lowered_is_heeded_while_a_prompt_runs(
    shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(200))
    with load_model(shipped, RunOptions(tier=4, context=512)) as model:
        whole, before, arenas = model.prefill(prompt), model.store.arena_bytes, []
        model.reset()
        limit = model.budget.need_bytes + shipped.expert_bytes() // 4
        run = StoredExperts.prefill

        def lower_in_the_third_layer(experts: StoredExperts, layer: int, *args: Any) -> np.ndarray:
            arenas.append(model.store.arena_bytes)
            if layer == 2:
                for name in ("imposed_limit", "memory_limit"):
                    monkeypatch.setattr(sizing_module, name, lambda: limit)
            return run(experts, layer, *args)

        monkeypatch.setattr(StoredExperts, "prefill", lower_in_the_third_layer)
        assert np.array_equal(model.prefill(prompt), whole)
        assert arenas[0] == arenas[2] > arenas[3] == arenas[-1]
        assert model.budget.memory_bytes == limit and model.store.arena_bytes < before // 2
        limit = 1 << 20
        with pytest.raises(DymoeError, match=r"limit has been lowered to 1\.0 MiB"):
            model.prefill([1, 2, 3])
        with pytest.raises(DymoeError, match=r"limit has been lowered to 1\.0 MiB"):  # not only the first time
            model.decode(1)
    assert not reader_threads()


def test_a_limit_that_was_as_low_from_the_start_changes_nothing(
    shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for more memory than the limit leaves without its margin gets it."""
    monkeypatch.setattr(load_module, "ArenaSizer", partial(ArenaSizer, interval_s=0.0))
    monkeypatch.setattr(sizing_module, "imposed_limit", lambda: 1 << 20)
    with load_model(shipped, RunOptions(tier=4, context=256, memory_bytes=4 << 30)) as model:
        before = model.store.arena_bytes
        model.prefill([1, 2, 3])
        assert model.store.arena_bytes == before


def test_a_limit_that_is_lowered_is_heeded_while_texts_are_scored(
    shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "ArenaSizer", partial(ArenaSizer, interval_s=0.0))
    window = np.arange(64)
    with load_scorer(shipped, RunOptions(tier=4), 64) as scorer:
        whole = scorer.hidden(window)
        for name in ("imposed_limit", "memory_limit"):
            monkeypatch.setattr(sizing_module, name, lambda: scorer.budget.need_bytes)
        assert np.array_equal(scorer.hidden(window), whole)
        for name in ("imposed_limit", "memory_limit"):
            monkeypatch.setattr(sizing_module, name, lambda: 1 << 20)
        for _ in range(2):
            with pytest.raises(DymoeError, match=r"limit has been lowered to 1\.0 MiB"):
                scorer.hidden(window)
