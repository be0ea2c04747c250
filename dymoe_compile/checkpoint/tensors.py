"""Tensors of a Hugging Face checkpoint directory: their names and places, checked without reading a weight.

This module does not import PyTorch, so a faulty directory is reported before PyTorch is loaded or found missing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dymoe_compile.checkpoint.directory import CONFIG, REMEDY, TensorFiles, read_config
from dymoe_compile.checkpoint.formats import find, main_tensor
from dymoe_compile.checkpoint.formats.stored import FLOATS, Shape, Stored
from dymoe_compile.checkpoint.left_out import (
    FURTHER_TOKENS,
    SAME_HEAD,
    ZERO_BIASES,
    further_layers,
    kind_of,
    layer_of,
)
from dymoe_compile.checkpoint.quantization import Quantization, read_quantization
from dymoe_compile.families import family_of, text_config
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.names import Names, Source, Templates
from dymoe_runtime.errors import DymoeError, needing_extra
from dymoe_runtime.spec import ExpertKey, ModelSpec

# What checkpoints put before the names of the language model, instead of `model.`, and before its output head.
MODEL, HEAD = "model.", "lm_head."
MODEL_PREFIXES = (
    *(MODEL, "model.language_model.", "language_model.model.", "thinker.model.", "language_model.", "backbone."),
    "",
)
HEAD_PREFIXES = (HEAD, "language_model.lm_head.", "thinker.lm_head.", "model.lm_head.", "model.language_model.lm_head.")
# Keys for the number of layers after the model's own that predict further tokens.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")
EMBED, LM_HEAD = "embed", "lm_head"


@dataclass(frozen=True)
class Stack:
    """The experts of a layer in one tensor for gate and up, and one for down."""

    gate_up: Stored
    down: Stored
    gate_up_bias: Stored | None
    down_bias: Stored | None
    transposed: bool  # whether the rows of the matrices are columns here
    interleaved: bool  # whether the rows of gate and up take turns

    @property
    def parts(self) -> list[Stored]:
        """Return all tensors of the experts."""
        parts = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return [part for part in parts if part is not None]


class CheckpointTensors:
    """The tensors of a checkpoint, by the names that DyMoE has for them.

    Raises DymoeError if a tensor that the model needs is missing, or has a wrong shape or an unsupported type. Raises
    it too for a tensor that has no place in the model, unless the model does without it; `left_out` counts those.
    """

    def __init__(
        self,
        files: TensorFiles,
        spec: ModelSpec,
        names: Names,
        quantization: Quantization = Quantization(),  # noqa: B008  # frozen
        further_layers: int = 0,
    ) -> None:
        self.files = files
        self.spec = spec
        self.left_out: Counter[str] = Counter()  # kind in words -> tensors
        self._names = names
        self._quantization = quantization
        self._prefix = self._find_prefix()
        self._head = next((head for head in HEAD_PREFIXES if main_tensor(f"{head}weight", files)), HEAD)
        self._placed: set[str] = set()
        self._keep_own_head()
        self.shapes = self.spec.tensor_shapes()  # of the tensors outside the experts
        self._check_tensors()
        self._check_leftovers(further_layers)

    @staticmethod
    def open(path: str | os.PathLike[str], files_of: Callable[[Path], TensorFiles] = TensorFiles) -> CheckpointTensors:
        """Read config.json and the headers of the directory `path`, whose files `files_of` opens.

        Raises a DymoeError that names what is missing or contradictory.
        """
        directory = Path(path)
        values = read_config(directory)
        quantization = read_quantization(directory, values)
        family = family_of(values)
        config = Config(text_config(values))
        try:
            spec = family.spec(config)
        except ValueError as error:  # of a specification whose parts do not fit
            raise DymoeError(f"{directory / CONFIG}: {error}; {REMEDY}") from error
        config.check_read()
        files = files_of(directory)
        with needing_extra("compile", "reading checkpoints"):
            names = family.names(spec)
        return CheckpointTensors(files, spec, names, quantization, _further_layers(config.values))

    def dense(self, name: str) -> tuple[Source | None, list[Stored]]:
        """Return how the tensor outside the experts with this DyMoE name is made, and of which tensors.

        It is the one tensor itself if the first is None.
        """
        shape, source, layer = self.shapes[name], *self._source(name)
        if not isinstance(source, Source):
            return None, [self._checked(source, shape, padded=name in (EMBED, LM_HEAD), layer=layer)]
        inputs = zip(source.inputs, source.shapes(shape), strict=True)
        return source, [self._checked(templates, theirs, layer=layer) for templates, theirs in inputs]

    def expert(self, key: ExpertKey) -> dict[str, Stored]:
        """Return the matrices and vectors of one expert of a layer that does not stack them."""
        return {name: self._expert(key, name, shape) for name, shape in self._expert_parts()}

    def stack(self, layer: int) -> Stack | None:
        """Return the tensors that hold all experts of a layer, or None if each expert has its own."""
        stacked = self._names.stacked
        if stacked is None or self._present(self._candidates(stacked.gate_up, layer=layer)) is None:
            return None
        experts, width, hidden = self.spec.num_experts, self.spec.expert_width, self.spec.hidden_size
        biases = self.spec.moe.biases
        # Gate and up together are not square where down is, so the shapes show whether the matrices are transposed.
        wanted = (experts, 2 * width, hidden), (experts, hidden, width)
        turned = (experts, hidden, 2 * width), (experts, width, hidden)
        usual = turned if stacked.transposed else wanted
        gate_up = self._find(stacked.gate_up, usual[0], layer=layer)
        down = self._find(stacked.down, usual[1], layer=layer)
        shapes = gate_up.shape, down.shape
        if shapes not in (wanted, turned):
            self._check_shape(gate_up, usual[0])
            self._check_shape(down, usual[1])
        return Stack(
            gate_up,
            down,
            self._checked(stacked.gate_up_bias, (experts, 2 * width), layer=layer) if biases else None,
            self._checked(stacked.down_bias, (experts, hidden), layer=layer) if biases else None,
            transposed=shapes == turned,
            interleaved=stacked.interleaved,
        )

    def trained_bits(self) -> int | None:
        """Return the bits of the experts' weights if the model was trained with so few, as far as that is known."""
        layer = self.spec.moe_layers[0]
        stack = self.stack(layer)
        parts = stack.parts if stack else self.expert(ExpertKey(layer, 0)).values()
        return next((part.trained_bits for part in parts if part.trained_bits), None)

    def _source(self, name: str) -> tuple[Source | Templates, int]:
        """Return the source of a tensor outside the experts, and its layer, if it is of one."""
        _, layer, rest = name.split(".", 2) if name.startswith("layers.") else ("", "0", name)
        return self._names.dense[rest], int(layer)

    def _expert_parts(self) -> Iterator[tuple[str, Shape]]:
        yield from self.spec.expert_shapes.items()
        for name, length in self.spec.expert_vectors.items():
            yield name, (length,)

    def _expert(self, key: ExpertKey, name: str, shape: Shape) -> Stored:
        stacked = self._names.stacked
        templates = self._names.expert.get(name) or (stacked.gate_up if stacked else ())
        return self._checked(templates, shape, layer=key.layer, expert=key.expert)

    def _candidates(self, templates: Templates, **numbers: int) -> list[str]:
        """Return the names that the checkpoint may have for a tensor, the usual one first."""
        names = [template.format(**numbers) for template in templates]
        return [
            self._head + name.removeprefix(HEAD) if name.startswith(HEAD) else self._prefix + name.removeprefix(MODEL)
            for name in names
        ]

    def _present(self, names: Iterable[str]) -> str | None:
        """Return the first of these names of which the checkpoint has a tensor, in whatever format."""
        return next((name for name in names if main_tensor(name, self.files)), None)

    def _find(self, templates: Templates, shape: Shape, **numbers: int) -> Stored:
        """Return a tensor that should have this shape; raise DymoeError if it is missing, or in no known format."""
        candidates = self._candidates(templates, **numbers)
        name = self._present(candidates)
        if name is None:
            raise DymoeError(
                f"{self.files.directory}: tensor {candidates[0]} is missing; download the checkpoint again"
            )
        stored = find(name, shape, self.files, self._quantization)
        if stored is None:
            main = main_tensor(name, self.files) or name
            raise DymoeError(
                f"{self.files.path(main)}: tensor {main} is {self.files.info(main).dtype}, expected one of "
                f"{', '.join(FLOATS)}, or one with the scales of a known quantization; "
                "start from the unquantized checkpoint"
            )
        return stored

    def _checked(self, templates: Templates, shape: Shape, padded: bool = False, **numbers: int) -> Stored:
        """Return a tensor of this shape; with `padded`, it may have more rows. Raise DymoeError if it is another."""
        stored = self._find(templates, shape, **numbers)
        self._check_shape(stored, shape, padded)
        return stored

    def _check_shape(self, stored: Stored, shape: Shape, padded: bool = False) -> None:
        if stored.shape == shape or (padded and stored.shape[1:] == shape[1:] and stored.shape[0] > shape[0]):
            return
        main = next(iter(stored.parts.values()))
        raise DymoeError(
            f"{self.files.path(main)}: tensor {stored.name} has shape {list(stored.shape)}, {CONFIG} says "
            f"{list(shape)}; use the {CONFIG} that belongs to this checkpoint"
        )

    def _find_prefix(self) -> str:
        """Return what the checkpoint has before the names of the language model, by its embedding."""
        source = self._names.dense[EMBED]
        templates = source.inputs[0] if isinstance(source, Source) else source
        names = [template.removeprefix(MODEL) for template in templates]
        return next((prefix for prefix in MODEL_PREFIXES if self._present(prefix + name for name in names)), MODEL)

    def _keep_own_head(self) -> None:
        """Have the model use an output head of its own if the checkpoint has one, whatever config.json says of it."""
        sources = [self._names.dense.get(name, ()) for name in (LM_HEAD, EMBED)]
        head, embed = (
            None if isinstance(source, Source) else self._present(self._candidates(source)) for source in sources
        )
        if not self.spec.tie_embeddings or head is None or embed is None:
            return
        if head in self.files and embed in self.files and self.files.are_equal(head, embed):
            self._placed.add(head)
            self.left_out[SAME_HEAD] += 1
        else:
            self.spec = replace(self.spec, tie_embeddings=False)

    def _check_tensors(self) -> None:
        for name in self.shapes:
            self._place(self.dense(name)[1])
        for layer in self.spec.moe_layers:
            if stack := self.stack(layer):
                self._place(stack.parts)
                continue
            for expert in range(self.spec.num_experts):
                self._place(self.expert(ExpertKey(layer, expert)).values())

    def _place(self, tensors: Iterable[Stored]) -> None:
        for stored in tensors:
            self._placed.update(stored.parts.values())

    def _check_leftovers(self, declared: int) -> None:
        """Count the tensors that the model does without; raise DymoeError for one that would be left out silently."""
        layers = f"{self._prefix}layers."
        further = further_layers(self.files, layers, self.spec.num_layers, declared)
        for name in self.files:
            if name in self._placed:
                continue
            kind = FURTHER_TOKENS if layer_of(name, layers) in further else kind_of(name, layers)
            if kind is None and self._is_zero_bias(name):
                kind = ZERO_BIASES
            if kind is None:
                raise DymoeError(
                    f"{self.files.directory}: tensor {name} has no place in the model that {CONFIG} describes; "
                    f"use the {CONFIG} of this checkpoint; if it is the right one, this variant of "
                    f"{self.spec.model_type} is not supported"
                )
            self.left_out[kind] += 1

    def _is_zero_bias(self, name: str) -> bool:
        """Return whether `name` is a bias without effect; GPTQ adds such biases to matrices that have none."""
        matrix = f"{name.removesuffix('.bias')}.qweight"
        return name.endswith(".bias") and matrix in self._placed and self.files.is_zero(name)


def _further_layers(values: Mapping[str, Any]) -> int:
    """Return how many layers after the model's own config.json says to predict further tokens."""
    counts = [values.get(name) for name in FURTHER_LAYERS]
    return max((count for count in counts if isinstance(count, int)), default=0)
