"""What the threads of a service share: the requests that wait, and whether the service ends."""

from __future__ import annotations

import threading

from dymoe_runtime.serving.service.batching.answer import QueuedAnswer
from dymoe_runtime.serving.service.batching.fair_queue import FairQueue
from dymoe_runtime.serving.service.errors import Closing, Full

# Seconds that a request takes, as long as none has ended yet.
FIRST_GUESS_S = 5.0
# The average of seconds moves by this part of a difference.
SMOOTHING = 4


class _Waiting:
    """An answer that waits, and who asked for it."""

    def __init__(self, answer: QueuedAnswer) -> None:
        self.answer, self.client = answer, answer.request.client


class Inbox:
    """The requests that wait for a slot, at most `limit` of them, and the answers that are not finished."""

    def __init__(self, limit: int, slots: int) -> None:
        """Begin with no requests, for a service of so many slots."""
        self.closing = False
        self.answered = 0
        self._limit, self._slots = limit, slots
        self._queue = FairQueue[_Waiting]()
        self._held: list[tuple[QueuedAnswer, object]] = []  # taken, but waiting for what the object computes
        self._running: set[QueuedAnswer] = set()
        self._changed = threading.Condition()
        self._seconds = FIRST_GUESS_S  # of the answers of late, on average

    def add(self, answer: QueuedAnswer) -> None:
        """Add a request; raise Full if there is no room, and Closing when the service ends."""
        with self._changed:
            if self.closing:
                raise Closing
            if self._count() >= self._limit + max(0, self._slots - len(self._running)):
                self._forget_cancelled()
                if self._count() >= self._limit + max(0, self._slots - len(self._running)):
                    raise Full(max(1.0, self._seconds * self._count() / self._slots))
            self._queue.add(_Waiting(answer))
            self._changed.notify()

    def take(self) -> QueuedAnswer | None:
        """Return the next request, which runs from now on, or None if none waits."""
        with self._changed:
            while (waiting := self._queue.take()) is not None:
                if not waiting.answer.cancelled.is_set():
                    self._running.add(waiting.answer)
                    return waiting.answer
        return None

    def put_back(self, answer: QueuedAnswer, until: object) -> None:
        """Hold a request back until `released(until)`; it still counts as waiting."""
        with self._changed:
            self._running.discard(answer)
            self._held.append((answer, until))

    def released(self, what: object) -> None:
        """Let the requests go on that wait for `what`."""
        with self._changed:
            for answer, until in reversed(self._held):
                if until is what:
                    self._queue.add_first(_Waiting(answer))
            self._held = [pair for pair in self._held if pair[1] is not what]

    def end(self, answer: QueuedAnswer, seconds: float) -> None:
        """Note that an answer has ended, which took so many seconds."""
        with self._changed:
            self._running.discard(answer)
            self.answered += 1
            self._seconds += (seconds - self._seconds) / SMOOTHING

    def waiting(self) -> int:
        """Return how many requests wait."""
        with self._changed:
            self._forget_cancelled()
            return self._count()

    def busy(self) -> int:
        """Return how many requests run."""
        return len(self._running)

    def wait(self, seconds: float | None) -> bool:
        """Wait for a request, for so many seconds at the most; return False once the service ends and none waits."""
        with self._changed:
            if not self._count() and not self.closing:
                self._changed.wait(seconds)
            return self._count() > 0 or not self.closing

    def close(self) -> None:
        """Take no more requests."""
        with self._changed:
            self.closing = True
            self._changed.notify()

    def end_all(self) -> None:
        """End all answers with `Closing`."""
        with self._changed:
            for answer in (*self._running, *self._all_waiting()):
                answer.add(Closing())
                answer.cancel()
            self._queue.clear()
            self._held.clear()

    def _count(self) -> int:
        return len(self._queue) + len(self._held)

    def _all_waiting(self) -> list[QueuedAnswer]:
        waiting = [item.answer for item in self._queue.clear()]
        return waiting + [answer for answer, _ in self._held]

    def _forget_cancelled(self) -> None:
        kept = [item for item in self._queue.clear() if not item.answer.cancelled.is_set()]
        for item in kept:
            self._queue.add(item)
        self._held = [pair for pair in self._held if not pair[0].cancelled.is_set()]
