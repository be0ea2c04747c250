"""A small part of what `make faults` kills: twelve compilations, two of them in the last rename."""

from __future__ import annotations

from pathlib import Path

from faults.campaign import IN_RENAME, Kills
from faults.conftest import Inputs


def test_a_killed_compilation_goes_on_to_the_same_bytes_and_loses_nothing(inputs: Inputs, tmp_path: Path) -> None:
    kills = Kills(inputs.compile, tmp_path)
    for number in (0, IN_RENAME, *range(1, 21, 2)):  # all by the number of a call, so always at the same moments
        kills.one(number, seed=1)
    assert not kills.failures, "\n\n".join(kills.failures)
    assert kills.kinds["in the last rename, killed"] >= 2 and kills.kinds["in a call, killed"] >= 10
