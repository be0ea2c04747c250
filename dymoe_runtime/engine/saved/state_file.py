"""The file of a saved state: a header, then the token ids, a note and each layer's state. docs/session-format.md."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dymoe_runtime.bundle.records import crc32
from dymoe_runtime.engine.saved.origin import OTHERWISE, Origin
from dymoe_runtime.errors import DymoeError, remedy_of
from dymoe_runtime.files import Bytes, Word, parse_json, replacing, strict
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import ModelSpec

MAGIC, VERSION = b"DyMoE-S\n", 1
# Magic, version, bytes of the header, and its SHA-256. A later version may change all but the first two.
START = struct.Struct("<8sII32s")
MAX_HEADER = 1 << 20
IDS = np.dtype("<i4")
NOTE = ("utf-8", "surrogatepass")  # what a terminal gives may not be Unicode
DAMAGED = "the saved session is damaged"
REMEDY = f"bring it back from a copy, {OTHERWISE}"


@dataclass(frozen=True)
class Section:
    """One of the pieces of data that follow the header without a gap."""

    nbytes: Bytes
    crc32: Word


@dataclass(frozen=True)
class Header:
    """The content of the header."""

    origin: Origin
    ids: Section
    note: Section
    layers: tuple[Section, ...]

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.ids.nbytes // IDS.itemsize

    @property
    def nbytes(self) -> int:
        """Return the bytes of all sections."""
        return sum(section.nbytes for section in (self.ids, self.note, *self.layers))

    def to_bytes(self) -> bytes:
        """Return JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> Header:
        """Read the result of `to_bytes`; raise DymoeError that names `where` if it is malformed."""
        what = f"{where}: {DAMAGED}"
        header = strict(Header, parse_json(data, what, REMEDY), what, REMEDY)
        if not header.origin.is_valid():
            raise DymoeError(f"{what} (its header is malformed); {REMEDY}")
        return header


def save(path: Path, origin: Origin, ids: Sequence[int], note: str, state: SequenceState) -> None:
    """Write a state with its token ids and a note, and replace what is at `path` once all of it is on the disk.

    Raises DymoeError if it cannot be written.
    """
    layers = [layer.used(state.length) for layer in state.layers]
    heads = [[np.asarray(ids, IDS).view(np.uint8)], [np.frombuffer(note.encode(*NOTE), np.uint8)]]
    of_ids, of_note, *of_layers = map(_section, [*heads, *layers])
    header = Header(origin, of_ids, of_note, tuple(of_layers)).to_bytes()
    start = START.pack(MAGIC, VERSION, len(header), hashlib.sha256(header).digest())
    try:
        with replacing(path, private=True) as file:
            file.write(start + header)
            for piece in (piece for pieces in (*heads, *layers) for piece in pieces):
                file.write(memoryview(_flat(piece)))
    except OSError as error:
        raise DymoeError(
            f"{path}: the session cannot be saved there ({error.strerror}); "
            f"{remedy_of(error, 'choose another place')}, or give another file"
        ) from error


def load(path: Path, origin: Origin, spec: ModelSpec, state: SequenceState) -> tuple[list[int], str]:
    """Read a state in place of the one in `state`; return the token ids and the note.

    Raises DymoeError if the file is no saved state, is damaged, or a run like `origin` cannot continue it. `state` is
    then as before, or empty if the data of a layer is damaged.
    """
    try:
        with _opened(path) as file:
            header = _read_header(file, path)
            origin.check_continues(header.origin, header.tokens, spec, str(path))
            ids, note = _read_tokens(file, header, spec, path)
            layers = [layer.used(header.tokens) for layer in state.layers]
            _check_sizes(layers, header, path)
            with state.replaced(header.tokens):
                for number, (pieces, section) in enumerate(zip(layers, header.layers, strict=True)):
                    _fill(file, pieces, section, f"{path}: {DAMAGED} (layer {number})")
            return ids, note
    except OSError as error:
        raise DymoeError(f"{path}: the session cannot be read ({error.strerror}); {REMEDY}") from error


def read_tokens(path: Path, origin: Origin, spec: ModelSpec) -> tuple[list[int], str]:
    """Return the token ids and the note of a saved state, without the states of the layers.

    Raises DymoeError as `load` does.
    """
    try:
        with _opened(path) as file:
            header = _read_header(file, path)
            origin.check_continues(header.origin, header.tokens, spec, str(path))
            return _read_tokens(file, header, spec, path)
    except OSError as error:
        raise DymoeError(f"{path}: the session cannot be read ({error.strerror}); {REMEDY}") from error


