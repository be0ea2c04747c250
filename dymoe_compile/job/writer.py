"""The writer of bundles: it builds a bundle next to its final place, and renames it there when it is complete.

Work in progress is in `.NAME.partial`: `bundle/` has the final files, `state/` has the results from which a later run
continues. Files appear by rename, so a run that is killed leaves complete layers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dymoe_runtime.bundle.bundle import DENSE, MANIFEST, LayerEntry, Manifest, layer_file, record_name
from dymoe_runtime.bundle.tensorfile import ITEM_BYTES, header_bytes, read_header
from dymoe_runtime.bundle.tiers import PAGE, RecordLayout, split_record
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.units import format_size


class BundleWriter:
    """Builds the bundle `path`. `identity` describes the inputs of the compilation.

    Work in progress of another identity is discarded. Raises DymoeError if another process is writing the bundle.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self._partial = path.parent / f".{path.name}.partial"
        self.directory = self._partial / "bundle"
        self._state = self._partial / "state"
        self._lock = self._take_lock()
        self._recover()
        if fresh or self._read_identity() != identity:
            self._start_over(identity)

    def close(self) -> None:
        """Release the lock on the work in progress."""
        os.close(self._lock)

    def load_state(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the tensors and values saved under `name`, or None if they are missing or damaged."""
        try:
            values = json.loads((self._state / f"{name}.json").read_text())
            return load_file(self._state / f"{name}.safetensors"), values
        except (OSError, ValueError, SafetensorError):
            return None

    def save_state(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Save tensors and values for a later run; they are flushed to the disk on return."""
        path = self._state / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        _flush(path)
        _replace(self._state / f"{name}.json", json.dumps(values).encode())

    def drop_state(self, name: str) -> None:
        """Delete the tensors and values saved under `name`, if any."""
        for suffix in ("json", "safetensors"):
            (self._state / f"{name}.{suffix}").unlink(missing_ok=True)

    def scratch(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a float32 array in an unnamed file, which is freed with the array."""
        nbytes = 4 * int(np.prod(shape))
        with tempfile.TemporaryFile(dir=self._state) as file:
            if hasattr(os, "posix_fallocate"):
                # Writing to a mapped file on a full disk would kill the process; this raises OSError in time.
                os.posix_fallocate(file.fileno(), 0, nbytes)
            return np.asarray(np.memmap(file, np.float32, "r+", shape=shape))

    def write_layer(
        self, index: int, layer: int, layout: RecordLayout, records: Iterable[np.ndarray], count: int
    ) -> LayerEntry:
        """Write `count` records, experts in order, as one safetensors file with page-aligned data; return its entry."""
        names = {
            record_name(ExpertKey(layer, e)): ("U8", (layout.record_bytes,), layout.record_bytes) for e in range(count)
        }
        header = header_bytes(names, PAGE)
        path = self.directory / layer_file(index)
        checksums = []
        with _becoming(path) as file:
            file.write(header)
            for record in records:
                file.write(memoryview(record))
                checksums.append(tuple(zlib.crc32(segment) for segment in split_record(layout, record)))
        return LayerEntry(path.name, len(header), tuple(checksums))

    def write_dense(
        self, shapes: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[np.ndarray]
    ) -> dict[str, int]:
        """Write dense.safetensors from the bytes of tensors, in the order of `shapes`: name -> (dtype, shape).

        Returns the checksum of each tensor.
        """
        sizes = {name: (dtype, shape, ITEM_BYTES[dtype] * math.prod(shape)) for name, (dtype, shape) in shapes.items()}
        checksums = {}
        with _becoming(self.directory / DENSE) as file:
            file.write(header_bytes(sizes))
            for name, tensor in zip(shapes, tensors, strict=True):
                assert tensor.nbytes == sizes[name][2], name
                data = memoryview(tensor)
                file.write(data)
                checksums[name] = zlib.crc32(data)
        return checksums

    def layer_is_whole(self, entry: LayerEntry, layout: RecordLayout) -> bool:
        """Return whether the records that an earlier run wrote are still intact."""
        try:
            with open(self.directory / entry.file, "rb") as file:
                file.seek(entry.data_start)
                for checksums in entry.crc32:
                    record = np.frombuffer(file.read(layout.record_bytes), np.uint8)
                    if checksums != tuple(zlib.crc32(segment) for segment in split_record(layout, record)):
                        return False
        except OSError:
            return False
        return True

    def dense_is_whole(self, checksums: Mapping[str, int]) -> bool:
        """Return whether the dense.safetensors that an earlier run wrote is still intact."""
        path = self.directory / DENSE
        try:
            header = read_header(path)
            with open(path, "rb") as file:
                for name, info in header.items():
                    file.seek(info.start)
                    if zlib.crc32(file.read(info.nbytes)) != checksums[name]:
                        return False
        except (OSError, KeyError, DymoeError):
            return False
        return set(header) == set(checksums)

    def used_bytes(self) -> int:
        """Return the bytes that the work in progress takes on the disk."""
        return sum(path.stat().st_size for path in self._partial.rglob("*") if path.is_file())

    def write_small(self, name: str, data: bytes) -> None:
        """Write a small file of the bundle."""
        _replace(self.directory / name, data)

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and move the complete bundle to its place; then delete the previous bundle."""
        self.write_small(MANIFEST, manifest.to_text().encode())
        _flush(self.directory)
        if self.path.exists():
            os.rename(self.path, self._old())
        os.rename(self.directory, self.path)
        _flush(self.path.parent)
        shutil.rmtree(self._old(), ignore_errors=True)
        shutil.rmtree(self._partial)

    def _old(self) -> Path:
        return self.path.parent / f".{self.path.name}.old"

    def _recover(self) -> None:
        """Put the previous bundle back if a run was killed between the renames of `finish`; delete it otherwise."""
        if self._old().exists() and not self.path.exists():
            os.rename(self._old(), self.path)
        shutil.rmtree(self._old(), ignore_errors=True)

    def _take_lock(self) -> int:
        self._partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._partial / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise DymoeError(f"{self.path}: another dymoe-compile is writing it; wait for it or stop it") from error
        return lock

    def _read_identity(self) -> Any:
        try:
            return json.loads((self._partial / "identity.json").read_text())
        except (OSError, ValueError):
            return None

    def _start_over(self, identity: Mapping[str, Any]) -> None:
        for directory in (self.directory, self._state):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        _replace(self._partial / "identity.json", json.dumps(identity).encode())


@contextlib.contextmanager
def explaining_full_disk(path: Path, needed: int) -> Iterator[None]:
    """Turn the error of a full disk into a DymoeError that says how much space is needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DymoeError(
            f"{path}: the disk is full; the bundle needs about {format_size(needed)}: "
            "free space or choose another place with -o, then run the same command to go on"
        ) from error


def check_space(path: Path, needed: int) -> None:
    """Raise DymoeError if the disk of `path` has less than `needed` bytes free."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise DymoeError(
            f"{path}: the disk is full; the bundle needs about {format_size(needed)}, {format_size(free)} are free: "
            "free space or choose another place with -o"
        )


@contextlib.contextmanager
def _becoming(path: Path) -> Iterator[Any]:
    """Yield a file that gets the name `path` once it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def _replace(path: Path, data: bytes) -> None:
    with _becoming(path) as file:
        file.write(data)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
