"""A pass that somebody ends between two layers, and what the model does afterwards."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.options import RunOptions

IDS = list(range(1, 40))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_that_is_interrupted_leaves_no_token(layer: int, tiny_path: Path) -> None:
    with load_model(tiny_path, RunOptions(context=64)) as model:
        whole = [model.prefill(IDS[:20]), model.prefill(IDS[20:]), model.decode(1)]
        model.reset()
        model.prefill(IDS[:20])
        calls = itertools.count()
        model.interrupt_when(lambda: next(calls) == layer)
        with pytest.raises(KeyboardInterrupt):
            model.prefill(IDS[20:])
        assert model.tokens == IDS[:20]
        model.interrupt_when(lambda: False)
        np.testing.assert_array_equal(model.prefill(IDS[20:]), whole[1])
        np.testing.assert_array_equal(model.decode(1), whole[2])
        model.store.check()
        assert not model.store.leased()
