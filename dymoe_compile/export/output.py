"""Where an export is written: next to its final place, and renamed there when it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dymoe_runtime.tools import output
from dymoe_runtime.tools.output import check_free

OTHER_PLACE = output.OTHER_PLACE


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` if this context ends without an error, else is removed.

    It is in `.NAME.export` beside `path`, so that what a killed export has left is found, and removed, by the next one.
    The directories above `path` are made. Raises DymoeError if something is at `path`, at first or by then, or if
    another process is writing it.
    """
    with output.new_directory(_prepared(path), "export") as directory:
        yield directory


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which becomes `path` if this context ends without an error, else is removed.

    It is in `.NAME.export` beside `path`, as that of `new_directory`, and the same errors are raised.
    """
    with output.new_path(_prepared(path), "export") as file:
        yield file


def _prepared(path: Path) -> Path:
    """Return the absolute `path`, at which nothing is, with the directories above it."""
    path = path.absolute()
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
