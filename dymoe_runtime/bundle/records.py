"""Reads of a bundle's weights, with their checksums checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dymoe_runtime.bundle.bundle import DAMAGED, DENSE, LOOK_AHEAD, Bundle, record_name
from dymoe_runtime.bundle.tensorfile import read_header, read_into
from dymoe_runtime.bundle.tiers import split_record
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey

try:  # same result as zlib's, four times as fast
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # isal has no build for every machine
    from zlib import crc32 as crc32


def read_record(bundle: Bundle, key: ExpertKey) -> list[np.ndarray]:
    """Return all segments of one expert, each uint8 [bytes], with their checksums checked.

    This is for tools; a run reads through the store. Raises DymoeError if the record cannot be read or is damaged.
    """
    path, offset = bundle.record_span(key)
    record = np.empty(bundle.layout.record_bytes, np.uint8)
    with open(path, "rb") as file:
        read_into(file.fileno(), path, offset, memoryview(record))
    segments = split_record(bundle.layout, record)
    for index, segment in enumerate(segments):
        check_segment(bundle, key, index, segment)
    return segments


def check_segment(bundle: Bundle, key: ExpertKey, segment: int, data: np.ndarray | memoryview) -> None:
    """Raise DymoeError unless `data` has the checksum that the manifest gives for this segment."""
    if crc32(data) != bundle.manifest.layers[key.layer].crc32[key.expert][segment]:
        tier = bundle.layout.ladder[segment]
        path, offset = bundle.record_span(key)
        raise DymoeError(
            f"{path}: expert {key}, tier {tier}: checksum mismatch in the record at offset {offset}; {DAMAGED}"
        )


def check_dense(path: Path, name: str, data: np.ndarray, checksum: int) -> None:
    """Raise DymoeError unless the bytes of dense tensor `name` have this checksum."""
    if crc32(memoryview(data)) != checksum:
        raise DymoeError(f"{path}: tensor {name}: checksum mismatch; {DAMAGED}")


def verify(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Yield (what was checked, problem) for each file index, dense tensor and expert record.

    The problem is "" if there is none.
    """
    for name in bundle.manifest.files:
        if name.endswith(".safetensors") and name != LOOK_AHEAD:
            yield name, _problem(partial(_verify_index, bundle, name))
    for name in bundle.manifest.dense_crc32:
        yield f"{DENSE}: {name}", _problem(partial(_verify_dense, bundle, name))
    for layer in bundle.manifest.layers:
        for expert in range(bundle.spec.num_experts):
            key = ExpertKey(layer, expert)
            yield f"expert {key}", _problem(partial(read_record, bundle, key))


def _verify_index(bundle: Bundle, name: str) -> None:
    path = bundle.path / name
    header = read_header(path)
    expected = set(bundle.manifest.dense_crc32)
    for layer, entry in bundle.manifest.layers.items():
        if entry.file == name:
            expected = {record_name(ExpertKey(layer, e)) for e in range(bundle.spec.num_experts)}
            for expert in range(bundle.spec.num_experts):
                key = ExpertKey(layer, expert)
                info = header.get(record_name(key))
                if info and (info.start, info.nbytes) != (bundle.record_span(key)[1], bundle.layout.record_bytes):
                    raise DymoeError(f"{path}: record of expert {key} is not where the manifest says; {DAMAGED}")
    if set(header) != expected:
        raise DymoeError(f"{path}: its index does not list the tensors of the manifest; {DAMAGED}")


def _verify_dense(bundle: Bundle, name: str) -> None:
    path = bundle.path / DENSE
    info = read_header(path).get(name)
    if info is None:
        raise DymoeError(f"{path}: tensor {name} is missing; {DAMAGED}")
    data = np.empty(info.nbytes, np.uint8)
    with open(path, "rb") as file:
        read_into(file.fileno(), path, info.start, memoryview(data))
    check_dense(path, name, data, bundle.manifest.dense_crc32[name])


def _problem(check: Callable[[], object]) -> str:
    try:
        check()
    except DymoeError as error:
        return str(error)
    return ""
