"""A bundle as one file that runs in place, and back as a directory."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from dymoe_runtime.bundle.bundle import DAMAGED, Bundle
from dymoe_runtime.bundle.tiers import PAGE
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.storage import HEADER_BYTES, MANIFEST
from dymoe_runtime.tools.output import new_directory, new_file

# The extra field of a member's header that only fills it, so that the data are aligned; that of Android's zipalign.
ALIGNMENT_FIELD, FIELD_HEAD = 0xD935, 6
# What zipfile adds to the header of a member that may be large.
ZIP64_FIELD_BYTES = 20
# The earliest date that an archive can have, so that the same bundle gives the same bytes.
DATE = (1980, 1, 1, 0, 0, 0)


def pack(bundle: Bundle, target: Path, advance: Callable[[int], object]) -> None:
    """Write a bundle as the file `target`, with the manifest first; `advance` is called with the bytes written.

    Raises DymoeError if a file of the bundle does not have the digest that the manifest says, or if something is at
    `target`.
    """
    with new_file(target) as file, zipfile.ZipFile(file, "w") as archive:
        for name in members_of(bundle):
            _add(archive, file, name, pieces_of(bundle, name), advance)


def unpack(bundle: Bundle, target: Path, advance: Callable[[int], object]) -> None:
    """Write the files of a bundle to the new directory `target`; `advance` is called with the bytes written.

    Raises DymoeError as `pack` does.
    """
    with new_directory(target) as directory:
        for name in members_of(bundle):
            with open(directory / name, "xb") as file:
                for piece in pieces_of(bundle, name):
                    file.write(piece)
                    advance(len(piece))
                file.flush()
                os.fsync(file.fileno())


def members_of(bundle: Bundle) -> list[str]:
    """Return the names of a bundle's files, the manifest first and weights last."""
    manifest = bundle.manifest
    return [MANIFEST, *sorted(manifest.files, key=lambda name: (manifest.is_weights(name), name))]


def pieces_of(bundle: Bundle, name: str) -> Iterator[bytes]:
    """Yield the bytes of a file; raise DymoeError at the end if they do not have the digest that the manifest says."""
    digest = hashlib.sha256()
    member = bundle.storage.open(name, DAMAGED) if name == MANIFEST else bundle.open_file(name)
    with closing(member):
        for piece in member.pieces(DAMAGED):
            digest.update(piece)
            yield piece
    expected = "" if name == MANIFEST else bundle.manifest.files[name].sha256
    if expected not in ("", digest.hexdigest()):
        raise DymoeError(f"{bundle.path / name}: does not match the manifest; {DAMAGED}")


def _add(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, pieces: Iterator[bytes], advance: Callable[[int], object]
) -> None:
    """Add a member whose data start at a multiple of a page."""
    info = zipfile.ZipInfo(name, DATE)
    info.external_attr = 0o644 << 16
    unpadded = file.tell() + HEADER_BYTES + len(name) + FIELD_HEAD + ZIP64_FIELD_BYTES
    info.extra = struct.pack("<HHH", ALIGNMENT_FIELD, 2 + -unpadded % PAGE, PAGE) + bytes(-unpadded % PAGE)
    with archive.open(info, "w", force_zip64=True) as member:
        for piece in pieces:
            member.write(piece)
            advance(len(piece))
    info.extra = b""  # the index does not need it
