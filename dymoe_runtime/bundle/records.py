"""Reads of a bundle's weights, with their checksums checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from dymoe_runtime.bundle.bundle import (
    DAMAGED,
    DENSE,
    LOOK_AHEAD,
    Bundle,
    Manifest,
    record_name,
    stored_as,
)
from dymoe_runtime.bundle.tensorfile import TensorInfo, header_in, header_of, read_into
from dymoe_runtime.bundle.tiers import split_record
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey

try:  # same result as zlib's, four times as fast
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # isal has no build for every machine
    from zlib import crc32 as crc32

NOT_VOUCHED = (
    "its digest does not vouch for its weights, which have checksums against decay alone, because it was compiled "
    "before version 5 of the format; compile it again"
)


def read_record(bundle: Bundle, key: ExpertKey) -> list[np.ndarray]:
    """Return all segments of one expert, each uint8 [bytes], with their checksums checked.

    This is for tools; a run reads through the store. Raises DymoeError if the record cannot be read or is damaged.
    """
    name, offset = bundle.record_span(key)
    record = np.empty(bundle.layout.record_bytes, np.uint8)
    with closing(bundle.open_file(name)) as file:
        read_into(file.fd, file.path, file.start + offset, memoryview(record))
    segments = split_record(bundle.layout, record)
    for index, segment in enumerate(segments):
        check_segment(bundle, key, index, segment)
    return segments


def check_segment(bundle: Bundle, key: ExpertKey, segment: int, data: np.ndarray | memoryview) -> None:
    """Raise DymoeError unless `data` has the checksum that the manifest gives for this segment."""
    if crc32(data) != bundle.manifest.layers[key.layer].crc32[key.expert][segment]:
        raise damaged_segment(bundle, key, segment)


def damaged_segment(bundle: Bundle, key: ExpertKey, segment: int) -> DymoeError:
    """Return the error for a segment that does not have its checksum."""
    name, offset = bundle.record_span(key)
    return DymoeError(
        f"{bundle.path / name}: expert {key}, tier {bundle.layout.ladder[segment]}: checksum mismatch in the record "
        f"at offset {offset}; {DAMAGED}"
    )


def check_dense(path: Path, name: str, data: np.ndarray, checksum: int) -> None:
    """Raise DymoeError unless the bytes of dense tensor `name` have this checksum."""
    if crc32(memoryview(data)) != checksum:
        raise DymoeError(f"{path}: tensor {name}: checksum mismatch; {DAMAGED}")


def read_predictors(bundle: Bundle) -> dict[int, np.ndarray]:
    """Return layer -> predictor, float32 [experts, H + 1], of the layers that have one.

    Raises DymoeError if the file is damaged or malformed, or does not fit the model.
    """
    path, data = bundle.path / LOOK_AHEAD, bundle.read(LOOK_AHEAD) or b""
    shape = bundle.spec.num_experts, bundle.spec.hidden_size + 1
    predictors = {}
    layers = {str(layer): layer for layer in bundle.spec.moe_layers}
    for name, info in header_in(data, path).items():
        if name not in layers or (info.dtype, info.shape) != ("F32", shape):
            raise DymoeError(f"{path}: tensor {name[:60]} is no predictor of the model; {DAMAGED}")
        predictors[layers[name]] = np.frombuffer(data, "<f4", math.prod(shape), info.start).reshape(shape).copy()
        if not np.isfinite(predictors[layers[name]]).all():
            raise DymoeError(f"{path}: tensor {name} is not finite; {DAMAGED}")
    return predictors


def check_digest(bundle: Bundle, expected: str) -> None:
    """Raise DymoeError unless the digest of a bundle is `expected`, and its weights are those that the digest means.

    This reads all weights.
    """
    compare_digest(bundle.manifest, str(bundle.path), expected)
    if not bundle.manifest.vouches:
        raise DymoeError(f"{bundle.path}: {NOT_VOUCHED}")
    for name in filter(bundle.manifest.is_weights, bundle.manifest.files):
        bundle.check_file(name)


def compare_digest(manifest: Manifest, where: str, expected: str | None) -> None:
    """Raise DymoeError, which starts with `where`, if a digest is expected and the manifest has another."""
    if expected is None:
        return
    if re.fullmatch("[0-9a-f]{64}", expected.lower()) is None:
        raise DymoeError(f"--expect {expected}: not a digest of 64 hexadecimal digits; dymoe-bundle digest prints one")
    if manifest.digest != expected.lower():
        raise DymoeError(f"{where}: its digest is {manifest.digest}, not the expected one; get the right bundle")


def verify(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Yield (what was checked, problem) for each file, dense tensor and expert record. The problem is "" if none.

    Files that the manifest does not list are problems, too. Weights that have checksums alone are checked by these;
    where all of a file's are right, its digest is compared, if the manifest has one.
    """
    manifest, sound = bundle.manifest, set(bundle.manifest.files)
    for what, name, check in _checks(bundle):
        problem = _problem(check)
        if problem:
            sound.discard(name)
        yield what, problem
    for name in sorted(sound):
        if manifest.is_weights(name) and manifest.files[name].sha256:
            yield name, _problem(partial(bundle.check_file, name))
    for name in bundle.unlisted():
        yield name, f"{bundle.path / name}: not a file of the bundle, which nothing reads; move it elsewhere"


