"""A trial keeps what is faster, and asks again."""

from __future__ import annotations

import math

import pytest

from dymoe_runtime.engine.control import PrefetchTrial


def started(turn: int, kept: int) -> PrefetchTrial:
    """After the tokens that are not tried."""
    trial = PrefetchTrial(turn, kept)
    for _ in range(4 * turn):
        assert not trial.on
        trial.took(0.5)
    return trial


def run(trial: PrefetchTrial, tokens: int, on_s: float, off_s: float) -> list[bool]:
    """What the trial said of each token, if they take so long with and without."""
    said = []
    for _ in range(tokens):
        said.append(trial.on)
        trial.took(on_s if trial.on else off_s)
    return said


@pytest.mark.parametrize(("on_s", "off_s", "faster"), [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_what_is_faster_is_kept_for_long(on_s: float, off_s: float, faster: bool) -> None:
    said = run(started(turn=3, kept=2), 36, on_s, off_s)
    assert said[:12] == [False] * 3 + [True] * 6 + [False] * 3
    assert said[12:] == [faster] * 24


def test_a_single_slow_token_does_not_decide() -> None:
    trial = started(turn=3, kept=1)
    for token in range(12):
        trial.took(90.0 if token == 5 else 1.0 if trial.on else 2.0)
    assert trial.on


def test_tokens_that_become_faster_anyway_do_not_decide() -> None:
    trial = started(turn=8, kept=1)
    for token in range(32):
        trial.took((1.0 if trial.on else 1.1) * (2 - token / 32))
    assert trial.on


def test_what_the_token_before_left_does_not_decide() -> None:
    trial, before = started(turn=2, kept=1), None
    for _ in range(8):
        now = trial.on
        trial.took(9.0 if now is not before else 2.0 if now else 1.0)
        before = now
    assert not trial.on


def test_it_is_tried_again() -> None:
    trial = started(turn=2, kept=1)
    assert not any(run(trial, 16, 2.0, 1.0)[8:])
    assert run(trial, 16, 1.0, 2.0)[8:] == [True] * 8


@pytest.mark.parametrize("fades", [3, 4, 8])
def test_what_a_prompt_left_does_not_decide(fades: int) -> None:
    """Memory fills with what tokens use, ever more slowly."""
    trial = PrefetchTrial()
    for token in range(32):
        trial.took((1.02 if trial.on else 1.0) * (1 + 0.6 * math.exp(-token / fades)))
    assert not trial.on


def test_a_trial_of_what_has_changed_begins_anew() -> None:
    trial = started(turn=3, kept=2)
    run(trial, 6, 1.0, 2.0)
    trial.restart()
    assert run(trial, 13, 9.0, 8.0) == [False] * 3 + [True] * 6 + [False] * 4
    trial.restart()  # once it is decided that holds
    assert run(trial, 3, 9.0, 8.0) == [False] * 3 and not trial.on
