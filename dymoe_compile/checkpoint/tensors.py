"""Tensors of a Hugging Face checkpoint directory: their names and places, checked without reading a weight.

This module does not import PyTorch, so a faulty directory is reported before PyTorch is loaded or found missing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dymoe_compile.families import Config, Family, Names, family_of
from dymoe_runtime.bundle.bundle import MANIFEST
from dymoe_runtime.bundle.tensorfile import TensorInfo, read_header
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json, read_text
from dymoe_runtime.spec import ExpertKey, ModelSpec

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REMEDY = "copy it again from the model's repository"
FLOATS = ("BF16", "F16", "F32")


class CheckpointTensors:
    """The tensors of a checkpoint directory. `names` maps DyMoE names to checkpoint names.

    Raises DymoeError if a tensor that `spec` needs is missing, or has a wrong shape or an unsupported dtype. Raises
    it too if a layer has a tensor that `spec` has no place for.
    """

    def __init__(self, directory: Path, spec: ModelSpec, names: Names) -> None:
        self.directory = directory
        self.spec = spec
        self.shards = _shards(directory)
        self._names = names
        self._tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for shard in self.shards:
            for name, info in read_header(shard).items():
                self._tensors[name] = (shard, info)
        self._placed: set[str] = set()
        self._check_index()
        self._check_tensors()

    @staticmethod
    def open(path: str | os.PathLike[str]) -> CheckpointTensors:
        """Read config.json and the headers of the directory `path`.

        Raises a DymoeError that names what is missing or contradictory.
        """
        directory = Path(path)
        values = read_config(directory)
        family: Family = family_of(values)
        spec = family.spec(Config(values))
        return CheckpointTensors(directory, spec, family.names(spec))

    def where(self, name: str) -> tuple[Path, TensorInfo]:
        """Return the file and the place of the tensor with this checkpoint name."""
        return self._tensors[name]

    def dense(self, name: str) -> str:
        """Return the checkpoint name of the tensor outside the experts with this DyMoE name."""
        return self._find(self._candidates(name))

    def expert(self, key: ExpertKey, name: str) -> str | None:
        """Return the checkpoint name of a matrix of one expert, or None if the experts of a layer share one tensor."""
        return self._present(_format(self._names.expert[name], layer=key.layer, expert=key.expert))

    def stacked(self, key: ExpertKey, name: str) -> str:
        """Return the checkpoint name of the tensor that holds a matrix of all experts of a layer.

        gate and up share one tensor.
        """
        stack = "down" if name == "down" else "gate_up"
        return self._find(_format(self._names.stacked.get(stack, ()), layer=key.layer))

    def _candidates(self, name: str) -> list[str]:
        if not name.startswith("layers."):
            return _format(self._names.dense[name])
        _, layer, rest = name.split(".", 2)
        return _format(self._names.dense[rest], layer=int(layer))

    def _present(self, candidates: list[str]) -> str | None:
        return next((name for name in candidates if name in self._tensors), None)

    def _find(self, candidates: list[str]) -> str:
        found = self._present(candidates)
        if found is None:
            raise DymoeError(f"{self.directory}: tensor {candidates[0]} is missing; download the checkpoint again")
        return found

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
            self._check_shape(self.dense(ours), shape)
        for layer in self.spec.moe_layers:
            for expert in range(self.spec.num_experts):
                self._check_expert(ExpertKey(layer, expert))
        self._check_leftovers()

    def _check_leftovers(self) -> None:
        """Raise DymoeError for a layer's tensor that has no place in the model: it would silently be left out."""
        for name in self._tensors:
            if name.startswith("model.layers.") and name not in self._placed and not name.endswith("inv_freq"):
                raise DymoeError(
                    f"{self.directory}: tensor {name} has no place in the model that config.json describes; "
                    "use the config.json of this checkpoint; if it is the right one, this variant of "
                    f"{self.spec.model_type} is not supported"
                )

    def _check_expert(self, key: ExpertKey) -> None:
        for name, (rows, cols) in self.spec.expert_shapes.items():
            if found := self.expert(key, name):
                self._check_shape(found, (rows, cols))
                continue
            down = name == "down"
            stacked = self._present(
                _format(self._names.stacked.get("down" if down else "gate_up", ()), layer=key.layer)
            )
            if stacked is None:
                theirs = _format(self._names.expert[name], layer=key.layer, expert=key.expert)[0]
                raise DymoeError(f"{self.directory}: tensor {theirs} is missing; download the checkpoint again")
            self._check_shape(stacked, (self.spec.num_experts, rows if down else 2 * rows, cols))

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


def read_config(directory: Path) -> dict[str, Any]:
    """Return the parsed config.json of a checkpoint directory.

    Raises DymoeError if there is no such directory, or if its config.json is missing or not a JSON object.
    """
    if not directory.exists():
        raise DymoeError(f"{directory}: no such directory; give the directory of a Hugging Face checkpoint")
    if not directory.is_dir():
        raise DymoeError(f"{directory}: not a directory; give the directory that holds config.json and the shards")
    if not (directory / CONFIG).exists():
        raise DymoeError(f"{directory}: this is no Hugging Face checkpoint: it has no {CONFIG}; {_instead(directory)}")
    return read_json(directory / CONFIG)


def _instead(directory: Path) -> str:
    """Return advice for a directory that is not a checkpoint."""
    if (directory / MANIFEST).exists():
        return "it is a bundle already: run it with dymoe-run"
    if any(directory.glob("*.gguf")):
        return "GGUF files are quantized already: give the checkpoint that they were made from"
    return "give the directory that holds config.json and the model's safetensors files"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint; raise a DymoeError that names the file if it has none."""
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
    """Return tensor name -> file name of its shard."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DymoeError(f"{index}: 'weight_map' is missing; download the file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard:
            raise DymoeError(f"{index}: tensor {name} is said to be in {shard!r}; download the file again")
    return weight_map


def _format(templates: tuple[str, ...], **values: int) -> list[str]:
    return [template.format(**values) for template in templates]
