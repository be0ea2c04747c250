"""A small part of the campaigns that `make fuzz` runs: damaged inputs of every kind, always the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.campaign import Campaign, Run, Server, make_inputs, problem_of, server
from fuzz.server import CRASH, HANG, SIGNAL

Inputs = tuple[Path, Path, Path, dict[str, Path]]


@pytest.fixture(scope="module")
def made() -> Iterator[Server]:
    with server() as running:
        yield running


@pytest.fixture(scope="module")
def inputs(made: Server, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("fuzz"), made)


def test_damaged_bundles_get_one_sentence_or_the_right_text(made: Server, inputs: Inputs) -> None:
    campaign = Campaign(made)
    campaign.bundles(inputs[2], 40, seed=1)
    assert not campaign.failures, "\n\n".join(campaign.failures)
    assert campaign.ends["exit 1"] > 20


def test_damaged_checkpoints_get_one_sentence_or_are_compiled(made: Server, inputs: Inputs) -> None:
    campaign = Campaign(made)
    campaign.checkpoints(inputs[0], inputs[1], 15, seed=1)
    assert not campaign.failures, "\n\n".join(campaign.failures)
    assert campaign.ends["exit 1"] > 5


def test_damaged_traces_warm_sets_and_profiles_get_one_sentence(made: Server, inputs: Inputs) -> None:
    campaign = Campaign(made)
    campaign.others(inputs[2], inputs[3], 25, seed=1)
    assert not campaign.failures, "\n\n".join(campaign.failures)
    assert campaign.ends["exit 1"] > 12


SOUND = Run(0, "text\n", "", 100 << 20)


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (SOUND, None),
        (Run(0, "other\n", "", 0), "other text"),
        (Run(1, "", "dymoe-run: a sentence; a remedy\n", 0), None),
        (Run(1, "", "note: beside\ndymoe-run: a sentence; a remedy\n", 0), None),
        (Run(1, "", "two\nlines\n", 0), "2 lines"),
        (Run(1, "", "", 0), "0 lines"),
        (Run(1, "", "\x1b[31m\n", 0), "control characters"),
        (Run(CRASH, "", "Traceback (most recent call last):\n", 0), "traceback"),
        (Run(HANG, "", "", 0), "hangs"),
        (Run(SIGNAL + 11, "", "", 0), "signal 11"),
        (Run(0, "text\n", "", 400 << 20), "MiB"),
        (Run(130, "", "a line\n", 0), "exit code 130"),
    ],
)
def test_what_is_wrong_is_seen(ended: Run, words: str | None) -> None:
    problem = problem_of(ended, SOUND, may_differ=False)
    assert (problem is None) if words is None else (problem is not None and words in problem)
