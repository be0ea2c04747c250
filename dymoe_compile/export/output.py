"""The directory or file of an export: built next to its final place, and renamed there when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.place import is_own_directory, rename_new

OTHER_PLACE = "choose another place with -o"


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` if this context ends without an error, else is removed.

    It is `.NAME.export` beside `path`, so that what a killed export has left is found, and removed, by the next one.
    Raises DymoeError if something is at `path`, at first or by then, or if another export is writing it.
    """
    with _workplace(path) as work:
        yield work
        _flush(work)
        _place(work, path.absolute())


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which becomes `path` if this context ends without an error, else is removed.

    It is in the directory `.NAME.export` beside `path`. Raises DymoeError as `new_directory` does.
    """
    with _workplace(path) as work:
        file = work / path.name
        yield file
        _flush(file)
        _place(file, path.absolute())


@contextlib.contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """Yield the empty directory `.NAME.export` beside `path`; whatever happens, nothing of it is left."""
    path = path.absolute()
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.export"
    with _locked(work):
        _empty(work)
        try:
            yield work
        finally:
            if os.path.lexists(work):
                _empty(work)
                os.rmdir(work)
        _flush(path.parent)


def _place(made: Path, path: Path) -> None:
    try:
        rename_new(made, path)
    except FileExistsError as error:
        raise DymoeError(f"{path}: something is there by now; {OTHER_PLACE}") from error


def check_free(path: Path) -> None:
    """Raise DymoeError if something is at `path`."""
    if os.path.lexists(path):
        raise DymoeError(f"{path}: exists already; remove it, or {OTHER_PLACE}")


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Make the directory `work`, or take one that is there, for this process alone."""
    busy = f"{work}: another dymoe-bundle export is writing it; wait for it or stop it"
    with contextlib.suppress(FileExistsError):
        os.mkdir(work, 0o755)
    if not is_own_directory(work):
        raise DymoeError(f"{work}: not a directory of yours; remove it, or {OTHER_PLACE}")
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DymoeError(busy) from error
        if not (work.exists() and os.path.samestat(os.fstat(fd), os.stat(work))):
            raise DymoeError(busy)  # the one that held it has just put it in place
        yield
    finally:
        os.close(fd)


def _empty(work: Path) -> None:
    """Remove the files that an export has left in `work`; raise DymoeError if there is anything else."""
    names = os.listdir(work)
    if any((work / name).is_dir() and not (work / name).is_symlink() for name in names):
        raise DymoeError(f"{work}: holds directories, which no export makes; move it away, or {OTHER_PLACE}")
    for name in names:
        os.unlink(work / name)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
