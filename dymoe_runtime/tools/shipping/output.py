"""New files and directories that appear complete, or not at all, and never in place of something else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.place import is_own_directory, remove_own, rename_new


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; it gets the name `target` at the end, and is removed if something fails.

    Raises DymoeError if something is at `target`, before or by then.
    """
    _check_free(target)
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
            os.fchmod(fd, 0o666 & ~_umask())
        _take_name(Path(name), target)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory; it gets the name `target` at the end, and is removed if something fails.

    Raises DymoeError if something is at `target`, before or by then.
    """
    _check_free(target)
    directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield directory
        directory.chmod(0o777 & ~_umask())
        _take_name(directory, target)
    finally:
        remove_own(directory, lambda name: True)


@contextmanager
def work_beside(target: Path) -> Iterator[Path]:
    """Yield a directory of this user beside `target` whose files stay if something fails, for the next try.

    Raises DymoeError if something is at `target`, if another process uses the directory, or if it is somebody else's.
    """
    _check_free(target)
    work = target.parent / f".{target.name}.fetching"
    with contextlib.suppress(FileExistsError):
        work.mkdir(0o700)
    if not is_own_directory(work):
        raise DymoeError(f"{work}: not a directory of yours; remove it, or choose another place with -o")
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DymoeError(f"{target}: another process is writing it; wait for it or stop it") from error
        yield work
    finally:
        os.close(lock)


def place_new(source: Path, target: Path) -> None:
    """Give a finished file or directory its name; raise DymoeError if something has it."""
    _take_name(source, target)


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise _in_the_way(target)
    if not target.parent.is_dir():
        raise DymoeError(f"{target.parent}: no such directory; make it, or choose another place with -o")


def _take_name(source: Path, target: Path) -> None:
    try:
        rename_new(source, target)
    except FileExistsError as error:
        raise _in_the_way(target) from error


def _in_the_way(target: Path) -> DymoeError:
    return DymoeError(f"{target}: something is there already; move it away, or choose another place with -o")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
