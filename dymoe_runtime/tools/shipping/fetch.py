"""Copies of bundles that go on where they were interrupted, and are checked to the last byte."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

from dymoe_runtime.bundle.bundle import Bundle, FileEntry, file_entry, read_manifest
from dymoe_runtime.bundle.records import check_digest, compare_digest, verify
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.place import remove_own
from dymoe_runtime.storage import MANIFEST
from dymoe_runtime.tools.output import clear, place_new, work_beside
from dymoe_runtime.tools.shipping.remote import UNREACHABLE, Interrupted, Source

# Tries without a new byte until a copy gives up, and the longest wait between them.
TRIES, MAX_WAIT_S = 6, 8.0
# Names in the directory of work.
PACKED, FILES = "packed", "files"

Advance = Callable[[int], object]


def fetch(source: Source, target: Path, expect: str | None, advance: Advance) -> None:
    """Copy a bundle to `target`, a file if it is packed, else a directory; `advance` gets the bytes that came.

    What an interrupted copy has brought is beside `target`, and is used. Every byte is checked against the manifest,
    and its digest against `expect` if that is given. Raises DymoeError if the source is damaged or cannot be reached,
    and if something is at `target`.
    """
    with work_beside(target, "fetching") as work:
        content = work / (PACKED if source.packed else FILES)
        try:
            if source.packed:
                _bring_packed(source, content, expect, advance)
            else:
                content.mkdir(exist_ok=True)
                _bring_files(source, content, expect, advance)
            place_new(content, target)
        except _Unsound as error:
            _remove(work)
            raise DymoeError(f"{source.where}: {error}; get the bundle from another place") from error
        _remove(work)


def _remove(work: Path) -> None:
    clear(work, FILES)
    remove_own(work, lambda name: False)


class _Unsound(Exception):
    """What was copied is not what it should be."""


def _bring_packed(source: Source, path: Path, expect: str | None, advance: Advance) -> None:
    for resumed in _tries(path):
        _bring(source, PACKED, path, advance)
        try:
            _check(path, expect)
            return
        except DymoeError as error:
            path.unlink()
            if not resumed:
                raise _Unsound(f"its copy is not sound ({error})") from error


def _bring_files(source: Source, files: Path, expect: str | None, advance: Advance) -> None:
    (files / MANIFEST).unlink(missing_ok=True)  # the source may have another by now
    _bring(source, MANIFEST, files / MANIFEST, advance)
    try:
        manifest = read_manifest(files)
        compare_digest(manifest, source.where, expect)
    except DymoeError as error:
        raise _Unsound(f"its manifest is not the right one ({error})") from error
    for name, entry in manifest.files.items():
        _bring_file(source, files / name, entry, advance)
    remove_own(files, lambda name: name != MANIFEST and name not in manifest.files)  # of an earlier version
    try:
        _check(files, expect)
    except DymoeError as error:
        raise _Unsound(f"its copy is not sound ({error})") from error


def _bring_file(source: Source, path: Path, entry: FileEntry, advance: Advance) -> None:
    for resumed in _tries(path):
        _bring(source, path.name, path, advance)
        found = file_entry(path, digest=bool(entry.sha256))
        if found == entry:
            return
        path.unlink()
        if not resumed:
            raise _Unsound(f"{path.name} does not match the manifest")


def _tries(path: Path) -> list[bool]:
    """Return, for each try to bring a file, whether it may go on with bytes of an earlier version."""
    return [True, False] if path.exists() else [False]


def _check(path: Path, expect: str | None) -> None:
    """Raise DymoeError unless the bundle at `path` is whole and has the digest `expect`, if that is given."""
    bundle = Bundle.open(path)
    if expect is not None or bundle.manifest.vouches:
        check_digest(bundle, expect or bundle.manifest.digest)
        return
    for _, problem in verify(bundle):
        if problem:
            raise DymoeError(problem)


def _bring(source: Source, name: str, path: Path, advance: Advance) -> None:
    """Append to `path` the bytes of a file that are missing there; raise DymoeError if they cannot be had."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o644), "ab") as file:
        tries = itertools.count()
        while True:
            before = file.tell()
            try:
                begins, pieces = source.pieces(name, before)
                if begins < before:  # a server that sends whole files only
                    file.truncate(0)
                for piece in pieces:
                    file.write(piece)
                    advance(len(piece))
                os.fsync(file.fileno())
                return
            except Interrupted as error:
                if file.tell() > before:
                    tries = itertools.count()
                elif (number := next(tries)) + 1 >= TRIES:
                    raise DymoeError(
                        f"{source.where}: {error}; {UNREACHABLE}, then run the same command, which goes on"
                    ) from error
                else:
                    time.sleep(min(MAX_WAIT_S, 0.1 * 2**number))
