"""The mathematics of a model: products with quantized records, attention, norms and routing.

`load_kernels` returns the best implementation for this processor. Callers pass it on as an argument; there is no
global one. `interface.py` says what kernels do, and `reference.py` defines in NumPy what every implementation must
equal. The environment variable DYMOE_ISA names the instruction set to use, or `numpy` for the reference.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.process import default_threads

REFERENCE = "numpy"
# Modules that have kernels, the best first. The first is missing if the package was installed without a compiler.
BACKENDS = ("dymoe_runtime.kernels.native", "dymoe_runtime.kernels.reference")
# Old values of DYMOE_ISA that still work: the reference was once written with torch.
OLD_NAMES = {"torch": REFERENCE}
MISSING = (
    "compiled kernels are missing, so this runs on NumPy, 50 to 160 times slower; "
    "install a C++ compiler and reinstall dymoe"
)


class Backend(Protocol):
    """A module of BACKENDS."""

    def available(self) -> Sequence[str]:
        """Return the names of its kernels that run on this machine, best first."""

    def load(self, name: str, notice: str | None) -> Kernels:
        """Return the kernels called `name`; `notice` tells the user about better ones that are missing, if any."""


def available_kernels() -> list[str]:
    """Return the names of the kernels that run on this machine, best first; the reference is last."""
    return [name for backend, _ in _backends() for name in backend.available()]


def load_kernels(name: str | None = None, threads: int | None = None) -> Kernels:
    """Return the kernels called `name`; the default is DYMOE_ISA, or else the best that run here.

    `threads` is the number of threads that they may use, by default one for each processor that this process may use.
    Raises DymoeError if kernels of that name do not run here.

    >>> load_kernels("numpy", threads=1).name
    'numpy'
    """
    wanted = name or os.environ.get("DYMOE_ISA")
    wanted = OLD_NAMES.get(wanted, wanted) if wanted else None
    for backend, notice in _backends():
        for found in backend.available():
            if wanted in (None, found):
                kernels = backend.load(found, notice)
                kernels.set_threads(threads or default_threads())
                return kernels
    raise DymoeError(f"DYMOE_ISA={wanted}: not available here; choose one of {', '.join(available_kernels())}")


def _backends() -> Iterator[tuple[Backend, str | None]]:
    """Yield the backends that are installed, each with a notice for the user if a better one is missing."""
    notice = None
    for module in BACKENDS:
        try:
            backend: Backend = importlib.import_module(module)
        except ImportError:
            notice = MISSING
        else:
            yield backend, notice
