"""Products with records of nested tiers, on the best instruction set of this processor.

`segments` are the leading segments of one record of `layout`, uint8 arrays of at least the
payload's size; only those that `tier` needs must be given. All arrays are contiguous. The
compiled kernels quantize activations to int8 in blocks of 64 columns; a block that is not
finite gives NaN. Arguments that do not fit raise ValueError.

`fit` and `descend` are the compiler's and work on tensors of torch; nothing else here imports
it unless the reference is used.

DYMOE_ISA=name in the environment forces an instruction set, `torch` the reference.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from dymoe_runtime.device import default_threads
from dymoe_runtime.errors import DymoeError, importing
from dymoe_runtime.kernels.job import Coming, Expert, Job
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.memory import Place
from dymoe_runtime.tiers import RecordLayout

if TYPE_CHECKING:
    import torch

    from dymoe_runtime.kernels.descent import Descent, Grid

REFERENCE = "torch"
missing_reason: str | None = None
try:
    from dymoe_runtime.kernels import native
except ImportError:
    native = None  # type: ignore[assignment]
    missing_reason = (
        "compiled kernels are missing, running the slower torch reference; install a C++ compiler and reinstall dymoe"
    )

Segments = Sequence[np.ndarray]


class Kernels(Protocol):
    """What the reference and the compiled kernels of each instruction set provide."""

    isa: str

    def prepare(self, layout: RecordLayout, tier: int, segments: Segments, /) -> Expert: ...
    def prepare_at(self, layout: RecordLayout, tier: int, places: Sequence[Place], /) -> Expert: ...
    def moe(
        self,
        jobs: Sequence[Job],
        x: np.ndarray,
        tokens: np.ndarray,
        y: np.ndarray,
        activation: str = ...,
    ) -> None: ...
    def moe_token(
        self,
        experts: Sequence[Expert],
        x: np.ndarray,
        gates: np.ndarray,
        activation: str = ...,
        coming: Coming | None = ...,
    ) -> np.ndarray: ...
    def combine(self, y: np.ndarray, rows: np.ndarray, gates: np.ndarray, /) -> np.ndarray: ...
    def matmul(self, x: np.ndarray, weight: np.ndarray, /) -> np.ndarray: ...
    def activate(self, gate: np.ndarray, up: np.ndarray, activation: str, /) -> np.ndarray: ...
    def choose(self, logits: np.ndarray, top_k: int, norm_topk: bool, /) -> tuple[np.ndarray, np.ndarray]: ...
    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float, /) -> np.ndarray: ...
    def rotate(self, x: np.ndarray, cosines: np.ndarray, sines: np.ndarray, /) -> np.ndarray: ...
    def attend(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        cache: KVCache,
        layer: int,
        window: int | None = ...,
        weigh: bool = ...,
    ) -> tuple[np.ndarray, np.ndarray | None]: ...
    def linear(self, layout: RecordLayout, tier: int, segments: Segments, x: np.ndarray) -> np.ndarray: ...
    def embed(self, layout: RecordLayout, tier: int, segments: Segments, ids: np.ndarray) -> np.ndarray: ...
    def dequantize(self, layout: RecordLayout, tier: int, segments: Segments, name: str) -> np.ndarray: ...
    def fit(self, weight: torch.Tensor, grid: Grid, /) -> tuple[torch.Tensor, torch.Tensor]: ...
    def descend(self, block: Descent, /) -> None: ...
    def threads(self) -> int: ...
    def set_threads(self, count: int, /) -> None: ...


def prepare(layout: RecordLayout, tier: int, segments: Segments) -> Expert:
    """An expert for `moe`, checked; it holds the segments, which must stay where they are."""
    return _active().prepare(layout, tier, segments)


def prepare_at(layout: RecordLayout, tier: int, places: Sequence[Place]) -> Expert:
    """The same for segments by their places, where they must stay."""
    return _active().prepare_at(layout, tier, places)


def moe(
    jobs: Sequence[Job],
    x: np.ndarray,
    tokens: np.ndarray,
    y: np.ndarray,
    activation: str = "silu",
) -> None:
    """The experts of a layer: y[i] = ffn(x[tokens[i]]) for the rows i of each job.

    x [T, H], tokens int64 [N], y [N, H]; rows of no job keep what they are. ffn(x) is
    (act(x @ gate.T) * (x @ up.T)) @ down.T, act one of silu, gelu and gelu_pytorch_tanh.
    A row does not depend on the others of the call.
    """
    _active().moe(jobs, x, tokens, y, activation)


def ffn(layout: RecordLayout, tier: int, segments: Segments, x: np.ndarray, activation: str = "silu") -> np.ndarray:
    """One expert for all tokens, x [T, H] -> [T, H]."""
    y = np.empty(x.shape, np.float32)
    moe([Job(prepare(layout, tier, segments), 0, len(x))], x, np.arange(len(x)), y, activation)
    return y


def moe_token(
    experts: Sequence[Expert], x: np.ndarray, gates: np.ndarray, activation: str = "silu", coming: Coming | None = None
) -> np.ndarray:
    """What `moe` and `combine` make of one token with all of its experts; x [1, H], gates [1, k] -> [1, H].

    Of those that are `coming` each runs as soon as it is there. Whether a read failed is for the caller to see.
    """
    return _active().moe_token(experts, x, gates, activation, coming)


def combine(y: np.ndarray, rows: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """Sum over j of gates[t, j] * y[rows[t, j]] in that order, [T, H]; rows below 0 are left out.

    y [N, H], rows int64 [T, k] below N, gates [T, k].
    """
    return _active().combine(y, rows, gates)


def matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x @ weight.T of a plain weight [rows, cols], float32 or uint16 that are bf16; x [T, cols] -> [T, rows]."""
    return _active().matmul(x, weight)


