"""Lazy reader of Hugging Face safetensors checkpoints: one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from dymoe_compile.checkpoint.directory import CONFIG, INDEX, REMEDY
from dymoe_compile.checkpoint.formats.read import DTYPES, read
from dymoe_compile.checkpoint.quantization import MODELOPT
from dymoe_compile.checkpoint.tensors import CheckpointTensors, Stack
from dymoe_runtime.bundle.tiers import grid_for
from dymoe_runtime.files import naming, open_regular
from dymoe_runtime.spec import ExpertKey

__all__ = ["DTYPES", "Checkpoint", "CheckpointDense", "linear_by_rows"]

# Rows of a matrix converted to float32 at a time.
ROWS_AT_ONCE = 4096


class Checkpoint:
    """The weights of a checkpoint directory; each tensor is read on demand and must be finite."""

    def __init__(self, tensors: CheckpointTensors, expert_grid: str = "") -> None:
        """Take opened tensors; `expert_grid` is that of the bundle's codes, as in `ModelSpec`."""
        self.spec = replace(tensors.spec, expert_grid=expert_grid)
        self._tensors = tensors

    @staticmethod
    def open(path: str | os.PathLike[str], ladder: Sequence[int] = ()) -> Checkpoint:
        """Open and check the directory `path`, to compile it with `ladder`.

        Experts that were trained in MXFP4 keep their codes if that is the highest tier. Raises a DymoeError that names
        what is missing or contradictory.
        """
        tensors = CheckpointTensors.open(path)
        return Checkpoint(tensors, grid_for(ladder, tensors.trained_bits()) if ladder else "")

    @property
    def left_out(self) -> dict[str, int]:
        """Return kind in words -> number of the checkpoint's tensors that the model does without."""
        return dict(self._tensors.left_out)

    def trained_bits(self) -> int | None:
        """Return the bits of the experts' weights if the model was trained with so few, as far as that is known."""
        return self._tensors.trained_bits()

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor outside the experts with this DyMoE name.

        It is in its stored precision, or in float32 if it is quantized or made of others. Raises DymoeError if it is
        not finite.
        """
        source, stored = self._tensors.dense(name)
        inputs = [read(self._tensors.files, each) for each in stored]
        shape = self._tensors.shapes[name]
        if source is None:
            return inputs[0][: shape[0]] if shape else inputs[0]  # the rest pads the vocabulary
        made = source.make(shape, inputs)
        if made.shape != shape:
            raise ValueError(f"{name} was made with shape {tuple(made.shape)}, not {shape}")
        return made

    def expert(self, key: ExpertKey) -> dict[str, torch.Tensor]:
        """Return gate [I, H], up [I, H] and down [H, I] of one routed expert, and its biases if the model has them.

        Matrices are in their stored precision, or in float32 if they are quantized. The biases `gate_bias` [I],
        `up_bias` [I] and `down_bias` [H] are in float32. Raises DymoeError if one is not finite.
        """
        if stack := self._tensors.stack(key.layer):
            return self._of_stack(stack, key.expert)
        expert = {name: read(self._tensors.files, stored) for name, stored in self._tensors.expert(key).items()}
        return {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in expert.items()}

    def digest(self, advance: Callable[[], object], step: int) -> str:
        """Return the SHA-256 of config.json, the shards, and what else says how to read them.

        Calls `advance` for each `step` bytes.
        """
        files = self._tensors.files
        extras = [path for name in (INDEX, MODELOPT) if (path := files.directory / name).exists()]
        sha = hashlib.sha256()
        for path in (files.directory / CONFIG, *files.shards, *extras):
            sha.update(path.name.encode())
            with naming(path), open(open_regular(path, REMEDY), "rb") as file:
                while block := file.read(step):
                    sha.update(block)
                    advance()
        return sha.hexdigest()

    def total_bytes(self) -> int:
        """Return the bytes of all shards."""
        return sum(path.stat().st_size for path in self._tensors.files.shards)

    def _of_stack(self, stack: Stack, expert: int) -> dict[str, torch.Tensor]:
        gate_up, down = (read(self._tensors.files, stored, expert) for stored in (stack.gate_up, stack.down))
        if stack.transposed:
            gate_up, down = gate_up.T, down.T
        gate, up = _halves(gate_up, stack.interleaved)
        tensors = {"gate": gate, "up": up, "down": down}
        if stack.gate_up_bias is not None and stack.down_bias is not None:
            tensors["gate_bias"], tensors["up_bias"] = _halves(
                read(self._tensors.files, stack.gate_up_bias, expert).float(), stack.interleaved
            )
            tensors["down_bias"] = read(self._tensors.files, stack.down_bias, expert).float()
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _halves(rows: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of gate and those of up."""
    if interleaved:
        return rows[::2], rows[1::2]
    half = len(rows) // 2
    return rows[:half], rows[half:]


class CheckpointDense:
    """`Dense` weights read from a checkpoint; those of layers are kept for one layer at a time."""

    pause = None

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
