"""Writing a GGUF file: the plan of its tensors and its metadata first, then tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from dymoe_compile.export.gguf.architectures import Architecture
from dymoe_compile.export.gguf.metadata import write_metadata
from dymoe_compile.export.gguf.tensors import Planned, Stacks, dense_numbers, plan
from dymoe_compile.export.gguf.vocabulary import Vocabulary
from dymoe_compile.export.source import Source
from dymoe_runtime.bundle.bundle import Bundle

# The first part of our own keys in a file.
OWN = "dymoe"


def write_model(
    file: Path,
    source: Source,
    architecture: Architecture,
    vocabulary: Vocabulary,
    name: str,
    record: dict[str, Any],
    advance: Callable[[], object] = lambda: None,
) -> dict[str, int]:
    """Write the weights of `source` to a new GGUF file; return name -> bytes of its tensors.

    `record` goes into keys of our own. `advance` is called once for each layer with experts.
    """
    writer = GGUFWriter(file, architecture.name)
    try:
        planned = list(plan(source, architecture))
        for tensor, _ in planned:
            _declare(writer, tensor)
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if _is_quantized(planned) else LlamaFileType.MOSTLY_BF16)
        writer.add_quantization_version(2)
        write_metadata(writer, source.spec, architecture)
        vocabulary.write(writer)
        for key, value in record.items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_string
            add(f"{OWN}.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stacks, layers = Stacks(source), set()
        for tensor, ours in planned:
            is_expert = "_exps." in tensor.name
            numbers = stacks.numbers(ours) if is_expert else dense_numbers(source, ours, tensor, architecture)
            assert numbers.nbytes == tensor.nbytes, tensor.name
            writer.write_tensor_data(numbers)
            if is_expert and tensor.name.split(".")[1] not in layers:
                layers.add(tensor.name.split(".")[1])
                advance()
        return {tensor.name: tensor.nbytes for tensor, _ in planned}
    finally:
        writer.close()


def name_of(bundle: Bundle) -> str:
    """Return the name of a bundle's model."""
    return str(bundle.manifest.provenance.get("source_name") or bundle.path.stem)


def _declare(writer: GGUFWriter, tensor: Planned) -> None:
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type)


def _is_quantized(planned: list[tuple[Planned, str]]) -> bool:
    return any(tensor.type == GGMLQuantizationType.Q8_0 for tensor, _ in planned)
