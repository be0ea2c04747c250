"""How a prompt is divided into passes changes nothing but what is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine import load as load_module
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.kernels import load_kernels

# Tokens of a chunk, few enough for several in the context.
CHUNK = 64


@pytest.mark.skipif(not load_kernels().batch_invariant, reason="the reference runs each chunk by itself")
@pytest.mark.parametrize("count", [64, 65, 128, 175, 193, 500])
@pytest.mark.parametrize("point", ["3", "2.25"])
def test_how_a_prompt_is_divided_changes_nothing_but_what_is_read(
    count: int, point: str, shipped: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The less memory the activations of a chunk take, the more of them run together, in memory that is borrowed."""
    ids = np.random.default_rng(count).integers(shipped.spec.vocab_size, size=count).tolist()
    arena, found = shipped.expert_bytes() // 3, []
    for chunk in (1 << 40, 1 << 18, 1):

        def plan(*args: object, chunk: int = chunk, **kwargs: object) -> Budget:
            return replace(plan_budget(*args, **kwargs), chunk_bytes=chunk, chunk_tokens=CHUNK)  # type: ignore[arg-type]

        monkeypatch.setattr(load_module, "plan_budget", plan)
        trace = tmp_path / f"{chunk}.jsonl"
        options = RunOptions(context=512, arena_bytes=arena, point=point, prefetch=False, preload=False, trace=trace)
        with load_model(shipped, options) as model:
            before = model.store.arena_bytes
            logits = [model.prefill(ids), model.decode(ids[0])]
            read = model.store.stats.read_bytes
            assert model.store.arena_bytes == before
        lines = [json.loads(line) for line in trace.read_text().splitlines()]
        found.append((logits, read, [line["tokens"] for line in lines if "layer" not in line]))
    for logits, _, _ in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(logits, found[0][0], strict=True))
    whole = [count - 1, 1] if count % CHUNK == 1 else [count]
    assert found[0][2] == [*[CHUNK] * (count // CHUNK), *[count % CHUNK] * (count % CHUNK > 0), 1]
    assert found[2][2] == [*whole, 1]
    if whole[0] > CHUNK:
        assert found[2][1] < 0.8 * found[0][1]
