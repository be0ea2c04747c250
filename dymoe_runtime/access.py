"""Access to what only one thread may use at a time: a loaded model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dymoe_runtime.errors import DymoeError

# How long the end of the program waits for a call that still runs in a daemon thread.
PATIENCE_S = 5.0


class Interrupted(KeyboardInterrupt):
    """Raised to end a call at a point where all parts of the resource are in order."""


class Access:
    """Lets one call at a time use a resource, in the process that made it. A call is a `with` block.

    A call raises DymoeError if another one runs, the resource is closed, or the process is a fork of the one that made
    it: threads and reads do not come along. So does every call after one that neither DymoeError nor `Interrupted` has
    ended, such as Ctrl-C: nobody knows then which changes are missing.
    """

    def __init__(self, what: str, release: Callable[[], object]) -> None:
        """Begin with an open resource, which messages call `what`; `release` frees it when it is closed."""
        self._what, self._release = what, release
        self._process = os.getpid()
        # Reentrant, so that an interrupt between two of the lines below cannot keep this thread from closing.
        self._running = threading.RLock()
        self._user = 0  # identity of the thread whose call runs
        self._closed = self._ending = False
        self._broken_by = ""

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            raise DymoeError(f"the {self._what} was loaded before this process was forked; load it again in the fork")
        if self._ending:
            _wait_for_ever()
        if self._user == threading.get_ident() or not self._running.acquire(blocking=False):
            raise DymoeError(f"the {self._what} is in use by another call; use it in one thread at a time, or load two")
        self._user = threading.get_ident()
        if self._closed:
            self._leave()
            raise DymoeError(f"the {self._what} is closed; load it again")
        if self._broken_by:
            self._leave()
            raise DymoeError(
                f"the {self._what} cannot be used since {self._broken_by} ended a call in the middle; load it again"
            )

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and not issubclass(kind, (DymoeError, Interrupted)):
            self._broken_by = kind.__name__
        self._leave()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Begin a call that changes nothing, so that whatever ends it does no harm."""
        self.__enter__()
        try:
            yield
        finally:
            self._leave()

    def check(self) -> None:
        """Raise DymoeError if the resource has been closed since the call began, so that the call ends early."""
        if self._ending:
            self._running.release()
            _wait_for_ever()
        if self._closed:
            raise DymoeError(f"the {self._what} was closed while it was in use; load it again")

    def close(self) -> None:
        """Free the resource once the call that runs has ended; at once if none runs.

        From within a call, its end frees the resource. A fork frees nothing, because all belongs to the other process.
        """
        if os.getpid() != self._process:
            return
        self._closed = True
        if self._user != threading.get_ident():
            with self._running:
                self._release()

    def end(self) -> None:
        """Free the resource because the program ends, once the call that runs has ended or can pause for ever.

        Only daemon threads still run then. The next call of each never returns, as if the program had ended already.
        """
        if os.getpid() == self._process:
            self._ending = True
            if self._running.acquire(timeout=PATIENCE_S):
                self._release()

    def _leave(self) -> None:
        if self._closed:
            self._release()
        self._user = 0
        self._running.release()


def _wait_for_ever() -> None:
    while True:
        threading.Event().wait()
