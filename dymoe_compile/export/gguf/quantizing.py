"""What llama.cpp's own quantizers need: the original, an importance matrix, and a type for each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from dymoe_compile.export.gguf.architectures import Architecture, architecture_of
from dymoe_compile.export.gguf.observed import Inputs, observe
from dymoe_compile.export.gguf.original import write_original
from dymoe_compile.export.gguf.recipe import Recipe, matrices_of, solve_recipe
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


def write_quantizing(
    bundle: Bundle,
    directory: Path,
    checkpoint_path: Path,
    calibration: Sequence[str],
    size: int | float,
    kernels: Kernels,
    progress: Progress,
) -> dict[str, Any]:
    """Write the files to `directory`, for a quantized file of so many bytes (int) or bits a weight (float).

    Returns what there is to say of them. Raises DymoeError if the checkpoint is not that of the bundle, if llama.cpp
    cannot run the model, or if it cannot be so small.
    """
    architecture = architecture_of(bundle.spec)
    checkpoint = open_origin(bundle, checkpoint_path, progress)
    windows = windows_of(bundle, calibration)
    observed = observe(checkpoint, windows.train, kernels, directory, progress)
    stored = write_original(bundle, checkpoint, directory / ORIGINAL, progress)
    write_importance(directory / IMPORTANCE, observed.inputs, bundle.spec, architecture, windows.train.shape)
    matrices = list(matrices_of(bundle, observed, architecture))
    weights = sum(matrix.weights for matrix in matrices)
    # Whatever is no matrix stays as it is.
    rest = (directory / ORIGINAL).stat().st_size - sum(stored[matrix.name] for matrix in matrices)
    nbytes = size - rest if isinstance(size, int) else int(size * weights / 8)
    recipe = solve_recipe(matrices, nbytes)
    (directory / TYPES).write_text(recipe.to_text(), encoding="utf-8")
    taken = sum(matrix.nbytes(recipe.types[matrix.name]) for matrix in matrices)
    summary = {
        "quantized_bytes": rest + taken,
        "quantized_bits": round(8 * taken / weights, 3),
        "expected_kl": recipe.kl,
        "types": _counts(recipe),
        "calibration_tokens": windows.train.size,
    }
    text = TEXT.format(
        name=bundle.path.stem,
        original=ORIGINAL,
        importance=IMPORTANCE,
        types=TYPES,
        quantized=QUANTIZED,
        base=BASE,
        size=format_size(rest + taken),
        bits=summary["quantized_bits"],
        tokens=windows.train.size,
        kl=recipe.kl,
    )
    (directory / README).write_text(text, encoding="utf-8")
    return summary


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


def _counts(recipe: Recipe) -> dict[str, int]:
    counts: dict[str, int] = {}
    for of_type in recipe.types.values():
        counts[of_type.name] = counts.get(of_type.name, 0) + 1
    return counts
