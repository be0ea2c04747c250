"""Control of prefetching and of the operating point between passes, by measured time or by a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dymoe_runtime.access import Interrupted
from dymoe_runtime.bundle.policy import OperatingPoint, Policy
from dymoe_runtime.engine.precision import Precision
from dymoe_runtime.engine.trace import Decisions
from dymoe_runtime.errors import DymoeError

# Tokens in a turn of a prefetch trial, and for how many trial lengths the faster setting is kept.
TURN = 4
KEPT = 18
# Tokens whose median time decides about the operating point.
WINDOW = 24
# The next better point is tried if tokens take less than this share of the target time.
SPARE = 0.8
# Number of decisions for which a point that was too slow is barred; it doubles each time.
BARRED = 4


class Interruption:
    """Ends a pass at a point where all parts are in order, once somebody asks for it."""

    def __init__(self) -> None:
        self._asked: Callable[[], bool] = lambda: False

    def when(self, asked: Callable[[], bool]) -> None:
        """Ask `asked` from now on."""
        self._asked = asked

    def check(self) -> None:
        """Raise `Interrupted` if the pass is to end."""
        if self._asked():
            raise Interrupted


class Control:
    """Sets prefetching and the operating point before each pass, and adapts them to measured times."""

    def __init__(self, precision: Precision, policy: Policy, decisions: Decisions | None = None) -> None:
        """Control `precision`, with points of `policy`; follow `decisions` of a trace, if given."""
        self._precision, self._policy, self._decisions = precision, policy, decisions
        self._trial = PrefetchTrial()
        self._tempo: TpotController | None = None
        self._points: tuple[OperatingPoint, ...] = ()
        self._in_prompt = True

    @property
    def changes_points(self) -> bool:
        """Return whether the point changes by itself: by measured times, or as a trace says."""
        return self._tempo is not None or self._decisions is not None

    def prefetching(self) -> bool:
        """Return whether to prefetch now: always in a prompt, and for decoded tokens as the trial says."""
        return self._in_prompt or self._trial.on

    def hold_tpot(self, points: Sequence[OperatingPoint], start: int, target_s: float) -> None:
        """Run the best of `points` at which a token takes at most `target_s`, from measured times.

        `points` are ordered by rising time; the one with index `start` runs first.
        """
        self._points, self._tempo = tuple(points), TpotController(len(points), start, target_s)
        self._run(self._points[start])

    def before_prompt(self, tokens: int) -> None:
        """Prepare a prompt pass of `tokens`; raise DymoeError if the trace that is followed has no such pass."""
        self._in_prompt = True
        self._follow_decisions(tokens, prompt=True)

    def before_token(self) -> None:
        """Prepare one decoded token; raise DymoeError if the trace that is followed has none."""
        self._in_prompt = False
        self._follow_decisions(1, prompt=False)

    def after_token(self, seconds: float) -> None:
        """Record how long a decoded token took; change prefetching or the point if that pays."""
        self._trial.took(seconds)
        if self._tempo is not None and self._tempo.took(seconds):
            self._run(self._points[self._tempo.index])

    def _run(self, point: OperatingPoint) -> None:
        self._precision.set_point(point, self._policy)
        self._trial.restart()

    def _follow_decisions(self, tokens: int, prompt: bool) -> None:
        if self._decisions is None:
            return
        name, running = self._decisions.begin(tokens, prompt), self._precision.name
        if name != running:
            points = {point.name: point for point in self._policy.points}
            if name not in points or running not in points:
                raise DymoeError(f"--decisions: the trace was made at {name}, this is {running}; give the same")
            self._run(points[name])


class TpotController:
    """Selects among points by rising time so that a token takes at most `target_s`.

    A point that was too slow is barred for a while, so that the selection does not oscillate.
    """

    def __init__(self, points: int, start: int, target_s: float, tokens: int = WINDOW) -> None:
        self.index = start
        self._points, self._target_s, self._tokens = points, target_s, tokens
        self._times: list[float] = []
        self._decisions = 0
        self._barred_until = [0] * points
        self._bars = [BARRED] * points

    def took(self, seconds: float) -> bool:
        """Record how long a token took; return whether `index` changed."""
        self._times.append(seconds)
        if len(self._times) < self._tokens:
            return False
        typical_s = np.median(self._times)
        self._times.clear()
        self._decisions += 1
        better = self.index + 1
        if typical_s > self._target_s and self.index > 0:
            self._barred_until[self.index] = self._decisions + self._bars[self.index]
            self._bars[self.index] *= 2
            self.index -= 1
            return True
        if (
            typical_s < SPARE * self._target_s
            and better < self._points
            and self._barred_until[better] <= self._decisions
        ):
            self.index = better
            return True
        return False


class PrefetchTrial:
    """An A/B test, while tokens are decoded, of whether prefetching is faster; `on` is the setting for the next token.

    A trial is one turn without prefetching, two turns with it, and one without. Then the faster setting is kept for
    some time. The results of the model do not depend on the setting.

    In this order both settings come equally late on average; that is fair, because a filling cache makes later tokens
    faster. Medians are compared, because single tokens may be disturbed. The first token after a change of setting
    does not count, because the token before it still has an effect. The first tokens of a run replace what the prompt
    left in memory, so they run without prefetching and no trial begins before they are done.
    """

    def __init__(self, turn: int = TURN, kept: int = KEPT) -> None:
        self._turns = [False] * turn + [True] * 2 * turn + [False] * turn
        self._kept = kept
        self._begin()
        self._left = len(self._turns)

    def _begin(self) -> None:
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._tokens = 0  # counted in this trial
        self._left = 0  # tokens until the next trial; 0 during a trial
        self.on = self._turns[0]

    def restart(self) -> None:
        """Restart a trial in progress, because times before and after a change of point do not compare."""
        if not self._left:
            self._begin()

    def took(self, seconds: float) -> None:
        """Record how long a token took with the current setting of `on`, and set `on` for the next token."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._begin()
            return
        if self._tokens and self.on == self._turns[self._tokens - 1]:
            self._times[self.on].append(seconds)
        self._tokens += 1
        if self._tokens < len(self._turns):
            self.on = self._turns[self._tokens]
        else:
            self.on = bool(np.median(self._times[True]) < np.median(self._times[False]))
            self._left = self._kept * len(self._turns)
