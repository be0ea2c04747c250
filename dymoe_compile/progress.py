"""How long work reports on itself; the command line passes bars, tests and libraries nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Advance = Callable[[], object]
# (title, total) -> a context whose value is called once per piece.
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextlib.contextmanager
def silent(title: str, total: int) -> Iterator[Advance]:
    """No report."""
    yield lambda: None
