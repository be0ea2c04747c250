"""Quantization to whole numbers: the descent in compiled code is that of the reference, and better than rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_kit import COMPILED, kernels_of

from dymoe_compile.export.matrices import Format, WholeNumbers, rounded, values_of
from dymoe_compile.quantize import load_descent
from dymoe_compile.quantize.descent import DescentKernels
from dymoe_compile.quantize.descent_reference import ReferenceDescent
from dymoe_compile.quantize.moments import Moments, moments
from dymoe_compile.quantize.whole import quantize_whole

FORM = Format(4, 32)


def inputs(cols: int, samples: int = 4000) -> torch.Tensor:
    """Correlated inputs of a matrix."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(samples, cols, generator=g) @ (
        torch.eye(cols) + 0.5 * torch.randn(cols, cols, generator=g) / cols**0.5
    )


def weight_of(rows: int, cols: int) -> torch.Tensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(2))
    weight[1] = 0
    weight[2, :32] = 0
    return weight


def seen(cols: int) -> tuple[torch.Tensor, Moments]:
    x = inputs(cols)
    return x, moments(x, torch.ones(len(x), 1))


def quantized(weight: torch.Tensor, descent: DescentKernels, known: Moments | None) -> np.ndarray:
    codes, scales = quantize_whole(weight, FORM.bits, FORM.block, descent, known)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 16 and torch.isfinite(scales).all()
    return values_of(WholeNumbers(codes.numpy(), scales.numpy()), FORM)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("cols", [40, 64, 300])
@pytest.mark.parametrize("isa", COMPILED)
def test_compiled_code_chooses_what_the_reference_does(isa: str, cols: int, calibrated: bool) -> None:
    weight, (x, known) = weight_of(19, cols), seen(cols)
    results = [
        quantized(weight, descent, known if calibrated else None)
        for descent in (ReferenceDescent(), load_descent(kernels_of(isa)))
    ]
    # Rounding decides between codes that are as good.
    assert (np.abs(results[0] - results[1]) > 1e-4).mean() < 0.02
    losses = [np.square((result - weight.numpy()) @ x.T.numpy()).sum() for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("cols", [64, 300])
def test_the_output_is_nearer_than_by_rounding(cols: int) -> None:
    weight, (x, known) = weight_of(24, cols), seen(cols)
    ours = quantized(weight, load_descent(kernels_of(COMPILED[0])), known)
    plain = values_of(rounded(weight.numpy(), FORM), FORM)
    losses = [np.square((result - weight.numpy()) @ x.T.numpy()).sum() for result in (ours, plain)]
    assert losses[0] < 0.6 * losses[1]
    assert not ours[1].any() and not ours[2, :32].any()


def test_both_ends_of_the_numbers_are_used() -> None:
    """A block whose largest weight is positive has a negative scale, so that it reaches -8, too."""
    weight = torch.linspace(-1, 1, 32).repeat(2, 1)
    weight[0, -1], weight[1, 0] = 1.2, -1.2
    codes, scales = quantize_whole(weight, 4, 32, ReferenceDescent())
    assert (scales[0] < 0).all() and (scales[1] > 0).all()
    assert codes[0, -1] == 0 and codes[1, 0] == 0
