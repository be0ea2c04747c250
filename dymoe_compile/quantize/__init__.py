"""Quantization of matrices to nested tiers."""

from __future__ import annotations

from dymoe_compile.quantize.descent import DescentKernels
from dymoe_compile.quantize.descent_reference import ReferenceDescent
from dymoe_runtime.kernels.interface import Kernels


def load_descent(kernels: Kernels) -> DescentKernels:
    """Return the compiled descent for the instruction set of `kernels`, or the reference if they are not compiled."""
    if kernels.compiled_isa is None:
        return ReferenceDescent()
    from dymoe_compile.quantize.descent_native import NativeDescent  # imports the compiled extension

    return NativeDescent(kernels.compiled_isa)
