"""Where the weights of an export come from: a bundle at one tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dymoe_compile.export.matrices import Format, Rows, carrier, fits, of_tier, rounded
from dymoe_runtime.bundle.bundle import DENSE, Bundle, dense_kind
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.bundle.tiers import MatrixLayout, dequantize, vector_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.weights import BundleDense
from dymoe_runtime.spec import ExpertKey, ModelSpec

# Dense matrices whose levels do not fit codes of 8 bits are rounded anew to this form.
DENSE_FORM = Format(8, 32)
# Rows of a dense matrix that are converted at a time.
ROWS_AT_ONCE = 4096


class Expert(NamedTuple):
    """One expert: its matrices gate, up and down, and its biases by name, if the model has them."""

    matrices: Mapping[str, Rows]
    vectors: Mapping[str, np.ndarray]


class Source(Protocol):
    """The weights of a model, in the formats in which they are exported. Each method may read files."""

    @property
    def spec(self) -> ModelSpec:
        """Return the specification of the model."""

    @property
    def expert_form(self) -> Format:
        """Return the format of the matrices of all experts."""

    def vector(self, name: str) -> np.ndarray:
        """Return a tensor that stays float32: a norm, a bias, a router."""

    def dense_form(self, name: str) -> Format:
        """Return the format of a dense matrix."""

    def dense(self, name: str) -> Iterator[Rows]:
        """Yield a dense matrix in its format, some rows at a time."""

    def experts(self, layer: int) -> Iterator[Expert]:
        """Yield the experts of a layer in order. Layers are asked for in order."""


class BundleSource:
    """The weights of a bundle at one tier, with their values as they are.

    Dense matrices of 8 bits are the exception: their levels are odd halves up to 127.5, and are rounded anew. With
    `rounds`, so are experts whose tier does not fit codes of 8 bits.
    """

    def __init__(self, bundle: Bundle, tier: int, kernels: Kernels, rounds: bool = False) -> None:
        """Read the dense weights; raise DymoeError if they are damaged, or the tier does not fit codes of 8 bits."""
        self.spec = bundle.spec
        self._bundle, self._tier, self._kernels = bundle, tier, kernels
        self.is_exact = fits(tier, bundle.layout.ladder[-1], self.spec.expert_grid)
        if not rounds and not self.is_exact:
            carrier(tier, bundle.layout.ladder[-1], self.spec.expert_grid)
        span = next(iter(bundle.layout.matrices.values())).span
        self.expert_form = Format(8, span) if self.is_exact else DENSE_FORM
        self._weights = BundleDense(bundle, kernels)
        self._shapes = self.spec.tensor_shapes()

    def vector(self, name: str) -> np.ndarray:
        return self._weights.vector(name)

    def dense_form(self, name: str) -> Format:
        record = self._weights.record(name)
        if record is None:
            return Format(16 if dense_kind(name, self._shapes[name]) else 32)
        layout, _ = record
        return DENSE_FORM if layout.ladder[0] == 8 else Format(8, layout.matrices["weight"].span)

    def dense(self, name: str) -> Iterator[Rows]:
        record = self._weights.record(name)
        if record is None:
            yield self._weights.vector(name)
            return
        layout, data = record
        bits, rows = layout.ladder[0], layout.matrices["weight"].rows
        if bits < 8:
            yield of_tier([data], layout.matrices["weight"], bits)
            return
        for first in range(0, rows, ROWS_AT_ONCE):
            ids = np.arange(first, min(first + ROWS_AT_ONCE, rows))
            yield rounded(self._kernels.embed(layout, bits, [data], ids), DENSE_FORM)

    def experts(self, layer: int) -> Iterator[Expert]:
        layout = self._bundle.layout
        for expert in range(self.spec.num_experts):
            segments = read_record(self._bundle, ExpertKey(layer, expert))
            matrices: dict[str, Rows] = {name: self._rows(segments, where) for name, where in layout.matrices.items()}
            yield Expert(matrices, {name: vector_of(segments, part) for name, part in layout.vectors.items()})

    def _rows(self, segments: Sequence[np.ndarray], where: MatrixLayout) -> Rows:
        if self.is_exact:
            return of_tier(segments, where, self._tier)
        return rounded(dequantize(segments, where, self._tier), DENSE_FORM)


def checked_tier(bundle: Bundle, tier: int | None) -> int:
    """Return a tier of `bundle`, by default its highest; raise DymoeError if it has no such tier."""
    ladder = bundle.layout.ladder
    if tier is not None and tier not in ladder:
        raise DymoeError(f"--tier {tier}: the tiers of this bundle are {', '.join(map(str, ladder))}; give one of them")
    return ladder[-1] if tier is None else tier


def tier_bytes(bundle: Bundle, tier: int) -> int:
    """Return the bytes of the bundle's dense weights and of its experts at a tier, or at the nearest one below it."""
    tiers = [each for each in bundle.layout.ladder if each <= tier]
    nearest = tiers[-1] if tiers else bundle.layout.ladder[0]
    return bundle.manifest.files[DENSE].nbytes + bundle.spec.total_experts * bundle.layout.prefix_bytes(nearest)
