"""How checkpoints store tensors: one module per family of formats, each with a function `find`.

`find(name, shape, files, quantization)` returns a `Stored` if the files hold the tensor `name` in that format, else
None. It raises DymoeError if they hold a part of it. `shape` is the one that the tensor should have. No weight is read
for that, and PyTorch is not imported before a tensor is decoded.
"""

from __future__ import annotations

from dymoe_compile.checkpoint.directory import TensorFiles
from dymoe_compile.checkpoint.formats import fp4, gptq, integers, plain, scaled
from dymoe_compile.checkpoint.formats.stored import WEIGHT, Shape, Stored
from dymoe_compile.checkpoint.quantization import Quantization

FORMATS = (plain.find, scaled.find, fp4.find, integers.find, gptq.find)


def find(name: str, shape: Shape, files: TensorFiles, quantization: Quantization) -> Stored | None:
    """Return the tensor `name` in the format that the files hold it in, or None if they do not hold it.

    Raises DymoeError if they hold a part of it.
    """
    return next((stored for look in FORMATS if (stored := look(name, shape, files, quantization))), None)


def main_tensor(name: str, files: TensorFiles) -> str | None:
    """Return the name of the main tensor that a format stores the tensor `name` as, or None if there is none."""
    names = [name, f"{name}_blocks", f"{name}_packed"]
    if name.endswith(WEIGHT):
        names.append(f"{name.removesuffix(WEIGHT)}.qweight")
    return next((name for name in names if name in files), None)
