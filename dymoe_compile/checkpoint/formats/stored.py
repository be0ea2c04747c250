"""A tensor of the model as a checkpoint stores it: one tensor, or several that a format combines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dymoe_compile.checkpoint.directory import TensorFiles
from dymoe_runtime.errors import DymoeError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
WEIGHT = ".weight"
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Stored(ABC):
    """A tensor with the name `name` and the shape `shape`, made of the checkpoint's tensors `parts`.

    `parts` maps the roles that `decode` knows to names; the first is the main one. The tensor can be a stack of
    matrices, whose parts are stacks, too.
    """

    name: str
    shape: Shape
    parts: dict[str, str]
    trained_bits: ClassVar[int | None] = None  # of weights, where only models trained that way are stored so

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor that `parts`, by role, make; or a matrix of a stack, if they are of one matrix.

        Scales in F8_E8M0 come as float32; the other parts come as they are stored.
        """


class Parts:
    """The tensors beside the main one that a format needs; each must have one of certain types and shapes."""

    def __init__(self, name: str, main: str, files: TensorFiles) -> None:
        self.shape = files.info(main).shape
        self.dtype = files.info(main).dtype
        self.found = {"data": main}
        self._name = name
        self._files = files

    def add(self, role: str, name: str, dtypes: tuple[str, ...]) -> Shape:
        """Add the tensor `name`; return its shape. Raises DymoeError if it is missing, or of another type."""
        if name not in self._files:
            main = self.found["data"]
            raise DymoeError(
                f"{self._files.path(main)}: tensor {name} is missing, which the quantized tensor {main} needs; "
                "download the checkpoint again"
            )
        info = self._files.info(name)
        if info.dtype not in dtypes:
            raise DymoeError(f"{self._files.path(name)}: tensor {name} is {info.dtype}, not one of {', '.join(dtypes)}")
        self.found[role] = name
        return info.shape

    def maybe(self, role: str, name: str, dtypes: tuple[str, ...]) -> Shape | None:
        """Add the tensor `name` if there is one; return its shape, else None."""
        return self.add(role, name, dtypes) if name in self._files else None

    def expect(self, role: str, *shapes: Shape) -> None:
        """Raise DymoeError if the tensor of a role has none of these shapes."""
        name = self.found[role]
        if self._files.info(name).shape not in shapes:
            self.misfit(role, " or ".join(str(list(shape)) for shape in shapes))

    def misfit(self, role: str, expected: str) -> None:
        """Raise DymoeError: the tensor of a role has another shape than `expected`."""
        name, main = self.found[role], self.found["data"]
        raise DymoeError(
            f"{self._files.path(name)}: tensor {name} has shape {list(self._files.info(name).shape)}, expected "
            f"{expected} for the quantized tensor {main} of shape {list(self.shape)}; download the checkpoint again"
        )


def block_size(size: int, count: int, usual: int) -> int | None:
    """Return how many of `size` rows or columns share one of `count` values, or None if that is no whole number.

    Blocks of the `usual` size may end with a shorter one.
    """
    if count == 1:
        return size
    if count and math.ceil(size / usual) == count:
        return usual
    return size // count if count and size % count == 0 else None