def activate(gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
    """act(gate) * up, [T, n] each, act as in `moe`."""
    return _active().activate(gate, up, activation)


def choose(logits: np.ndarray, top_k: int, norm_topk: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of a router's logits [T, experts] the `top_k` highest, int64 [T, k], and their gates, by falling gate.

    A gate is the share of the softmax, with `norm_topk` divided by their sum.
    """
    return _active().choose(logits, top_k, norm_topk)


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Root mean square layer norm over the last dimension (arXiv 1910.07467); weight [n]."""
    return _active().norm(x, weight, eps)


def rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """Rotary embedding (arXiv 2104.09864) of x [T, heads, n], in place; cosines and sines [T, n] of each position."""
    return _active().rotate(x, cosines, sines)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cache: KVCache,
    layer: int,
    window: int | None = None,
    weigh: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Keep k and v [kv_heads, T, d] of the tokens after cache.length, then causal attention of q [heads, T, d].

    [heads, T, d]; and with `weigh` what each of the tokens gets from the last HEAVY_HITTER_QUERIES of them, [T].
    A token sees all before it, or the last `window` with itself. cache.length stays what it is.
    """
    return _active().attend(q, k, v, cache, layer, window, weigh)


def linear(layout: RecordLayout, tier: int, segments: Segments, x: np.ndarray) -> np.ndarray:
    """x @ weight.T, x [T, cols] -> [T, rows]."""
    return _active().linear(layout, tier, segments, x)


def embed(layout: RecordLayout, tier: int, segments: Segments, ids: np.ndarray) -> np.ndarray:
    """Rows of `weight`, ids int64 [N] -> float32 [N, cols]."""
    return _active().embed(layout, tier, segments, ids)


def dequantize(layout: RecordLayout, tier: int, segments: Segments, name: str) -> np.ndarray:
    """The matrix called `name`, float32 [rows, cols]."""
    return _active().dequantize(layout, tier, segments, name)


def fit(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [rows, cols] and scales [tiers, rows, blocks] of weight [rows, cols] to start a descent from.

    In each block, of the scales to start from, the one whose nearest codes lose least, where each
    tier's scale is fitted to the codes that it inherits; then the codes nearest at that scale.
    """
    return _active().fit(weight, grid)


def descend(block: Descent) -> None:
    """Improve the scales and the codes of a block of columns in place, and the error with them; slope is used up."""
    _active().descend(block)


def set_threads(count: int) -> None:
    """How many threads an operation may use; results do not depend on it."""
    _active().set_threads(count)


def pin_threads() -> bool:
    """Keep each worker on a processor of its own; whether that could be had."""
    return native is not None and native.pin_threads(True)


def threads() -> int:
    """As many as there are processors for this process unless set_threads was called."""
    return _active().threads()


def isa() -> str:
    """The instruction set in use: avx512, avxvnni, avx2, i8mm, neon, scalar or torch."""
    return _active().isa


def available_isas() -> list[str]:
    """Those that run on this machine, best first; the last is the reference, torch."""
    return [*(native.available_isas() if native else []), REFERENCE]


def select(name: str) -> Kernels:
    """The kernels of the instruction set `name`; DymoeError unless it is available."""
    if name not in available_isas():
        raise DymoeError(f"instruction set '{name}' is not available here, choose one of {', '.join(available_isas())}")
    if name != REFERENCE:
        return native.Native(name)
    with importing():
        from dymoe_runtime.kernels import reference  # imports torch, which nothing else here needs
    return cast(Kernels, reference)


@cache
def _active() -> Kernels:
    forced = os.environ.get("DYMOE_ISA")
    if forced and forced not in available_isas():
        raise DymoeError(f"DYMOE_ISA={forced}: expected one of {', '.join(available_isas())}")
    kernels = select(forced or available_isas()[0])
    kernels.set_threads(default_threads())
    return kernels
