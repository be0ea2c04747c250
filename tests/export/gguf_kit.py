"""What the tests of exports to GGUF share: what a file holds, read by the package that llama.cpp's authors keep."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.families import family_of, text_config
from dymoe_compile.families.parts.config import Config
from dymoe_runtime.spec import ModelSpec


class File:
    """The metadata and the tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.values: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def of_model(self, name: str) -> Any:
        """A value of the architecture."""
        return self.values[f"{self.values['general.architecture']}.{name}"]

    def tensor(self, name: str) -> np.ndarray:
        """The values of a tensor, float32, in its shape."""
        tensor = self._tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if tensor.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return np.float32(tensor.data).reshape(shape)
        return np.float32(dequantize(tensor.data, tensor.tensor_type)).reshape(shape)


def spec_of(config: Any) -> ModelSpec:
    """The specification of a model with a configuration of transformers."""
    values = json.loads(config.to_json_string(use_diff=False))
    return family_of(values).spec(Config(text_config(values)))


def bundle_like(checkpoint: Checkpoint, directory: Path) -> Any:
    """What an export of an original asks a bundle for, from its checkpoint."""

    def read(name: str) -> bytes | None:
        return (directory / name).read_bytes() if (directory / name).exists() else None

    return SimpleNamespace(path=directory, spec=checkpoint.spec, read=read, manifest=SimpleNamespace(provenance={}))