def _checks(bundle: Bundle) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield (what is checked, name of its file, function that checks it)."""
    manifest = bundle.manifest
    yield LOOK_AHEAD, LOOK_AHEAD, partial(read_predictors, bundle)
    for name in manifest.files:
        if manifest.is_weights(name):
            yield name, name, partial(_verify_index, bundle, name)
    for name in manifest.dense_crc32:
        yield f"{DENSE}: {name}", DENSE, partial(_verify_dense, bundle, name)
    for layer, entry in manifest.layers.items():
        for expert in range(bundle.spec.num_experts):
            key = ExpertKey(layer, expert)
            yield f"expert {key}", entry.file, partial(read_record, bundle, key)


def read_index(bundle: Bundle, name: str) -> dict[str, TensorInfo]:
    """Return the tensors in a file of weights by name; raise DymoeError if it is damaged."""
    with closing(bundle.open_file(name)) as file:
        return header_of(file.fd, bundle.path / name, file.nbytes, file.start)


def _verify_index(bundle: Bundle, name: str) -> None:
    path = bundle.path / name
    header = read_index(bundle, name)
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
    if name == DENSE:
        check_dense_types(bundle, header)


def check_dense_types(bundle: Bundle, header: Mapping[str, TensorInfo]) -> None:
    """Raise DymoeError unless all dense tensors are there, with the types and shapes that the specification implies."""
    path = bundle.path / DENSE
    for name, shape in bundle.spec.each_tensor():
        info = header.get(name)
        if info is None:
            raise DymoeError(f"{path}: tensor {name} is missing; {DAMAGED}")
        dtype, shape = stored_as(name, shape, bundle.manifest.dense_bits)
        if (info.dtype, info.shape) != (dtype, shape):
            raise DymoeError(f"{path}: tensor {name} is {info.dtype[:20]} of shape {info.shape}; {DAMAGED}")


def _verify_dense(bundle: Bundle, name: str) -> None:
    path = bundle.path / DENSE
    with closing(bundle.open_file(DENSE)) as file:
        info = header_of(file.fd, path, file.nbytes, file.start).get(name)
        if info is None:
            raise DymoeError(f"{path}: tensor {name} is missing; {DAMAGED}")
        data = np.empty(info.nbytes, np.uint8)
        read_into(file.fd, file.path, file.start + info.start, memoryview(data))
    check_dense(path, name, data, bundle.manifest.dense_crc32[name])


def _problem(check: Callable[[], object]) -> str:
    try:
        check()
    except DymoeError as error:
        return str(error)
    return ""
