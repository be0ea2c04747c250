"""The files of weights in a bundle before they are written: their headers, and how many bytes they take.

The writer writes these headers, and plans count their bytes, so a plan and its bundle have the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dymoe_runtime.bundle.bundle import Stored, record_name, stored_as
from dymoe_runtime.bundle.tensorfile import ITEM_BYTES, header_bytes
from dymoe_runtime.bundle.tiers import PAGE, RecordLayout
from dymoe_runtime.spec import ExpertKey, ModelSpec


def stored_bytes(stored: Stored) -> int:
    """Return the bytes of a tensor in the file."""
    dtype, shape = stored
    return ITEM_BYTES[dtype] * math.prod(shape)


def dense_header(tensors: Mapping[str, Stored]) -> bytes:
    """Return the header of dense.safetensors, which holds `tensors` in their order."""
    return header_bytes({name: (*stored, stored_bytes(stored)) for name, stored in tensors.items()})


def layer_header(layer: int, layout: RecordLayout, experts: int) -> bytes:
    """Return the header of the file with the records of a layer, which ends where the first page of records begins."""
    each = "U8", (layout.record_bytes,), layout.record_bytes
    return header_bytes({record_name(ExpertKey(layer, expert)): each for expert in range(experts)}, PAGE)


def dense_file_bytes(spec: ModelSpec, dense_bits: Mapping[str, int]) -> int:
    """Return the bytes of dense.safetensors."""
    tensors = {name: stored_as(name, shape, dense_bits) for name, shape in spec.tensor_shapes().items()}
    return len(dense_header(tensors)) + sum(map(stored_bytes, tensors.values()))
