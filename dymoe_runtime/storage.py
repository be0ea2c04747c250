"""The files of a model: in a directory, or packed into one file.

A packed bundle is a ZIP archive without compression. The data of each member start at a multiple of a page, so that
they can be read in place and past the page cache. `unzip` reads such an archive, too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import MAX_JSON_BYTES, MAX_MEMBER_BYTES, PLAIN_NAME, open_regular, read_regular

# Bytes read at a time.
PIECE_BYTES = 1 << 20
# The most bytes of an archive's index: several times those of the largest model.
MAX_INDEX_BYTES = 16 << 20
# The fixed part of a member's header in an archive, how it starts, and where it has the lengths of its other parts.
HEADER_BYTES, HEADER_START = 30, b"PK\3\4"
MANIFEST = "manifest.json"


class Member(NamedTuple):
    """An open file of a model: `nbytes` bytes of `fd` from `start` on. `path` names what `fd` is in errors."""

    fd: int
    path: Path
    start: int
    nbytes: int

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)

    def pieces(self, remedy: str) -> Iterator[bytes]:
        """Yield all bytes in order.

        Raises DymoeError, which ends with `remedy`, if a read fails or the file ends early.
        """
        done = 0
        while done < self.nbytes:
            try:
                piece = os.pread(self.fd, min(PIECE_BYTES, self.nbytes - done), self.start + done)
            except OSError as error:
                raise DymoeError(
                    f"{self.path}: read error at offset {self.start + done} ({error.strerror}); {remedy}"
                ) from error
            if not piece:
                raise DymoeError(f"{self.path}: ends at offset {self.start + done}; {remedy}")
            yield piece
            done += len(piece)

    def read(self, remedy: str) -> bytes:
        """Return all bytes; raise DymoeError as `pieces` does."""
        return b"".join(self.pieces(remedy))

    def sha256(self, remedy: str) -> str:
        """Return the SHA-256 of all bytes in hexadecimal; raise DymoeError as `pieces` does."""
        digest = hashlib.sha256()
        for piece in self.pieces(remedy):
            digest.update(piece)
        return digest.hexdigest()


class Storage(Protocol):
    """A place that has the files of a model by name."""

    path: Path

    def names(self) -> list[str]:
        """Return the names of all files, sorted."""

    def holds(self, name: str) -> bool:
        """Return whether there is something of this name."""

    def open(self, name: str, remedy: str, flags: int = 0) -> Member:
        """Open a file to read, with further `flags`; the caller closes it.

        Raises DymoeError, which ends with `remedy`, unless it is there and a regular file. Links are not followed.
        """


def open_storage(path: Path) -> Storage:
    """Return the storage at `path`: an archive if that is a file, else a directory, which need not exist.

    Raises DymoeError if the file is no archive of a packed bundle.
    """
    return Archive(path) if path.is_file() else Directory(path)


class Directory:
    """A directory whose files are those of a model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path))

    def holds(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def open(self, name: str, remedy: str, flags: int = 0) -> Member:
        path = self.path / name
        fd = open_regular(path, remedy, follow_links=False, flags=flags)
        return Member(fd, path, 0, os.fstat(fd).st_size)


class Archive:
    """A packed bundle. Opening it reads the index, and the header of each member."""

    def __init__(self, path: Path) -> None:
        """Read the index of the archive `path`; raise DymoeError if it is none, or compresses or hides something."""
        self.path = path
        with open(open_regular(path, "give a bundle"), "rb", buffering=0) as file:
            try:
                self._spans = dict(_spans(_Bounded(file)))
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeError) as error:
                raise DymoeError(
                    f"{path}: not a packed bundle ({error}); give one that dymoe-bundle pack made, or a directory"
                ) from error

    def names(self) -> list[str]:
        return sorted(self._spans)

    def holds(self, name: str) -> bool:
        return name in self._spans

    def open(self, name: str, remedy: str, flags: int = 0) -> Member:
        if name not in self._spans:
            raise DymoeError(f"{self.path}: has no {name}; {remedy}")
        return Member(open_regular(self.path, remedy, flags=flags), self.path, *self._spans[name])


class _Bounded(io.BufferedReader):
    """A file of which nobody reads much at once, so that a forged size of an index takes no memory."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file)
        self.size = os.fstat(file.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self.size - self.tell() if size is None or size < 0 else size
        if wanted > MAX_INDEX_BYTES:
            raise zipfile.BadZipFile("its index is too large")
        return super().read(size)


def _spans(file: _Bounded) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the name of each member of an archive, with the offset and the number of its bytes."""
    seen: set[str] = set()
    for info in zipfile.ZipFile(file).infolist():
        if not re.fullmatch(PLAIN_NAME, info.filename) or info.filename in seen:
            raise zipfile.BadZipFile(f"the name {info.filename[:60]!r} is there twice, or is not plain")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise zipfile.BadZipFile(f"{info.filename} is compressed or encrypted")
        seen.add(info.filename)
        file.seek(info.header_offset)
        header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or not header.startswith(HEADER_START):
            raise zipfile.BadZipFile(f"{info.filename} is not where its index says")
        start = info.header_offset + HEADER_BYTES + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        if start + info.file_size > file.size:
            raise zipfile.BadZipFile(f"{info.filename} goes beyond its end")
        yield info.filename, (start, info.file_size)


def read_member(path: Path, remedy: str) -> bytes | None:
    """Return the bytes of a small file of a model, or None if the model does not have the file.

    `path` is the name of the file below that of the model's directory or packed bundle. A bundle has only the files
    that its manifest lists, with the digests that are there; a file that somebody put beside them changes nothing.
    Raises DymoeError if the file cannot be read, is not a regular one, or is another.
    """
    storage = open_storage(path.parent)
    listed = _listed(storage)
    if (listed is not None and path.name not in listed) or not storage.holds(path.name):
        return None
    if listed is None:
        return read_regular(path, remedy, MAX_MEMBER_BYTES)
    data = read_bounded(storage, path.name, remedy, MAX_MEMBER_BYTES)
    if hashlib.sha256(data).hexdigest() != listed[path.name]:
        raise DymoeError(f"{path}: does not match the manifest; {remedy}")
    return data


def read_bounded(storage: Storage, name: str, remedy: str, most: int) -> bytes:
    """Return the bytes of a file that has at most `most`; raise DymoeError as `open` and `Member.read` do."""
    member = storage.open(name, remedy)
    try:
        if member.nbytes > most:
            raise DymoeError(
                f"{storage.path / name}: more than {most} bytes, which is too large for such a file; {remedy}"
            )
        return member.read(remedy)
    finally:
        member.close()


def _listed(storage: Storage) -> Mapping[str, str] | None:
    """Return the files of the bundle in `storage`, name -> SHA-256, or None if it does not hold a bundle."""
    archive = isinstance(storage, Archive)
    try:
        info = os.stat(storage.path if archive else storage.path / MANIFEST, follow_symlinks=archive)
        return _files_in(storage.path, (info.st_ino, info.st_size, info.st_mtime_ns))
    except OSError:
        return None


@lru_cache(maxsize=4)
def _files_in(path: Path, identity: tuple[int, ...]) -> Mapping[str, str] | None:
    """Return name -> SHA-256 of the files that a manifest lists; `identity` tells versions of it apart."""
    try:
        values = json.loads(read_bounded(open_storage(path), MANIFEST, "", MAX_JSON_BYTES))
        return {name: entry["sha256"] for name, entry in values["files"].items()} if "ladder" in values else None
    except (DymoeError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