def saved_context(path: Path) -> int:
    """Return the context, in tokens, of the run that saved a state; raise DymoeError if the file is no saved state."""
    try:
        with _opened(path) as file:
            return _read_header(file, path).origin.context
    except OSError as error:
        raise DymoeError(f"{path}: the session cannot be read ({error.strerror}); {REMEDY}") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file to read it; raise DymoeError if there is none."""
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise DymoeError(f"{path}: {what}; give a session that was saved")
    return open(path, "rb", buffering=0)


def _read_header(file: BinaryIO, path: Path) -> Header:
    """Return the header; raise DymoeError if there is none, or the file is not as long as it says."""
    length = os.fstat(file.fileno()).st_size
    start = file.read(START.size)
    if start[: len(MAGIC)] != MAGIC:
        raise DymoeError(f"{path}: not a saved session; give a file that a session was saved in")
    cut = DymoeError(f"{path}: {DAMAGED} (its end is missing); {REMEDY}")
    if len(start) < START.size:
        raise cut
    _, version, nbytes, digest = START.unpack(start)
    if version != VERSION:
        raise DymoeError(f"{path}: version {version}, this runtime reads {VERSION}; upgrade dymoe, {OTHERWISE}")
    if nbytes > min(MAX_HEADER, length - START.size):
        raise cut
    data = file.read(nbytes)
    if hashlib.sha256(data).digest() != digest:
        raise DymoeError(f"{path}: {DAMAGED} (its header); {REMEDY}")
    header = Header.from_bytes(data, str(path))
    if length < START.size + nbytes + header.nbytes:
        raise cut
    if length != START.size + nbytes + header.nbytes:
        raise DymoeError(f"{path}: {DAMAGED} (something follows its end); {REMEDY}")
    return header


def _read_tokens(file: BinaryIO, header: Header, spec: ModelSpec, path: Path) -> tuple[list[int], str]:
    """Return the token ids and the note, which follow the header; raise DymoeError if they are damaged."""
    ids = np.empty(header.tokens, IDS)
    note = np.empty(header.note.nbytes, np.uint8)
    _fill(file, [ids], header.ids, f"{path}: {DAMAGED} (its tokens)")
    _fill(file, [note], header.note, f"{path}: {DAMAGED} (its note)")
    if (ids < 0).any() or (ids >= spec.vocab_size).any():
        raise DymoeError(f"{path}: {DAMAGED} (it has tokens that the model does not know); {REMEDY}")
    try:
        return ids.tolist(), note.tobytes().decode(*NOTE)
    except UnicodeDecodeError as error:
        raise DymoeError(f"{path}: {DAMAGED} (its note is no text); {REMEDY}") from error


def _check_sizes(layers: Sequence[Sequence[np.ndarray]], header: Header, path: Path) -> None:
    """Raise DymoeError if the states of the layers do not have the sizes that the header says."""
    sizes = [sum(piece.nbytes for piece in pieces) for pieces in layers]
    saved = [section.nbytes for section in header.layers]
    if saved == sizes and header.ids.nbytes == header.tokens * IDS.itemsize:
        return
    layer = next((n for n, (a, b) in enumerate(zip(saved, sizes, strict=False)) if a != b), min(len(saved), len(sizes)))
    raise DymoeError(
        f"{path}: the session keeps layer {layer} in another shape than this version of dymoe; "
        f"use the version that saved it, {OTHERWISE}"
    )


def _fill(file: BinaryIO, pieces: Sequence[np.ndarray], section: Section, what: str) -> None:
    """Read a section into arrays; raise DymoeError that begins with `what` if it ends early or its checksum differs."""
    checksum = 0
    for piece in pieces:
        left = flat = memoryview(_flat(piece))
        while left:
            count = file.readinto(left)  # type: ignore[attr-defined]
            if not count:
                raise DymoeError(f"{what}; {REMEDY}")
            left = left[count:]
        checksum = crc32(flat, checksum)
    if checksum != section.crc32:
        raise DymoeError(f"{what}; {REMEDY}")


def _section(pieces: Sequence[np.ndarray]) -> Section:
    checksum = 0
    for piece in pieces:
        checksum = crc32(memoryview(_flat(piece)), checksum)
    return Section(sum(piece.nbytes for piece in pieces), checksum)


def _flat(piece: np.ndarray) -> np.ndarray:
    """Return a contiguous array as bytes, uint8 [n], without a copy."""
    assert piece.flags.c_contiguous
    return piece.reshape(-1).view(np.uint8)
