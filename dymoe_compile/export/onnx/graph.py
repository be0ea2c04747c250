"""An ONNX graph in the making.

Weights go to a file of their own piece by piece, so that few are in memory at a time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

# What onnxruntime 1.20 and later run. DequantizeLinear has had blocks since opset 21.
OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
CONTRIB = "com.microsoft"
# Large tensors begin at whole pages, so that a runtime can map them.
PAGE, ALIGN = 4096, 64
# Constants of at most so many bytes are in the graph itself.
INLINE_BYTES = 1024
# Types of stored tensors; bfloat16 is kept as its bits.
ELEMENTS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint16): TensorProto.BFLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
}


class WeightsFile:
    """The file with the weights of a model, which `TensorWriter` fills."""

    def __init__(self, path: Path) -> None:
        """Create the file; raise FileExistsError if it is there."""
        self.name = path.name
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  # closed by `close`
        self._end = 0

    def reserve(self, nbytes: int) -> int:
        """Return the offset of a new range of `nbytes`."""
        align = PAGE if nbytes >= PAGE else ALIGN
        offset = -(-self._end // align) * align
        self._end = offset + nbytes
        return offset

    def write(self, offset: int, data: np.ndarray) -> None:
        """Write the bytes of an array at `offset`."""
        view = memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        while view:
            written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        self._file.truncate(self._end)
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file, whatever it holds."""
        self._file.close()


class TensorWriter:
    """A tensor of the file of weights, which takes its elements in order."""

    def __init__(self, file: WeightsFile, offset: int, dtype: np.dtype[Any], nbytes: int) -> None:
        self._file, self._dtype, self._next, self._end = file, dtype, offset, offset + nbytes

    def append(self, values: np.ndarray) -> None:
        """Write the next elements."""
        assert values.dtype == self._dtype and self._next + values.nbytes <= self._end
        self._file.write(self._next, values)
        self._next += values.nbytes

    @property
    def complete(self) -> bool:
        """Return whether all elements are written."""
        return self._next == self._end


class Graph:
    """Nodes and tensors, in the order in which they come. Each value has the name of the node that makes it."""

    def __init__(self, weights: WeightsFile, outer: Graph | None = None) -> None:
        """Begin a graph whose weights go to `weights`, or the body of a node in `outer`, whose values it sees."""
        self._weights = weights
        self._outer = outer
        self._nodes: list[NodeProto] = []
        self._tensors: dict[str, TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._writers: list[TensorWriter] = []
        self._numbers: Iterator[int] = itertools.count() if outer is None else outer._numbers

    def node(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; return the name of that. An empty name stands for an input that is left out."""
        return self.nodes(operator, 1, *inputs, domain=domain, **attributes)[0]

    def nodes(self, operator: str, outputs: int, *inputs: str, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs; return their names."""
        name = f"{operator}_{next(self._numbers)}"
        names = [name] if outputs == 1 else [f"{name}_{index}" for index in range(outputs)]
        self.named(operator, names, *inputs, domain=domain, name=name, **attributes)
        return names

    def named(
        self, operator: str, outputs: Sequence[str], *inputs: str, domain: str = "", name: str = "", **attributes: Any
    ) -> None:
        """Add a node whose outputs have these names."""
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        made = helper.make_node(operator, given, list(outputs), name or outputs[0], domain=domain, **attributes)
        self._nodes.append(made)

    def constant(self, value: np.ndarray | float | Sequence[int]) -> str:
        """Return the name of a small constant; lists of numbers are int64, single ones float32."""
        array = _array(value)
        if self._outer is not None:
            return self._outer.constant(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = name = f"constant_{len(self._constants)}"
            if array.nbytes <= INLINE_BYTES:
                self._tensors[name] = numpy_helper.from_array(array, name)
            else:
                self.store(name, array)
        return self._constants[key]

    def filled(self, like: str, number: float) -> str:
        """Return float32 values of the shape of another value, all equal to `number`."""
        return self.node("Expand", self.constant(number), self.node("Shape", like))

    def store(self, name: str, values: np.ndarray) -> str:
        """Put a whole tensor into the file of weights; return its name."""
        self.writer(name, values.dtype, values.shape).append(values)
        return name

    def writer(self, name: str, dtype: Any, shape: Sequence[int]) -> TensorWriter:
        """Add a tensor to the file of weights, whose elements come later."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        offset = self._weights.reserve(nbytes)
        self._tensors[name] = _external(name, ELEMENTS[dtype], shape, self._weights.name, offset, nbytes)
        self._writers.append(TensorWriter(self._weights, offset, dtype, nbytes))
        return self._writers[-1]

    def view(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Add a tensor that has the same bytes as another one of the file, in another shape; return its name."""
        twin = TensorProto()
        twin.CopyFrom(self._tensors[of])
        twin.name = name
        twin.dims[:] = list(shape)
        self._tensors[name] = twin
        return name

    def has(self, name: str) -> bool:
        """Return whether a tensor has this name."""
        return name in self._tensors

    def body(self) -> Graph:
        """Begin the body of a node of this graph."""
        return Graph(self._weights, self)

    def finished(self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> GraphProto:
        """Return the graph; all its tensors must be complete."""
        assert all(writer.complete for writer in self._writers)
        return helper.make_graph(self._nodes, name, inputs, outputs, list(self._tensors.values()))


def model_of(graph: GraphProto, portable: bool, producer: str, version: str) -> ModelProto:
    """Return the model of a graph; `portable` says that it has no contributed operators."""
    opsets = [helper.make_opsetid("", OPSET)]
    if not portable:
        opsets.append(helper.make_opsetid(CONTRIB, CONTRIB_OPSET))
    no_functions: list[FunctionProto] = []
    return helper.make_model(
        graph,
        functions=no_functions,
        opset_imports=opsets,
        ir_version=IR_VERSION,
        producer_name=producer,
        producer_version=version,
    )


def value(name: str, element: int, shape: Sequence[int | str]) -> ValueInfoProto:
    """Return the declaration of an input or output; names in `shape` are sizes known at run time only."""
    return helper.make_tensor_value_info(name, element, shape)


def _array(value: np.ndarray | float | Sequence[int]) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    return np.array(value, np.float32 if isinstance(value, float) else np.int64)


def _external(name: str, element: int, shape: Sequence[int], file: str, offset: int, nbytes: int) -> TensorProto:
    """Return a tensor whose bytes are in another file."""
    tensor = TensorProto(name=name, data_type=element, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, entry in (("location", file), ("offset", str(offset)), ("length", str(nbytes))):
        tensor.external_data.append(StringStringEntryProto(key=key, value=entry))
    return tensor
