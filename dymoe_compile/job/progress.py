"""Progress reports of long work: the command line passes bars, other callers pass `silent`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Advance = Callable[[], object]
# (title, total) -> a context manager; its value is called once per piece of work.
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextlib.contextmanager
def silent(title: str, total: int) -> Iterator[Advance]:
    """Report nothing."""
    yield lambda: None
