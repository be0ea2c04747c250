"""A small part of the campaigns that `make fuzz` runs: damaged inputs of every kind, always the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz.campaign import Campaign, Run, Server, problem_of, server
from fuzz.inputs import Inputs
from fuzz.server import CRASH, HANG, SIGNAL


@pytest.fixture(scope="module")
def made() -> Iterator[Server]:
    with server() as running:
        yield running


@pytest.fixture(scope="module")
def inputs(made: Server, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("fuzz"), made)


@pytest.mark.parametrize(("kind", "count", "refused"), [("bundle", 40, 15), ("checkpoint", 15, 5), ("other", 25, 12)])
def test_damaged_inputs_get_one_sentence_or_the_right_text(
    kind: str, count: int, refused: int, made: Server, inputs: Inputs
) -> None:
    campaign = Campaign(made, inputs, seed=1)
    campaign.run(kind, range(count))
    assert not campaign.failures, "\n\n".join(campaign.failures)
    assert campaign.ends["exit 1"] > refused


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
