"""Lazy reader of Hugging Face safetensors checkpoints: one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_compile.checkpoint.tensors import CheckpointTensors
from dymoe_runtime.bundle.tensorfile import read_tensor
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import MATRICES, ExpertKey

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# Rows of a matrix converted to float32 at a time.
ROWS_AT_ONCE = 4096


class Checkpoint:
    """The weights of a checkpoint directory; each tensor is read on demand and must be finite."""

    def __init__(self, tensors: CheckpointTensors) -> None:
        self.spec = tensors.spec
        self._tensors = tensors
        self._files: dict[Path, int] = {}

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Checkpoint:
        """Open and check the directory `path`.

        Raises a DymoeError that names what is missing or contradictory.
        """
        return Checkpoint(CheckpointTensors.open(path))

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor outside the experts with this DyMoE name, in its stored precision.

        Raises DymoeError if it is not finite.
        """
        return self._read(self._tensors.dense(name))

    def expert(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        """Return gate [I, H], up [I, H] and down [H, I] of one routed expert, in their stored precision.

        Raises DymoeError if one is not finite.
        """
        return {name: self._expert_matrix(key, name) for name in MATRICES}

    def digest(self, advance: Callable[[], object], step: int) -> str:
        """Return the SHA-256 of config.json and the shards; call `advance` for each `step` bytes."""
        sha = hashlib.sha256()
        for path in (self._tensors.directory / "config.json", *self._tensors.shards):
            sha.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(step):
                    sha.update(block)
                    advance()
        return sha.hexdigest()

    def total_bytes(self) -> int:
        """Return the bytes of all shards."""
        return sum(path.stat().st_size for path in self._tensors.shards)

    def _expert_matrix(self, key: ExpertKey, name: str) -> torch.Tensor:
        if found := self._tensors.expert(key, name):
            return self._read(found)
        matrix = self._read(self._tensors.stacked(key, name), index=key.expert)
        if name == "down":
            return matrix
        width = self.spec.expert_width
        return matrix[:width] if name == "gate" else matrix[width:]

    def _read(self, name: str, index: int | None = None) -> torch.Tensor:
        path, info = self._tensors.where(name)
        data = torch.from_numpy(read_tensor(self._file(path), path, info, name, index))
        tensor = data.view(DTYPES[info.dtype]).view(info.shape if index is None else info.shape[1:])
        if not torch.isfinite(tensor).all():
            raise DymoeError(f"{path}: tensor {name} holds NaN or Inf; the checkpoint is damaged, download it again")
        return tensor

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]


class CheckpointDense:
    """`Dense` weights read from a checkpoint; those of layers are kept for one layer at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._known = checkpoint.spec.tensor_shapes()
        self._layer = ""
        self._of_layer: dict[str, torch.Tensor] = {}
        self._of_model: dict[str, torch.Tensor] = {}

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self._tensor("embed")[torch.from_numpy(ids)].float().numpy()

    def vector(self, name: str) -> np.ndarray:
        return self._tensor(name).numpy()

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = linear_by_rows(torch.from_numpy(x), self._tensor(name)).numpy()
        return y + self.vector(f"{name}_bias") if f"{name}_bias" in self._known else y

    def _tensor(self, name: str) -> torch.Tensor:
        if not name.startswith("layers."):
            return self._load(self._of_model, name)
        layer = name.split(".", 2)[1]
        if layer != self._layer:
            self._layer, self._of_layer = layer, {}
        return self._load(self._of_layer, name)

    def _load(self, kept: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        if name not in kept:
            tensor = self._checkpoint.tensor(name)
            kept[name] = tensor if name in ("embed", "lm_head") else tensor.float()
        return kept[name]


def linear_by_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [T, cols] @ weight.T [cols, rows] in float32, converting only ROWS_AT_ONCE rows of weight at a time."""
    return torch.cat([F.linear(x, rows.float()) for rows in torch.split(weight, ROWS_AT_ONCE)], dim=-1)
