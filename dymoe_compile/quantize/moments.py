"""Second moments of the inputs of a matrix, which weight the errors of its quantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Ridge on H relative to its mean diagonal: RIDGE_PER_SAMPLE * columns / samples, but at least MIN_RIDGE.
RIDGE_PER_SAMPLE = 1.4
MIN_RIDGE = 0.01
# Strips of a symmetric product: more strips save more work, but make narrower products.
GRAM_STRIPS = 8


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs x of a matrix: `hessian` [cols, cols] is the weighted sum of x x^T."""

    hessian: torch.Tensor
    samples: int

    @property
    def enough(self) -> bool:
        """Return whether there are at least as many samples as columns; with fewer, H says little about other texts."""
        return self.samples >= len(self.hessian)

    def ridged(self) -> torch.Tensor:
        """Return H scaled to a mean diagonal of 1, plus a ridge that shrinks as samples grow."""
        mean = self.hessian.diagonal().mean().clamp_min(1e-30)
        ridge = max(MIN_RIDGE, RIDGE_PER_SAMPLE * len(self.hessian) / self.samples)
        scaled = self.hessian / mean
        scaled.diagonal().add_(ridge)
        return scaled


def moments(x: torch.Tensor, weights: torch.Tensor) -> Moments:
    """Return the second moments of the inputs x [n, cols] of a matrix, weighted by their routing weights [n, 1].

    The squared error of an output counts by its squared routing weight. But weighting by the weight itself lets more
    samples contribute, and measures better on other texts (3 to 6% less KL on the reference model).
    """
    weighted = x * weights.sqrt()
    return Moments(_gram(weighted), len(x))


def _gram(x: torch.Tensor) -> torch.Tensor:
    """Return x.T @ x; the upper half is copied from the lower one by symmetry."""
    cols = x.shape[1]
    out = torch.empty(cols, cols)
    step = max(-(-cols // GRAM_STRIPS), 1)
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        torch.matmul(x[:, start:stop].T, x[:, :stop], out=out[start:stop, :stop])
        out[:start, start:stop] = out[start:stop, :start].T
    return out
