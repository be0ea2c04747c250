"""Every family against transformers, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families.cases import CASES
from families.harness import PROMPT, Case, difference, random_model
from kernel_kit import ALL, kernels_of

from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.families import supported
from dymoe_runtime.kernels import REFERENCE
from dymoe_runtime.model.state import SequenceState

KERNELS = list(dict.fromkeys([ALL[0], REFERENCE]))


def test_every_family_has_a_case() -> None:
    others = {"mixtral", "olmoe", "qwen3_moe"}  # tests/model/test_decoder.py has theirs
    assert {case.family for case in CASES} | others == set(supported())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_transformers(case: Case, name: str, tmp_path: Path) -> None:
    """A prompt, then single tokens."""
    most, agreed = difference(case, tmp_path, kernels_of(name))
    assert most <= 1e-3 and agreed == 1.0


@pytest.mark.parametrize("case", list({case.family: case for case in reversed(CASES)}.values()), ids=str)
def test_a_prompt_in_chunks_equals_a_whole_one(case: Case, tmp_path: Path) -> None:
    random_model(case).save_pretrained(tmp_path)
    decoder, ids = open_original(tmp_path, kernels_of(ALL[0])).decoder, np.arange(PROMPT)
    states = SequenceState(decoder.spec, PROMPT, 32), SequenceState(decoder.spec, PROMPT, 32)
    whole, chunks = decoder.forward(ids, states[0]), decoder.prefill(ids, states[1], group=8)
    assert np.abs(decoder.logits(whole) - decoder.logits(chunks)).max() <= 1e-3
