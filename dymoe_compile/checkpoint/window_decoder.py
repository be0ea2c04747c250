"""Decoders as the compiler runs them: over whole windows, with attention by torch."""

from __future__ import annotations

from dymoe_compile.checkpoint.torch_ops import attend_whole
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.mixer import Dense
from dymoe_runtime.model.routing import Experts, NoExperts
from dymoe_runtime.model.weights import BundleDense
from dymoe_runtime.spec import ModelSpec


def window_decoder(spec: ModelSpec, dense: Dense, kernels: Kernels, experts: Experts | None = None) -> Decoder:
    """Return a decoder over `dense`; without `experts` the caller runs them between its other parts."""
    return Decoder(spec, dense, experts or NoExperts(), kernels, whole=attend_whole)


def bundle_decoder(bundle: Bundle, kernels: Kernels) -> Decoder:
    """Return a decoder over the dense weights of a bundle, whose experts the caller runs."""
    return window_decoder(bundle.spec, BundleDense(bundle, kernels), kernels)
