"""What llama.cpp's own quantizers need: the original, an importance matrix, and a type for each matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from dymoe_compile.export.gguf.architectures import Architecture, architecture_of
from dymoe_compile.export.gguf.observed import Inputs, observe
from dymoe_compile.export.gguf.original import write_original
from dymoe_compile.export.gguf.recipe import Matrix, Recipe, matrices_of, solve_recipe
from dymoe_compile.export.gguf.tensors import expert_name, gguf_name
from dymoe_compile.export.walk import open_origin, windows_of
from dymoe_compile.job.progress import Progress
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.units import format_size

ORIGINAL, IMPORTANCE, TYPES, README = "original.gguf", "importance.gguf", "types.txt", "README.md"
QUANTIZED = "model.gguf"
# The type that llama-quantize is asked for, by which it quantizes at all; `types.txt` names another for each matrix.
BASE = "Q8_0"
TEXT = """# {name}, to be quantized by llama.cpp

    llama-quantize --imatrix {importance} --tensor-type-file {types} {original} {quantized} {base}

makes {quantized} of about {size} ({bits:.2f} bits a weight).

- `{original}` has the weights of the checkpoint as they are.
- `{importance}` is how much each column of each matrix matters for {tokens} tokens of calibration text.
- `{types}` has a type for each matrix, with more bits where the bundle's measured sensitivities say that an error does
  most harm. The estimate behind it is a KL of {kl:.4f} to the original on such text; measure it with
  `llama-perplexity --kl-divergence`.
"""


@dataclass(frozen=True)
class Prepared:
    """What recipes of any size share: the matrices with their costs, and the bytes of everything else in a file."""

    matrices: Sequence[Matrix]
    rest_bytes: int
    calibration_tokens: int

    @property
    def weights(self) -> int:
        """Return the number of weights in all matrices."""
        return sum(matrix.weights for matrix in self.matrices)

    def recipe(self, size: int | float) -> Recipe:
        """Return the types for a file of so many bytes (int), or for so many bits a weight (float).

        Raises DymoeError if none are so small.
        """
        nbytes = size - self.rest_bytes if isinstance(size, int) else int(size * self.weights / 8)
        return solve_recipe(self.matrices, nbytes)

    def nbytes(self, recipe: Recipe) -> int:
        """Return the bytes that all matrices take."""
        return sum(matrix.nbytes(recipe.types[matrix.name]) for matrix in self.matrices)


def prepare(
    bundle: Bundle,
    directory: Path,
    checkpoint_path: Path,
    calibration: Sequence[str],
    kernels: Kernels,
    progress: Progress,
) -> Prepared:
    """Write the original and its importance matrix to `directory`, and measure what each matrix costs.

    Raises DymoeError if the checkpoint is not that of the bundle, or if llama.cpp cannot run the model.
    """
    architecture = architecture_of(bundle.spec)
    checkpoint = open_origin(bundle, checkpoint_path, progress)
    ids = windows_of(bundle, calibration).train
    observed = observe(checkpoint, ids, kernels, directory, progress)
    stored = write_original(bundle, checkpoint, directory / ORIGINAL, progress)
    write_importance(directory / IMPORTANCE, observed.inputs, bundle.spec, architecture, ids.shape)
    matrices = list(matrices_of(bundle, observed, architecture))
    rest = (directory / ORIGINAL).stat().st_size - sum(stored[matrix.name] for matrix in matrices)
    return Prepared(matrices, rest, ids.size)


def write_recipe(bundle: Bundle, prepared: Prepared, directory: Path, size: int | float) -> dict[str, Any]:
    """Write the types for a size, as `Prepared.recipe` takes it, and how to use them; return what there is to say."""
    recipe = prepared.recipe(size)
    taken = prepared.nbytes(recipe)
    nbytes, bits = prepared.rest_bytes + taken, 8 * taken / prepared.weights
    (directory / TYPES).write_text(recipe.to_text(), encoding="utf-8")
    text = TEXT.format(
        name=bundle.path.stem,
        original=ORIGINAL,
        importance=IMPORTANCE,
        types=TYPES,
        quantized=QUANTIZED,
        base=BASE,
        size=format_size(nbytes),
        bits=bits,
        tokens=prepared.calibration_tokens,
        kl=recipe.kl,
    )
    (directory / README).write_text(text, encoding="utf-8")
    return {
        "quantized_bytes": nbytes,
        "quantized_bits": round(bits, 3),
        "expected_kl": recipe.kl,
        "types": dict(Counter(of.name for of in recipe.types.values())),
        "calibration_tokens": prepared.calibration_tokens,
    }


def write_importance(
    file: Path, inputs: Mapping[str, Inputs], spec: ModelSpec, architecture: Architecture, windows: tuple[int, ...]
) -> None:
    """Write sums of squared inputs as an importance matrix, as llama-imatrix does."""
    writer = GGUFWriter(file, architecture.name)
    try:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["calibration of dymoe-compile"])
        writer.add_uint32("imatrix.chunk_count", windows[0])
        writer.add_uint32("imatrix.chunk_size", windows[1])
        for name, seen in inputs.items():
            of_experts = name.split(".")[0].isdecimal()
            theirs = expert_name(*_expert_key(name)) if of_experts else gguf_name(name, architecture)
            writer.add_tensor(f"{theirs}.in_sum2", np.ascontiguousarray(seen.sums, np.float32))
            writer.add_tensor(f"{theirs}.counts", np.ascontiguousarray(seen.counts[:, None], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _expert_key(name: str) -> tuple[int, str]:
    layer, _, matrix = name.partition(".")
    return int(layer), matrix
