"""Safetensors files by explicit reads instead of memory mapping, so only the caller's buffers take memory.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length,
a JSON header name -> {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import open_regular, parse_json

# Readable dtypes -> bytes of an element.
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"U8": 1, "U16": 2, "U32": 4, "U64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1},
}
# Several times those of the largest shards. What a header holds takes about eight times its bytes in memory.
MAX_HEADER_BYTES = 32 << 20
MAX_DIMENSIONS = 8
REMEDY = "copy the file again"
# Linux reads at most about 2 GiB per call.
MAX_AT_ONCE = 1 << 30


@dataclass(frozen=True)
class TensorInfo:
    """The place and type of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # offset in the file
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file by name.

    Raises DymoeError if the file is missing, truncated or malformed.
    """
    fd = open_regular(path, "copy it again")
    try:
        return header_of(fd, path, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def header_of(fd: int, path: Path, nbytes: int, offset: int = 0) -> dict[str, TensorInfo]:
    """Return the tensors by name of the file that is `nbytes` bytes of `fd` from `offset` on; `path` names it.

    Raises DymoeError if it is truncated or malformed.
    """
    start = bytearray(min(8, nbytes))
    read_into(fd, path, offset, memoryview(start))
    text = bytearray(_length(start, nbytes, path))
    read_into(fd, path, offset + 8, memoryview(text))
    return _tensors(text, nbytes, path)


def header_in(data: bytes, path: Path) -> dict[str, TensorInfo]:
    """Return the tensors in the bytes of a whole file by name; raise DymoeError if they are truncated or malformed."""
    return _tensors(data[8 : 8 + _length(data[:8], len(data), path)], len(data), path)


def _length(start: bytes | bytearray, size: int, path: Path) -> int:
    """Return the bytes of the header of a file with `size` bytes, from its first 8."""
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise DymoeError(f"{path}: not a complete safetensors file ({size} bytes); copy it again")
    return length


def _tensors(text: bytes | bytearray, size: int, path: Path) -> dict[str, TensorInfo]:
    data_start = 8 + len(text)
    try:
        header = parse_json(text.decode(), f"{path}: header", REMEDY)
        tensors = {name: _info(entry, data_start) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DymoeError(f"{path}: malformed safetensors header ({problem}); {REMEDY}") from problem
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start < end:
            raise DymoeError(f"{path}: tensor {name} overlaps another; {REMEDY}")
        end = info.start + info.nbytes
    if end > size:
        raise DymoeError(f"{path}: truncated, {size} bytes of {end}; {REMEDY}")
    return tensors


def _info(entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or len(entry) != 3 or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"an entry has the keys {', '.join(map(str, entry))[:60]}")
    numbers = (begin, end, *shape)
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers) or end < begin:
        raise ValueError(f"shape {str(shape)[:60]}, data_offsets {repr(begin)[:20]}, {repr(end)[:20]}")
    if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise ValueError(f"{end - begin} bytes for {dtype} of shape {shape}")
    return TensorInfo(dtype, shape, data_start + begin, end - begin)


def read_tensor(fd: int, path: Path, info: TensorInfo, name: str, index: int | None = None) -> np.ndarray:
    """Return the bytes of tensor `name`, or of slice `index` along its first dimension, uint8 [bytes].

    Raises DymoeError if the dtype is not in ITEM_BYTES, or the read fails or ends early.
    """
    if info.dtype not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        raise DymoeError(f"{path}: tensor {name} is {info.dtype}, not one of {known}; convert the checkpoint to BF16")
    nbytes, start = info.nbytes, info.start
    if index is not None:
        nbytes //= info.shape[0]
        start += index * nbytes
    data = np.empty(nbytes, np.uint8)
    if nbytes:
        read_into(fd, path, start, memoryview(data))
    return data


def read_into(fd: int, path: Path, offset: int, *buffers: memoryview) -> None:
    """Fill `buffers` in order with the bytes from `offset` on.

    Raises DymoeError naming the file and offset if the read fails or the file ends early.
    """
    error, done = fill(fd, offset, buffers)
    check_read(path, offset, sum(len(buffer) for buffer in buffers), error, done)


def fill(fd: int, offset: int, buffers: Sequence[memoryview]) -> tuple[int, int]:
    """Fill `buffers` in order from `offset` on until an error or the end of the file; return (errno, bytes read).

    The errno is 0 if there was no error, even if the file ended early.
    """
    wanted, done = sum(len(buffer) for buffer in buffers), 0
    while done < wanted:
        try:
            count = os.preadv(fd, _rest(buffers, done), offset + done)
            done += count
            # A file may end at any byte; a direct read that starts there, unaligned, would fail with an error.
            if done < wanted and (count == 0 or os.fstat(fd).st_size <= offset + done):
                break
        except OSError as error:
            return error.errno or errno.EIO, done
    return 0, done


def check_read(path: Path, offset: int, wanted: int, error: int, done: int) -> None:
    """Raise DymoeError naming the file and offset if a read of `wanted` bytes from `offset` ended early.

    `error` and `done` are the result of `fill`.
    """
    if error:
        raise DymoeError(
            f"{path}: read error at offset {offset + done} ({os.strerror(error)}); check the disk, or use another copy"
        )
    if done < wanted:
        raise DymoeError(
            f"{path}: ends at offset {offset + done}, {wanted - done} bytes are missing; copy the file again"
        )


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return the part of `buffers` after their first `done` bytes, limited to what one call may read."""
    rest = []
    for buffer in buffers:
        rest.append(buffer[min(done, len(buffer)) :][:MAX_AT_ONCE])
        done -= min(done, len(buffer))
        if len(rest[-1]) == MAX_AT_ONCE:
            break
    return [buffer for buffer in rest if len(buffer)]


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], align: int = 8) -> bytes:
    """Return the header of a file that holds `tensors` (name -> dtype, shape, bytes) in this order.

    Spaces pad it so that the data start at a multiple of `align` bytes.
    """
    entries, cursor = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [cursor, cursor + nbytes]}
        cursor += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text
