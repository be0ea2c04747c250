"""A time per token is found, held, and not given up for ever."""

from __future__ import annotations

import pytest

from dymoe_runtime.engine.control import TpotController


def run(controller: TpotController, tokens: int, seconds: list[float]) -> list[int]:
    """The point of each token, where each point takes its time."""
    points = []
    for _ in range(tokens):
        points.append(controller.index)
        controller.took(seconds[controller.index])
    return points


@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_best_point_in_time_is_found_and_held(start: int) -> None:
    points = run(TpotController(4, start, 1.0, tokens=5), 400, [0.5, 0.7, 0.9, 1.3])
    assert points[-300:].count(2) > 280


def test_changes_become_rare_where_two_points_lie_around_the_target() -> None:
    points = run(TpotController(2, 0, 1.0, tokens=5), 2000, [0.5, 1.2])
    changes = [i for i in range(1, 2000) if points[i] != points[i - 1]]
    assert len(changes) <= 14
    assert changes[-1] - changes[-3] > 2 * (changes[3] - changes[1])


def test_the_fastest_is_kept_where_nothing_is_in_time_and_left_when_it_is() -> None:
    controller = TpotController(3, 2, 1.0, tokens=5)
    assert set(run(controller, 200, [2.0, 3.0, 4.0])[20:]) == {0}
    assert run(controller, 400, [0.3, 0.5, 0.9])[-1] == 2


def test_a_single_slow_token_changes_nothing() -> None:
    controller = TpotController(2, 1, 1.0, tokens=5)
    assert not any(controller.took(seconds) for seconds in (0.9, 50.0, 0.9, 0.9, 0.9))
