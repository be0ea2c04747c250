"""Placing of finished files and directories: nothing that is at their place is lost, whatever happens."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from dymoe_runtime.storage import MANIFEST

# linux/fs.h
_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
# Errors of renameat2 where the system or the file system does not know a flag.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or directory to a name that nothing has; raise FileExistsError if something is there by then."""
    if _renameat2(source, target, _NOREPLACE):
        return
    if not source.is_dir():
        os.link(source, target)
        os.unlink(source)
        return
    os.mkdir(target)  # reserves the name; what is put into it from now on makes the rename fail
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.rmdir(target)
        raise


def exchange(source: Path, target: Path, aside: Path) -> Path:
    """Put the directory `source` in place of the directory `target`; return where that is now: `source` or `aside`.

    If the system cannot exchange them in one step, `target` is moved to `aside` first, which must not exist.
    """
    if _renameat2(source, target, _EXCHANGE):
        return source
    rename_new(target, aside)
    try:
        rename_new(source, target)
    except BaseException:
        rename_new(aside, target)
        raise
    return aside


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Call renameat2; return False if it is not known here. Raises OSError if it fails."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(target))


def is_own_directory(path: Path) -> bool:
    """Return whether `path` is a directory, no link, of this user."""
    info = os.lstat(path)
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()


def holds_only_a_bundle(directory: Path) -> bool:
    """Return whether a directory, no link, is empty, or has a bundle's manifest and only files that this names."""
    try:
        present, listed = set(os.listdir(directory)), _listed(directory)
        names = set() if listed is None else {MANIFEST, *listed}
        return not directory.is_symlink() and present <= names and all(_is_file(directory / name) for name in present)
    except OSError:
        return False


def remove_bundle(directory: Path) -> bool:
    """Remove the files of a bundle, then its directory; return False if other things are there, which stay."""
    listed = _listed(directory) or set()  # before the manifest goes, which is last: what is left is a bundle until then
    remove_own(directory, lambda name: name in listed)
    return remove_own(directory, lambda name: bool(listed) and name == MANIFEST)


def remove_own(directory: Path, is_own: Callable[[str], bool]) -> bool:
    """Remove the files that `is_own` says, then the directory if it is empty; return whether it is gone."""
    try:
        for name in filter(is_own, os.listdir(directory)):
            if _is_file(directory / name):
                os.unlink(directory / name)
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(os.lstat(path).st_mode)


def _listed(directory: Path) -> set[str] | None:
    """Return the names of files in the manifest of a bundle, or None if it is not the manifest of one."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return set(map(str, manifest["files"])) if "ladder" in manifest else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
