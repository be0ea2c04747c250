"""The writer of bundles: it builds a bundle next to its final place, and renames it there when it is complete.

Work in progress is in `.NAME.partial`: `bundle/` has the final files, `state/` has the results from which a later run
continues. Files appear by rename, so a run that is killed leaves complete layers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dymoe_runtime.bundle.bundle import DENSE, LayerEntry, Manifest, Stored, layer_file
from dymoe_runtime.bundle.contents import dense_header, layer_header, stored_bytes
from dymoe_runtime.bundle.tensorfile import header_bytes, header_of, read_header, read_into
from dymoe_runtime.bundle.tiers import RecordLayout, split_record
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import naming, open_regular
from dymoe_runtime.place import (
    exchange,
    holds_only_a_bundle,
    is_own_directory,
    remove_bundle,
    remove_own,
    rename_new,
)
from dymoe_runtime.storage import MANIFEST
from dymoe_runtime.units import format_size

IDENTITY, LOCK, TEMPORARY = "identity.json", "lock", ".tmp"
AGAIN = "run the same command again, which goes on"
# Types of the tensors that are kept for a later run.
KEPT_TYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "I64": torch.int64}


class BundleWriter:
    """Builds the bundle `path`. `identity` describes the inputs of the compilation.

    Work in progress of another identity is discarded. Raises DymoeError if another process is writing the bundle.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None, fresh: bool = False) -> None:
        self.path = path
        self._partial = path.parent / f".{path.name}.partial"
        self.directory = self._partial / "bundle"
        self._state = self._partial / "state"
        self._replaced = self._partial / "replaced"
        self._lock = self._take_lock()
        self._recover()
        if fresh or self._read_identity() != identity or not (self.directory.is_dir() and self._state.is_dir()):
            self._start_over(identity)

    def close(self) -> None:
        """Release the lock on the work in progress."""
        os.close(self._lock)

    @classmethod
    def clear(cls, path: Path) -> None:
        """Delete what a run has left that was killed when it had put the bundle `path` in place, unless one is busy."""
        partial = path.parent / f".{path.name}.partial"
        over = not os.path.lexists(partial / "bundle") or os.path.lexists(partial / "bundle" / MANIFEST)
        if os.path.lexists(partial) and (over or os.path.lexists(partial / "replaced")):
            with contextlib.suppress(DymoeError), contextlib.closing(cls(path, None)) as writer:
                writer._remove_work()

    def load_state(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the tensors and values saved under `name`, or None if they are missing or damaged."""
        try:
            values = json.loads((self._state / f"{name}.json").read_text())
            return _read_tensors(self._state / f"{name}.safetensors"), values
        except (OSError, ValueError, KeyError, DymoeError):
            return None

    def save_state(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Save tensors and values for a later run; they are flushed to the disk on return."""
        _write_tensors(self._state / f"{name}.safetensors", tensors)
        _replace(self._state / f"{name}.json", json.dumps(values).encode())

    def drop_state(self, name: str) -> None:
        """Delete the tensors and values saved under `name`, if any."""
        for suffix in ("json", "safetensors"):
            (self._state / f"{name}.{suffix}").unlink(missing_ok=True)

    def scratch(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a float32 array in an unnamed file, which is freed with the array."""
        nbytes = 4 * int(np.prod(shape))
        with naming(self._state), tempfile.TemporaryFile(dir=self._state, suffix=TEMPORARY) as file:
            if hasattr(os, "posix_fallocate"):
                # Writing to a mapped file on a full disk would kill the process; this raises OSError in time.
                os.posix_fallocate(file.fileno(), 0, nbytes)
            return np.asarray(np.memmap(file, np.float32, "r+", shape=shape))

    def write_layer(
        self, index: int, layer: int, layout: RecordLayout, records: Iterable[np.ndarray], count: int
    ) -> LayerEntry:
        """Write `count` records, experts in order, as one safetensors file with page-aligned data; return its entry."""
        header = layer_header(layer, layout, count)
        path = self.directory / layer_file(index)
        checksums = []
        with _becoming(path) as file:
            file.write(header)
            for record in records:
                file.write(memoryview(record))
                checksums.append(tuple(zlib.crc32(segment) for segment in split_record(layout, record)))
        return LayerEntry(path.name, len(header), tuple(checksums))

    def write_dense(self, shapes: Mapping[str, Stored], tensors: Iterable[np.ndarray]) -> dict[str, int]:
        """Write dense.safetensors from the bytes of tensors, in the order of `shapes`: name -> (dtype, shape).

        Returns the checksum of each tensor.
        """
        checksums = {}
        with _becoming(self.directory / DENSE) as file:
            file.write(dense_header(shapes))
            for (name, stored), tensor in zip(shapes.items(), tensors, strict=True):
                assert tensor.nbytes == stored_bytes(stored), name
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
        """Write the manifest and move the complete bundle to its place; then delete the bundle that was there.

        Raises DymoeError, with all work kept, if anything else than a bundle is there by now.
        """
        self.write_small(MANIFEST, manifest.to_text().encode())
        remove = set(os.listdir(self.directory)) - {MANIFEST, *manifest.files}
        for name in remove:
            if name.endswith(TEMPORARY):
                os.unlink(self.directory / name)
            else:
                raise DymoeError(f"{self.directory / name}: no file of the bundle; move it away, then {AGAIN}")
        _flush(self.directory)
        try:
            if os.path.lexists(self.path):
                self._replace_bundle()
            else:
                rename_new(self.directory, self.path)
        except FileExistsError as error:
            raise self._in_the_way() from error
        _flush(self.path.parent)
        self._check_replaced()
        self._remove_work()

    def _replace_bundle(self) -> None:
        if not holds_only_a_bundle(self.path):
            raise self._in_the_way()
        self._check_replaced()
        before = exchange(self.directory, self.path, self._replaced)
        if not holds_only_a_bundle(before):  # something came between the look and the exchange
            ours = exchange(before, self.path, self._partial / "aside")
            if ours != self.directory:
                os.rename(ours, self.directory)
            raise self._in_the_way()
        if before != self._replaced:
            os.rename(before, self._replaced)

    def _in_the_way(self) -> DymoeError:
        return DymoeError(
            f"{self.path}: something that is not a bundle, or holds other files, is there by now; "
            f"move it away, then {AGAIN}"
        )

    def _check_replaced(self) -> None:
        """Delete the bundle that was replaced, if any; raise DymoeError if other files are with it, which stay."""
        if os.path.lexists(self._replaced) and not remove_bundle(self._replaced):
            raise DymoeError(
                f"{self._replaced}: holds other files than the bundle that it was; move them away, then {AGAIN}"
            )

    def _remove_work(self) -> None:
        """Delete the work in progress, but no file of others."""
        self._remove_progress()
        remove_own(self._partial, lambda name: name.startswith(IDENTITY) or name == LOCK)

    def _remove_progress(self) -> None:
        remove_own(self._state, lambda name: name.endswith((".json", ".safetensors", TEMPORARY)))
        remove_own(self.directory, lambda name: name.endswith((".json", ".safetensors", ".html", ".jinja", TEMPORARY)))

    def _recover(self) -> None:
        """Put the previous bundle back if a run was killed while `finish` had moved it away; else delete it."""
        if not os.path.lexists(self._replaced):
            return
        if os.path.lexists(self.path):
            self._check_replaced()
        else:
            rename_new(self._replaced, self.path)

    def _take_lock(self) -> int:
        """Return the descriptor of the lock on the work in progress, which is in a directory for this user alone."""
        busy = f"{self.path}: another dymoe-compile is writing it; wait for it or stop it"
        while True:
            with contextlib.suppress(FileExistsError):
                os.makedirs(self._partial.parent, exist_ok=True)
                os.mkdir(self._partial, 0o700)
            if not is_own_directory(self._partial):
                raise DymoeError(
                    f"{self._partial}: not a directory of yours; remove it, or choose another place with -o"
                )
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            lock = os.open(self._partial / LOCK, flags, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A compiler that ends removes its lock, which one that waited for it must not take for its own.
                if os.path.samestat(os.fstat(lock), os.stat(self._partial / LOCK)):
                    return lock
                os.close(lock)
            except FileNotFoundError:
                os.close(lock)
            except OSError as error:
                os.close(lock)
                raise DymoeError(busy) from error

    def _read_identity(self) -> Any:
        try:
            return json.loads((self._partial / IDENTITY).read_text())
        except (OSError, ValueError):
            return None

    def _start_over(self, identity: Mapping[str, Any] | None) -> None:
        self._remove_progress()
        for directory in (self.directory, self._state):
            directory.mkdir(exist_ok=True)
        _replace(self._partial / IDENTITY, json.dumps(identity).encode())


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
    temporary = path.with_name(path.name + TEMPORARY)
    with naming(path):
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # never through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)


def _replace(path: Path, data: bytes) -> None:
    with _becoming(path) as file:
        file.write(data)


def _flush(path: Path) -> None:
    with naming(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as a safetensors file."""
    names = {dtype: name for name, dtype in KEPT_TYPES.items()}
    sizes = {key: (names[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for key, t in tensors.items()}
    with _becoming(path) as file:
        file.write(header_bytes(sizes))
        for tensor in tensors.values():
            file.write(_bytes_of(tensor.contiguous()))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,))  # a single element may have any stride
    return memoryview(flat.view(torch.uint8).numpy())


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the result of `_write_tensors`, by explicit reads: a mapped file on a bad disk would kill the process.

    Raises DymoeError if it is damaged.
    """
    fd = open_regular(path, AGAIN, follow_links=False)
    tensors = {}
    try:
        for name, info in header_of(fd, path, os.fstat(fd).st_size).items():
            tensors[name] = torch.empty(info.shape, dtype=KEPT_TYPES[info.dtype])
            read_into(fd, path, info.start, _bytes_of(tensors[name]))
    finally:
        os.close(fd)
    return tensors
