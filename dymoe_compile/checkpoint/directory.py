"""The files of a Hugging Face checkpoint directory: its configuration, and where each tensor is.

This module does not import PyTorch, so a faulty directory is reported before PyTorch is loaded or found missing.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dymoe_runtime.bundle.tensorfile import TensorInfo, read_header, read_into, read_tensor
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import MAX_JSON_BYTES, decode_text, open_regular, parse_json, read_regular
from dymoe_runtime.storage import MANIFEST

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
REMEDY = "copy it again from the model's repository"
GGUF = "GGUF files are quantized already: give the checkpoint that they were made from"
# A shard's name: what all shards share, the number of this one, and how many there are.
NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
# Bytes compared at a time.
PIECE_BYTES = 1 << 24


class TensorFiles:
    """The tensors in the safetensors files of a checkpoint directory, by name.

    Where several shards hold a tensor, the index says which one counts. Raises DymoeError if a shard is missing or
    malformed, or does not hold what the index says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shards, index = _shards(directory)
        self._tensors: dict[str, tuple[Path, TensorInfo]] = {}
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close, self._open)
        for shard in self.shards:
            for name, info in read_header(shard).items():
                if index.get(name, shard.name) != shard.name:
                    continue
                if name in self._tensors:
                    raise DymoeError(
                        f"{shard}: tensor {name} is in {self.path(name).name}, too; download {INDEX}, or remove the "
                        "file that does not belong to the model"
                    )
                self._tensors[name] = (shard, info)
        for name, holder in index.items():
            if name not in self._tensors:
                raise DymoeError(
                    f"{directory / holder}: tensor {name} is missing, though {INDEX} names it there; "
                    "download the shard again"
                )

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def path(self, name: str) -> Path:
        """Return the file that holds the tensor `name`."""
        return self._tensors[name][0]

    def info(self, name: str) -> TensorInfo:
        """Return the type, the shape and the place of the tensor `name`."""
        return self._tensors[name][1]

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Return the bytes of the tensor `name`, or of slice `index` along its first dimension, uint8 [bytes].

        Raises DymoeError if its type is not known, or the read fails.
        """
        path, info = self._tensors[name]
        return read_tensor(self._file(path), path, info, name, index)

    def are_equal(self, a: str, b: str) -> bool:
        """Return whether the tensors `a` and `b` have the same type, shape and bytes."""
        if (self.info(a).dtype, self.info(a).shape) != (self.info(b).dtype, self.info(b).shape):
            return False
        starts = range(0, self.info(a).nbytes, PIECE_BYTES)
        return all(np.array_equal(self._piece(a, start), self._piece(b, start)) for start in starts)

    def is_zero(self, name: str) -> bool:
        """Return whether all bytes of the tensor `name` are 0."""
        return not any(self._piece(name, start).any() for start in range(0, self.info(name).nbytes, PIECE_BYTES))

    def _piece(self, name: str, start: int) -> np.ndarray:
        """Return up to PIECE_BYTES bytes of the tensor `name` from byte `start` on."""
        path, info = self._tensors[name]
        data = np.empty(min(PIECE_BYTES, info.nbytes - start), np.uint8)
        read_into(self._file(path), path, info.start + start, memoryview(data))
        return data

    def _file(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = open_regular(path, REMEDY)
        return self._open[path]


def _close(files: dict[Path, int]) -> None:
    for file in files.values():
        os.close(file)


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
        return GGUF
    return "give the directory that holds config.json and the model's safetensors files"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint; raise a DymoeError that names the file if it has none."""
    text = decode_text(read_regular(path, REMEDY, MAX_JSON_BYTES), path, REMEDY)
    return parse_json(text, str(path), REMEDY)


def _shards(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the safetensors files of a model, and tensor name -> file name as far as an index says it."""
    if (directory / SINGLE).exists():
        return [directory / SINGLE], {}
    if (directory / INDEX).exists():
        return _indexed(directory / INDEX)
    found = sorted(directory.glob("*.safetensors"))
    if shards := _numbered(found):
        return shards, {}
    if len(found) == 1:
        return found, {}
    raise DymoeError(f"{directory}: neither {SINGLE} nor {INDEX} is there; {_without_weights(directory, len(found))}")


def _without_weights(directory: Path, others: int) -> str:
    """Return advice for a checkpoint without the usual files; `others` is the number of other safetensors files."""
    if others:
        return f"download {INDEX}, which says which of the {others} .safetensors files belong to the model"
    if any(directory.glob("*.gguf")):
        return GGUF
    return "convert it to safetensors first" if any(directory.glob("*.bin")) else "download the checkpoint again"


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = _weight_map(index)
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.exists():
            raise DymoeError(f"{shard}: shard is missing, though {INDEX} names it; download it")
    return shards, weight_map


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> file name of its shard."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DymoeError(f"{index}: 'weight_map' is missing; download the file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard:
            raise DymoeError(f"{index}: tensor {name} is said to be in {shard!r}; download the file again")
    return weight_map


def _numbered(paths: list[Path]) -> list[Path]:
    """Return the shards among `paths` whose names number them, in order; those called `model` if there are others.

    Raises DymoeError if one of them is missing.
    """
    series: dict[tuple[str, int], dict[int, Path]] = {}
    for path in paths:
        if match := NUMBERED.fullmatch(path.name):
            series.setdefault((match[1], int(match[3])), {})[int(match[2])] = path
    series = {key: shards for key, shards in series.items() if key[0] == "model"} or series
    if len(series) != 1:
        return []
    (_, count), shards = series.popitem()
    first = min(min(shards), 1)
    for number in range(first, first + count):
        if number not in shards:
            known = next(iter(shards.values()))
            raise DymoeError(
                f"{known.parent}: shard {number} of {count} is missing, as the name of {known.name} says; download it"
            )
    return [shards[number] for number in range(first, first + count)]
