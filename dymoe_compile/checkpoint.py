"""Lazy reader of Hugging Face safetensors checkpoints: one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_compile.families import Config, Family, Names, family_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json, read_text
from dymoe_runtime.spec import MATRICES, ExpertKey, ModelSpec
from dymoe_runtime.tensorfile import TensorInfo, read_header, read_tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REMEDY = "copy it again from the model's repository"
FLOATS = ("BF16", "F16", "F32")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
# Rows of a bf16 matrix turned to float32 at a time.
ROWS_AT_ONCE = 4096


class Checkpoint:
    """A checkpoint directory, checked: every tensor that `spec` needs is there in its shape."""

    def __init__(self, directory: Path, spec: ModelSpec, names: Names) -> None:
        self.directory = directory
        self.spec = spec
        self._names = names
        self._shards = _shards(directory)
        self._tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for shard in self._shards:
            for name, info in read_header(shard).items():
                self._tensors[name] = (shard, info)
        self._placed: set[str] = set()
        self._check_index()
        self._check_tensors()
        self._files: dict[Path, int] = {}

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Checkpoint:
        """Open and check the directory `path`; DymoeError names what is missing or contradictory."""
        directory = Path(path)
        values = read_config(directory)
        family: Family = family_of(values)
        spec = family.spec(Config(values))
        return Checkpoint(directory, spec, family.names(spec))

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor outside the experts by our name, in its stored precision."""
        return self._read(*self._find(self._candidates(name), name))

    def expert(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        """Matrices gate, up [I, H] and down [H, I] of one routed expert, in stored precision."""
        return {name: self._expert_matrix(key, name) for name in MATRICES}

    def digest(self, advance: Callable[[], object], step: int) -> str:
        """SHA-256 of configuration and weights; `advance` is called for each `step` bytes."""
        sha = hashlib.sha256()
        for path in (self.directory / "config.json", *self._shards):
            sha.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(step):
                    sha.update(block)
                    advance()
        return sha.hexdigest()

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._shards)

    def _expert_matrix(self, key: ExpertKey, name: str) -> torch.Tensor:
        theirs = _format(self._names.expert[name], layer=key.layer, expert=key.expert)
        if found := self._present(theirs):
            return self._read(found)
        stack = "down" if name == "down" else "gate_up"
        found = self._find(_format(self._names.stacked[stack], layer=key.layer), theirs[0])[0]
        matrix = self._read(found, index=key.expert)
        if name == "down":
            return matrix
        width = self.spec.expert_width
        return matrix[:width] if name == "gate" else matrix[width:]

    def _candidates(self, name: str) -> list[str]:
        if not name.startswith("layers."):
            return _format(self._names.dense[name])
        _, layer, rest = name.split(".", 2)
        return _format(self._names.dense[rest], layer=int(layer))

    def _present(self, candidates: list[str]) -> str | None:
        return next((name for name in candidates if name in self._tensors), None)

    def _find(self, candidates: list[str], ours: str) -> tuple[str, str]:
        found = self._present(candidates)
        if found is None:
            raise DymoeError(f"{self.directory}: tensor {candidates[0]} is missing; download the checkpoint again")
        return found, ours

    def _read(self, name: str, ours: str = "", index: int | None = None) -> torch.Tensor:
        path, info = self._tensors[name]
        data = torch.from_numpy(read_tensor(self._file(path), path, info, name, index))
        tensor = data.view(DTYPES[info.dtype]).view(info.shape if index is None else info.shape[1:])
        if not torch.isfinite(tensor).all():
            raise DymoeError(f"{path}: tensor {name} holds NaN or Inf; the checkpoint is damaged, download it again")
        return tensor

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if (self.directory / SINGLE).exists() or not index.exists():
            return
        for name, shard in _weight_map(index).items():
            if name not in self._tensors:
                raise DymoeError(
                    f"{self.directory / shard}: tensor {name} is missing, though {INDEX} names it there; "
                    "download the shard again"
                )

    def _check_tensors(self) -> None:
        for ours, shape in self.spec.each_tensor():
            self._check_shape(self._find(self._candidates(ours), ours)[0], shape)
        for layer in self.spec.moe_layers:
            for expert in range(self.spec.num_experts):
                self._check_expert(ExpertKey(layer, expert))
        self._check_leftovers()

    def _check_leftovers(self) -> None:
        """A layer's tensor that the configuration has no place for would silently be left out."""
        for name in self._tensors:
            if name.startswith("model.layers.") and name not in self._placed and not name.endswith("inv_freq"):
                raise DymoeError(
                    f"{self.directory}: tensor {name} has no place in the model that config.json describes; "
                    "use the config.json that belongs to this checkpoint"
                )

    def _check_expert(self, key: ExpertKey) -> None:
        for name, (rows, cols) in self.spec.expert_shapes.items():
            theirs = _format(self._names.expert[name], layer=key.layer, expert=key.expert)
            if found := self._present(theirs):
                self._check_shape(found, (rows, cols))
                continue
            down = name == "down"
            stacked = _format(self._names.stacked["down" if down else "gate_up"], layer=key.layer)
            found = self._present(stacked)
            if found is None:
                raise DymoeError(f"{self.directory}: tensor {theirs[0]} is missing; download the checkpoint again")
            self._check_shape(found, (self.spec.num_experts, rows if down else 2 * rows, cols))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._placed.add(name)
        path, info = self._tensors[name]
        if info.shape != shape:
            raise DymoeError(
                f"{path}: tensor {name} has shape {list(info.shape)}, config.json says {list(shape)}; "
                "use the config.json that belongs to this checkpoint"
            )
        if info.dtype not in FLOATS:
            raise DymoeError(
                f"{path}: tensor {name} is {info.dtype}, expected one of {', '.join(FLOATS)}; "
                "start from the unquantized checkpoint"
            )


class CheckpointDense:
    """Dense weights straight from a checkpoint; those of one layer are kept at a time."""

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
    """x [T, cols] @ weight.T [cols, rows] in float32, without the whole of a large weight in float32."""
    return torch.cat([F.linear(x, rows.float()) for rows in weight.split(ROWS_AT_ONCE)], dim=-1)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory; DymoeError where there is none."""
    if not directory.exists():
        raise DymoeError(f"{directory}: no such directory; give the directory of a Hugging Face checkpoint")
    if not directory.is_dir():
        raise DymoeError(f"{directory}: not a directory; give the directory that holds config.json and the shards")
    return read_json(directory / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a checkpoint; DymoeError names the file."""
    return parse_json(read_text(path, REMEDY), str(path), REMEDY)


def _shards(directory: Path) -> list[Path]:
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.exists():
        hint = "convert it to safetensors first" if any(directory.glob("*.bin")) else "download the checkpoint again"
        raise DymoeError(f"{directory}: neither {SINGLE} nor {INDEX} is there; {hint}")
    shards = [directory / name for name in sorted(set(_weight_map(index).values()))]
    for shard in shards:
        if not shard.exists():
            raise DymoeError(f"{shard}: shard is missing, though {INDEX} names it; download it")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, a file beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DymoeError(f"{index}: 'weight_map' is missing; download the file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard:
            raise DymoeError(f"{index}: tensor {name} is said to be in {shard!r}; download the file again")
    return weight_map


def _format(templates: tuple[str, ...], **values: int) -> list[str]:
    return [template.format(**values) for template in templates]
