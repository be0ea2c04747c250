"""Every family against transformers, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from families.cases import CASES
from families.harness import Case, difference
from kernel_kit import ALL, kernels_of

from dymoe_compile.families import supported
from dymoe_runtime.kernels import REFERENCE

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
