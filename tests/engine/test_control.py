"""Whether to prefetch and which point runs follow from what tokens took, or from a trace, and fit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dymoe_runtime.bundle.policy import LayerPolicy, OperatingPoint, Policy
from dymoe_runtime.engine.control import KEPT, TURN, WINDOW, Control
from dymoe_runtime.engine.precision import Precision
from dymoe_runtime.engine.trace import Decisions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.tier_rule import TierRule, uniform_thresholds

LADDER = (2, 3, 4)
TRIAL = 4 * TURN  # tokens
# Of the tokens after a prompt: those that are not tried, then the turns of a trial.
UNTRIED, TURNS = [False] * TRIAL, [False] * TURN + [True] * 2 * TURN + [False] * TURN


def make_point(name: str, tier: int, bytes_per_token: float) -> OperatingPoint:
    rows = (uniform_thresholds(tier, LADDER),)
    return OperatingPoint(name, "uniform", rows, rows, tier, tier, bytes_per_token, 1 / tier, 3.0, 0.9, 1 / tier)


LOW, MIDDLE, HIGH = (make_point(f"uniform-{tier}", tier, float(tier)) for tier in LADDER)
POLICY = Policy(
    LADDER, (LayerPolicy(0, {}, (), (), {}, {}, (), (), "none", ()),), (LOW, MIDDLE, HIGH), default_point="uniform-3"
)
NAMES = [point.name for point in POLICY.points]


def running(point: OperatingPoint) -> Precision:
    return Precision(point.name, TierRule.of(point, POLICY))


def decode(
    control: Control, precision: Precision, tokens: int, seconds: Callable[[str, bool], float]
) -> list[tuple[str, bool]]:
    """The point of each token, and whether it prefetched; `seconds` says what such a token takes."""
    found = []
    for _ in range(tokens):
        control.before_token()
        found.append((precision.name, control.prefetching()))
        control.after_token(seconds(*found[-1]))
    return found


def prefetched(found: Sequence[tuple[str, bool]]) -> list[bool]:
    return [prefetching for _, prefetching in found]


def names_of(found: Sequence[tuple[str, bool]]) -> list[str]:
    return [name for name, _ in found]


def trace_of(passes: Sequence[tuple[str, int, bool]]) -> Decisions:
    """Decisions of a run whose passes had this point, so many tokens, and were of a prompt or not."""
    lines: list[dict[str, Any]] = []
    for number, (name, tokens, prompt) in enumerate(passes):
        lines.append({"pass": number, "tokens": tokens, "seconds": 1.0, "point": name, "prompt": prompt})
    return Decisions(lines, "trace.jsonl")


@pytest.mark.parametrize("faster", [True, False])
def test_prompts_always_prefetch_and_tokens_where_it_is_faster(faster: bool) -> None:
    precision = running(MIDDLE)
    control = Control(precision, POLICY)
    assert control.prefetching()  # before anything has run
    control.before_prompt(300)
    assert control.prefetching()

    def seconds(name: str, prefetching: bool) -> float:
        return 1.0 if prefetching == faster else 2.0

    assert prefetched(decode(control, precision, 2 * TRIAL, seconds)) == UNTRIED + TURNS
    kept = decode(control, precision, KEPT * TRIAL // 2, seconds)
    control.before_prompt(9)  # of another turn, which changes nothing for the tokens after it
    assert control.prefetching()
    kept += decode(control, precision, KEPT * TRIAL // 2, seconds)
    assert prefetched(kept) == [faster] * KEPT * TRIAL
    assert prefetched(decode(control, precision, TRIAL, seconds)) == TURNS  # and it is tried again
    assert set(names_of(kept)) == {MIDDLE.name}


def test_a_prompt_within_a_trial_leaves_it_where_it_was() -> None:
    precision = running(MIDDLE)
    control = Control(precision, POLICY)
    found = []
    for tokens in (TRIAL + TURN + 1, TRIAL - TURN - 1, 4):
        control.before_prompt(5)
        assert control.prefetching()
        found += decode(control, precision, tokens, lambda _, prefetching: 1.0 if prefetching else 2.0)
    assert prefetched(found) == UNTRIED + TURNS + [True] * 4


def test_a_time_per_token_is_held_from_the_first_point_on() -> None:
    precision = running(MIDDLE)
    control = Control(precision, POLICY)
    control.hold_tpot(POLICY.points, 2, 1.0)
    assert precision.name == HIGH.name and precision.rule == TierRule.of(HIGH, POLICY)
    control.before_prompt(7)
    assert precision.name == HIGH.name
    slow = names_of(decode(control, precision, 2 * WINDOW, lambda *_: 3.0))
    assert slow == [HIGH.name] * WINDOW + [MIDDLE.name] * WINDOW
    assert precision.name == LOW.name and precision.rule == TierRule.of(LOW, POLICY)
    assert set(names_of(decode(control, precision, 5 * WINDOW, lambda *_: 3.0))) == {LOW.name}


def test_a_change_of_the_point_begins_a_trial_anew_but_keeps_what_is_decided() -> None:
    def seconds(name: str, prefetching: bool) -> float:
        return (3.0 if name == HIGH.name else 0.9) * (0.9 if prefetching else 1.0)

    precision = running(HIGH)
    control = Control(precision, POLICY)
    control.hold_tpot((MIDDLE, HIGH), 1, 1.0)
    found = decode(control, precision, WINDOW + TRIAL, seconds)
    assert names_of(found) == [HIGH.name] * WINDOW + [MIDDLE.name] * TRIAL
    under_way = WINDOW - TRIAL  # tokens of the trial when the point changed
    assert prefetched(found) == UNTRIED + TURNS[:under_way] + TURNS
    # What is decided now is kept, though the point changes once it is tried again.
    after = decode(control, precision, 6 * WINDOW, lambda *_: 0.1)
    assert prefetched(after) == [True] * len(after) and len(after) < KEPT * TRIAL
    assert names_of(after)[0] == MIDDLE.name and names_of(after)[-1] == HIGH.name


def test_both_settle_where_prefetching_is_what_makes_a_point_fast_enough() -> None:
    alone, with_prefetch = (
        dict(zip(NAMES, (0.6, 0.9, 1.3), strict=True)),
        dict(zip(NAMES, (0.5, 0.7, 0.95), strict=True)),
    )

    def seconds(name: str, prefetching: bool) -> float:
        return (with_prefetch if prefetching else alone)[name]

    precision = running(LOW)
    control = Control(precision, POLICY)
    control.hold_tpot(POLICY.points, 0, 1.0)
    control.before_prompt(20)
    found = decode(control, precision, 3000, seconds)[-2000:]
    assert prefetched(found).count(True) > 0.9 * len(found)
    assert names_of(found).count(HIGH.name) > 0.9 * len(found)
    assert sum(seconds(*each) for each in found) / len(found) < 1.0


def test_a_trace_says_which_point_runs_whatever_the_time() -> None:
    """As a run chose it that held a time per token, with the prompt in other passes."""
    precision = running(LOW)
    control = Control(precision, POLICY)
    control.hold_tpot(POLICY.points, 0, 1.0)
    control.before_prompt(600)
    times = dict(zip(NAMES, (0.5, 0.7, 1.2), strict=True))
    first = names_of(decode(control, precision, 300, lambda name, _: times[name]))
    assert set(first) == set(NAMES)

    passes = [(LOW.name, 600, True), *((name, 1, False) for name in first)]
    again = running(HIGH)
    follower = Control(again, POLICY, trace_of(passes))
    for tokens in (256, 256, 88):
        follower.before_prompt(tokens)
        assert again.name == LOW.name and follower.prefetching()
    found = decode(follower, again, 300, lambda *_: 100.0)
    assert names_of(found) == first
    assert again.rule == TierRule.of(POLICY.point(first[-1]), POLICY)
    with pytest.raises(DymoeError, match=r"trace\.jsonl"):
        follower.before_token()


def test_a_trial_begins_anew_where_a_trace_changes_the_point() -> None:
    tokens = TRIAL + TURN + 2  # two of them with prefetching
    passes = [(LOW.name, 3, True), *[(LOW.name, 1, False)] * tokens, *[(HIGH.name, 1, False)] * TRIAL]
    precision = running(LOW)
    control = Control(precision, POLICY, trace_of(passes))
    control.before_prompt(3)
    found = decode(control, precision, tokens + TRIAL, lambda *_: 1.0)
    assert prefetched(found) == UNTRIED + TURNS[: TURN + 2] + TURNS


def test_passes_that_a_trace_does_not_have_are_refused() -> None:
    passes = [(LOW.name, 3, True), (LOW.name, 1, False)]
    for begin in (
        lambda control: control.before_token(),  # before any prompt
        lambda control: control.before_prompt(4),  # a longer one
        lambda control: (control.before_prompt(3), control.before_prompt(1)),
    ):
        with pytest.raises(DymoeError, match="not of this prompt and these options"):
            begin(Control(running(LOW), POLICY, trace_of(passes)))


def test_a_trace_of_something_else_than_points_is_followed_by_the_same_alone() -> None:
    passes = [("tier 4", 3, True)]
    same = Precision("tier 4", TierRule.uniform(4, LADDER, 1))
    Control(same, POLICY, trace_of(passes)).before_prompt(3)
    assert same.name == "tier 4"
    for precision, name in ((running(LOW), "tier 4"), (same, LOW.name), (same, "uniform-9")):
        control = Control(precision, POLICY, trace_of([(name, 3, True)]))
        with pytest.raises(DymoeError, match=f"--decisions: the trace was made at {name}, this is {precision.name}"):
            control.before_prompt(3)
