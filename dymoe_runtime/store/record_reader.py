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
from dymoe_runtime.storage import Member
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
        self._files: dict[str, Member] = {}
        try:
            for name in names:
                self._files[name] = bundle.open_file(name, os.O_DIRECT if self.direct else 0)
        except BaseException:
            self.close()
            raise
        if not self.direct:
            for file in self._files.values():
                _advise_random(file.fd)
        self._layers = {
            layer: (self._files[entry.file], entry.data_start, entry.crc32) for layer, entry in layers.items()
        }

    def __call__(self, key: ExpertKey, first: int, segments: int) -> Source:
        file, start, checksums = self._layers[key.layer]
        offset = file.start + start + key.expert * self._record_bytes + self._offsets[first]
        wanted = checksums[key.expert][first : first + segments]
        return Source(file.fd, file.path, offset, None, wanted, partial(self._damaged, key, first))

    def _damaged(self, key: ExpertKey, first: int, place: int) -> DymoeError:
        return damaged_segment(self._bundle, key, first + place)

    def forget(self) -> None:
        """Drop the files from the page cache, if reads go through it and the system allows this."""
        if not self.direct and hasattr(os, "posix_fadvise"):
            for file in self._files.values():
                os.posix_fadvise(file.fd, file.start, file.nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _direct_works(bundle: Bundle, name: str) -> bool:
    """Return whether an O_DIRECT read from a file succeeds; some file systems allow the open but not the read."""
    if not hasattr(os, "O_DIRECT"):
        return False
    page = mmap.mmap(-1, PAGE)
    try:
        file = bundle.open_file(name, os.O_DIRECT)
    except DymoeError:
        return False
    try:
        return os.preadv(file.fd, [page], file.start + PAGE) > 0
    except OSError:
        return False
    finally:
        file.close()


def _advise_random(fd: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
