"""The cost model, and how it is measured."""

from __future__ import annotations

import numpy as np
import pytest

from dymoe_runtime.bundle.tiers import make_layout
from dymoe_runtime.engine import cost
from dymoe_runtime.engine.cost import CostModel, ExpertShape
from dymoe_runtime.kernels import load_kernels

KERNELS = load_kernels()


def test_costs_between_the_measured_are_interpolated() -> None:
    model = CostModel((1, 4, 8), 5.0, {2: (1.0, 2.5, 4.0), 4: (2.0, 5.0, 9.0)})
    assert [model.expert(2, n) for n in (1, 2, 4, 6, 8, 16)] == pytest.approx([1.0, 1.5, 2.5, 3.25, 4.0, 7.0])
    assert model.layer([(2, 1), (4, 8)]) == pytest.approx(5.0 + 1.0 + 9.0)
    assert model.layer([]) == 5.0


def test_one_measured_count_is_enough_to_decode() -> None:
    model = CostModel((1,), 0.0, {2: (3.0,)})
    assert model.expert(2, 1) == 3.0 and model.expert(2, 4) == 12.0


@pytest.mark.parametrize("records", [1, 3, 40])
def test_measuring_takes_what_memory_it_is_given(records: int) -> None:
    layout = make_layout({"gate": (64, 128), "up": (64, 128), "down": (128, 64)}, (2, 3, 4))
    memory = np.zeros(records * layout.record_bytes + 7, np.uint8)
    model = cost.measure(KERNELS, ExpertShape(layout, 4, 16), memory, counts=(1, 2, 32))
    assert model.counts == (1, 2, 32) and set(model.expert_s) == {2, 3, 4}
    assert all(len(times) == 3 for times in model.expert_s.values()) and model.call_s >= 0
    # Thirty-two tokens take longer than one on any machine.
    assert all(times[2] > times[0] for times in model.expert_s.values())
    used = min(records, 16) * layout.record_bytes
    assert (memory[:used] == cost.FILLER).all() and (memory[used:] == 0).all()


@pytest.mark.parametrize(("sweep_records", "used"), [(0.5, 1), (3.5, 3), (40, 5)])
def test_measuring_goes_through_as_much_memory_as_it_is_told(sweep_records: float, used: int) -> None:
    layout = make_layout({"gate": (64, 128), "up": (64, 128), "down": (128, 64)}, (2, 3, 4))
    size = layout.record_bytes
    memory = np.zeros(5 * size, np.uint8)
    cost.measure(KERNELS, ExpertShape(layout, 4, 16), memory, counts=(1,), sweep_bytes=int(sweep_records * size))
    assert (memory[: used * size] == cost.FILLER).all() and (memory[used * size :] == 0).all()
