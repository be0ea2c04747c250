"""Reads records from a bundle, past the page cache where the file system allows it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dymoe_runtime.bundle import Bundle
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tensorfile import read_into
from dymoe_runtime.tiers import PAGE


class RecordReader:
    """Callable (key, first segment, buffers) that fills page-aligned buffers with consecutive segments.

    A segment is checked against its checksum when it is first read. Safe to call from several threads.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._spans = bundle.layout.segment_spans
        files = sorted({bundle.path / entry.file for entry in bundle.manifest.layers.values()})
        self.direct = all(_direct_works(path) for path in files[:1])
        flags = os.O_RDONLY | (os.O_DIRECT if self.direct else 0)
        self._files = {path: os.open(path, flags) for path in files}
        if not self.direct:
            for fd in self._files.values():
                _advise_random(fd)
        shape = (bundle.spec.num_layers, bundle.spec.num_experts, len(self._spans))
        self._checked = np.zeros(shape, bool)

    def __call__(self, key: ExpertKey, first: int, buffers: Sequence[torch.Tensor]) -> None:
        path, offset = self._bundle.record_span(key)
        views = [memoryview(buffer.numpy()) for buffer in buffers]
        read_into(self._files[path], path, offset + sum(self._spans[:first]), *views)
        for segment, view in enumerate(views, first):
            if not self._checked[key.layer, key.expert, segment]:
                self._bundle.check_segment(key, segment, view)
                self._checked[key.layer, key.expert, segment] = True

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def _direct_works(path: Path) -> bool:
    """Whether a real O_DIRECT transfer from `path` succeeds; some file systems refuse only then."""
    if not hasattr(os, "O_DIRECT"):
        return False
    page = mmap.mmap(-1, PAGE)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
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
