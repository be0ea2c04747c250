"""Safetensors files by explicit reads: no mapping, so memory is what the caller holds.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length,
a JSON header name -> {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dymoe_runtime.errors import DymoeError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    start: int  # absolute offset in the file
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a file; DymoeError if it is missing, cut short or malformed."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise DymoeError(f"{path}: not a complete safetensors file ({size} bytes); copy it again")
            header = json.loads(file.read(length))
        tensors = {name: _info(entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    except FileNotFoundError as error:
        raise DymoeError(f"{path}: no such file; copy it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DymoeError(f"{path}: malformed safetensors header ({error}); copy the file again") from error
    end = max((info.start + info.nbytes for info in tensors.values()), default=0)
    if end > size:
        raise DymoeError(f"{path}: truncated, {size} bytes of {end}; copy the file again")
    return tensors


def _info(entry: Mapping[str, Any], data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets {begin}, {end}")
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def read_tensor(fd: int, path: Path, info: TensorInfo, name: str, index: int | None = None) -> torch.Tensor:
    """The tensor `name`, or slice `index` of its first dimension."""
    if info.dtype not in DTYPES:
        raise DymoeError(
            f"{path}: tensor {name} is {info.dtype}, supported are {', '.join(DTYPES)}; convert the checkpoint to BF16"
        )
    dtype, shape, start = DTYPES[info.dtype], info.shape, info.start
    if index is not None:
        shape = shape[1:]
        start += index * info.nbytes // info.shape[0]
    tensor = torch.empty(shape, dtype=dtype)
    nbytes = tensor.numel() * tensor.element_size()
    if index is None and nbytes != info.nbytes:
        raise DymoeError(
            f"{path}: tensor {name} has {info.nbytes} bytes, its shape needs {nbytes}; copy the file again"
        )
    read_into(fd, path, start, memoryview(tensor.view(-1).view(torch.uint8).numpy()) if nbytes else memoryview(b""))
    return tensor


def read_into(fd: int, path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `offset`; DymoeError naming file and offset on a read error or a short file."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done : done + (1 << 30)]], offset + done)
        except OSError as error:
            raise DymoeError(f"{path}: read error at offset {offset + done}: {error.strerror}") from error
        if count == 0:
            raise DymoeError(f"{path}: ends at offset {offset + done}, {len(buffer) - done} bytes are missing")
        done += count


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], align: int = 8) -> bytes:
    """The start of a file with `tensors` (name -> dtype, shape, bytes) in order; data starts `align`ed."""
    entries, cursor = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [cursor, cursor + nbytes]}
        cursor += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text
