"""A trial keeps what is faster, and asks again."""

from __future__ import annotations

from dymoe_runtime.trial import Trial


def run(trial: Trial, tokens: int, on_s: float, off_s: float) -> list[bool]:
    """What the trial said of each token, if they take so long with and without."""
    said = []
    for _ in range(tokens):
        said.append(trial.on)
        trial.took(on_s if trial.on else off_s)
    return said


def test_what_is_faster_is_kept_for_long() -> None:
    for on_s, off_s, faster in ((1.0, 2.0, True), (2.0, 1.0, False)):
        said = run(Trial(tokens=3, kept=4), 18, on_s, off_s)
        assert sorted(said[:6]) == [False] * 3 + [True] * 3
        assert said[6:] == [faster] * 12


def test_a_single_slow_token_does_not_decide() -> None:
    trial = Trial(tokens=3, kept=1)
    for seconds in (1.0, 2.0, 90.0, 2.0, 1.0, 2.0):
        trial.took(seconds)
    assert trial.on


def test_tokens_that_become_faster_anyway_do_not_decide() -> None:
    trial = Trial(tokens=8, kept=1)
    for token in range(16):
        trial.took((1.0 if trial.on else 1.2) * (2 - token / 16))
    assert trial.on


def test_it_is_tried_again() -> None:
    trial = Trial(tokens=2, kept=3)
    assert not any(run(trial, 10, 2.0, 1.0)[4:])
    assert run(trial, 10, 1.0, 2.0)[4:] == [True] * 6
