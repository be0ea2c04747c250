"""New files and directories that appear complete, or not at all, and never in place of something else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.place import is_own_directory, remove_own, rename_new

OTHER_PLACE = "choose another place with -o"
# The name of what becomes the target, in the directory of work.
CONTENT = "content"


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; it gets the name `target` at the end, and is removed if something fails.

    Raises DymoeError if something is at `target`, before or by then, or if another process is writing it.
    """
    with _new(target) as content, open(content, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_path(target: Path, suffix: str = "writing") -> Iterator[Path]:
    """Yield the path of a file to write; the file gets the name `target` at the end, and is removed if something fails.

    Until then it is in `.NAME.suffix` beside `target`. Raises DymoeError as `new_file` does.
    """
    with _new(target, suffix) as content:
        yield content
        flush_directory(content)


@contextmanager
def new_directory(target: Path, suffix: str = "writing") -> Iterator[Path]:
    """Yield an empty directory; it gets the name `target` at the end, and is removed if something fails.

    Until then it is in `.NAME.suffix` beside `target`. Raises DymoeError as `new_file` does.
    """
    with _new(target, suffix) as content:
        content.mkdir()
        yield content
        flush_directory(content)


@contextmanager
def _new(target: Path, suffix: str = "writing") -> Iterator[Path]:
    """Yield the path of what becomes `target` at the end. What a killed process has left there is removed first."""
    with work_beside(target, suffix) as work:
        clear(work)
        try:
            yield work / CONTENT
            place_new(work / CONTENT, target)
        finally:
            clear(work)
            remove_own(work, lambda name: False)


@contextmanager
def work_beside(target: Path, suffix: str) -> Iterator[Path]:
    """Yield the directory `.NAME.suffix` of this user beside `target`, whose files stay if something fails.

    Raises DymoeError if something is at `target`, if another process uses the directory, or if it is somebody else's.
    """
    check_free(target)
    if not target.parent.is_dir():
        raise DymoeError(f"{target.parent}: no such directory; make it, or {OTHER_PLACE}")
    work = target.parent / f".{target.name}.{suffix}"
    with contextlib.suppress(FileExistsError):
        work.mkdir(0o700)
    if not is_own_directory(work):
        raise DymoeError(f"{work}: not a directory of yours; remove it, or {OTHER_PLACE}")
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _locked(lock, work):
            raise DymoeError(f"{target}: another process is writing it; wait for it or stop it")
        yield work
    finally:
        os.close(lock)


def _locked(lock: int, work: Path) -> bool:
    """Return whether the directory `work`, open as `lock`, is for this process alone from now on."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), os.stat(work))
    except (BlockingIOError, FileNotFoundError):  # held, or removed by the one that held it
        return False


def place_new(source: Path, target: Path) -> None:
    """Give a finished file or directory its name, on the disk; raise DymoeError if something has it."""
    try:
        rename_new(source, target)
    except FileExistsError as error:
        raise DymoeError(f"{target}: something is there by now; move it away, or {OTHER_PLACE}") from error
    flush_directory(target.parent)


def check_free(target: Path) -> None:
    """Raise DymoeError if something is at `target`."""
    if os.path.lexists(target):
        raise DymoeError(f"{target}: something is there already; move it away, or {OTHER_PLACE}")


def clear(work: Path, directory: str = CONTENT) -> None:
    """Remove the files in a directory of work, and its own `directory` with what is there.

    Raises DymoeError if it holds other directories, which this program has not made; nothing is removed then.
    """
    paths = list(work.iterdir())
    inner = [path for path in paths if path.is_dir() and not path.is_symlink()]
    if any(path.name != directory for path in inner):
        raise DymoeError(f"{work}: holds directories that are not its own; move it away, or {OTHER_PLACE}")
    for path in paths:
        if path in inner:
            shutil.rmtree(path)
        else:
            path.unlink()


def flush_directory(directory: Path) -> None:
    """Bring the names in a directory, or the bytes of a file, to the disk."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
