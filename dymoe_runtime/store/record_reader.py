"""Reading of expert records from a bundle, with O_DIRECT if the file system allows it."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Sequence
from functools import partial

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.records import check_segment
from dymoe_runtime.bundle.tiers import PAGE
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.request import Source


class RecordReader:
    """A `Reader` for page-aligned memory. The first read of a segment verifies its checksum."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._record_bytes = bundle.layout.record_bytes
        self._offsets = (0, *itertools.accumulate(bundle.layout.segment_spans))
        names = sorted({entry.file for entry in bundle.manifest.layers.values()})
        self.direct = all(_direct_works(bundle, name) for name in names[:1])
        flags = os.O_DIRECT if self.direct else 0
        self._files = {name: bundle.open_file(name, flags) for name in names}
        if not self.direct:
            for fd in self._files.values():
                _advise_random(fd)
        self._layers = {
            layer: (self._files[entry.file], bundle.path / entry.file, entry.data_start)
            for layer, entry in bundle.manifest.layers.items()
        }
        # [layers][experts], one bit for each segment.
        self._checked = [[0] * bundle.spec.num_experts for _ in range(bundle.spec.num_layers)]

    def __call__(self, key: ExpertKey, first: int, segments: int) -> Source:
        fd, path, start = self._layers[key.layer]
        offset = start + key.expert * self._record_bytes + self._offsets[first]
        wanted = (1 << first + segments) - (1 << first)
        checked = self._checked[key.layer][key.expert] & wanted == wanted
        return Source(fd, path, offset, None if checked else partial(self._check, key, first))

    def _check(self, key: ExpertKey, first: int, buffers: Sequence[np.ndarray]) -> None:
        for segment, buffer in enumerate(buffers, first):
            if not self._checked[key.layer][key.expert] >> segment & 1:
                check_segment(self._bundle, key, segment, memoryview(buffer))
                self._checked[key.layer][key.expert] |= 1 << segment

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
