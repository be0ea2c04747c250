"""Reading of expert records from a bundle, with O_DIRECT if the file system allows it."""

from __future__ import annotations

import itertools
import mmap
import os
from functools import partial

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.records import damaged_segment
from dymoe_runtime.bundle.tiers import PAGE
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.request import Source


class RecordReader:
    """A `Reader` for page-aligned memory. Every read verifies the checksums of its segments."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._record_bytes = bundle.layout.record_bytes
        self._offsets = (0, *itertools.accumulate(bundle.layout.segment_spans))
        layers = bundle.manifest.layers
        names = sorted({entry.file for entry in layers.values()})
        self.direct = all(_direct_works(bundle, name) for name in names[:1])
        self._files: dict[str, int] = {}
        try:
            for name in names:
                self._files[name] = bundle.open_file(name, os.O_DIRECT if self.direct else 0)
        except BaseException:
            self.close()
            raise
        if not self.direct:
            for fd in self._files.values():
                _advise_random(fd)
        self._layers = {
            layer: (self._files[entry.file], bundle.path / entry.file, entry.data_start, entry.crc32)
            for layer, entry in layers.items()
        }

    def __call__(self, key: ExpertKey, first: int, segments: int) -> Source:
        fd, path, start, checksums = self._layers[key.layer]
        offset = start + key.expert * self._record_bytes + self._offsets[first]
        wanted = checksums[key.expert][first : first + segments]
        return Source(fd, path, offset, None, wanted, partial(self._damaged, key, first))

    def _damaged(self, key: ExpertKey, first: int, place: int) -> DymoeError:
        return damaged_segment(self._bundle, key, first + place)

    def forget(self) -> None:
        """Drop the files from the page cache, if reads go through it and the system allows this."""
        if not self.direct and hasattr(os, "posix_fadvise"):
            for fd in self._files.values():
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _direct_works(bundle: Bundle, name: str) -> bool:
    """Return whether an O_DIRECT read from a file succeeds; some file systems allow the open but not the read."""
    if not hasattr(os, "O_DIRECT"):
        return False
    page = mmap.mmap(-1, PAGE)
    try:
        fd = bundle.open_file(name, os.O_DIRECT)
    except DymoeError:
        return False
    try:
        return os.preadv(fd, [page], PAGE) > 0
    except OSError:
        return False
    finally:
        os.close(fd)


def _advise_random(fd: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
