"""The interface of kernels: the operations of a model, whatever computes them.

All arrays are contiguous. The compiled kernels quantize activations to int8 in blocks of 64 columns. A block in which
a value is not finite gives NaN. `segments` are the leading segments of one record of `layout`: uint8 arrays, each at
least as long as the segment's payload. Segments that `tier` does not need may be left out. Arguments that do not fit
raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.kernels.kv_cache import KVCache
from dymoe_runtime.kernels.prepared import DecodeWeights, DeltaArrays, DeltaWeights, ExpertRows, PreparedExpert
from dymoe_runtime.kernels.reads import PendingReads, ReadThreads
from dymoe_runtime.memory import Place
from dymoe_runtime.spec import GatedDeltaSpec, RouterSpec

Segments = Sequence[np.ndarray]


class ExpertTable(Protocol):
    """The resident experts, where a `LayerStack` finds them, and the rule by which it chooses their tiers."""

    def put(self, layer: int, expert: int, tier: int, views: Any, /) -> None:
        """Add an expert that is resident up to `tier`; `views` as in `PreparedExpert`."""

    def remove(self, layer: int, expert: int, tier: int, /) -> None:
        """Remove an expert at a tier, before its segments leave or move."""

    def set_rule(self, layer: int, thresholds: Sequence[float], pinned: Sequence[int], /) -> None:
        """Set the thresholds that choose tiers in `layer` from now on; `pinned` experts get the highest tier."""


# The index of a token in its sequence, and for each rotation of a stack the addresses of its cosines and sines there.
Position = tuple[int, Sequence[tuple[int, int]]]

# Result of `LayerStack.run`: layer reached, whether its attention has run, how many experts its router chose for each
# token, and (layer, experts, tiers) of each token in each layer whose experts have run.
Reached = tuple[int, bool, int, list[tuple[int, list[int], list[int]]]]


class LayerStack(Protocol):
    """Layers that compiled code runs decoded tokens through, one token T of each of some sequences.

    `run` writes to arrays that its next call overwrites: `residual` [T, H], the residual streams at the layer reached;
    `h` [T, H], their norms for the experts of that layer; `experts` and `weights` [T, k], the choice of that layer's
    router. `set_states` replaces these arrays if the number of sequences changes. The arrays that `guess` returns are
    valid until its next call.
    """

    residual: np.ndarray
    h: np.ndarray
    experts: np.ndarray
    weights: np.ndarray

    def knows(self, layer: int, /) -> bool:
        """Return whether this stack runs `layer` and the layer has a router."""

    def set_states(self, sequences: Sequence[Sequence[KVCache | DeltaArrays | None]], /) -> None:
        """Set the states of the sequences to decode. Each has one for each layer: a KV cache or a delta rule's arrays.

        An entry is None for a layer that this stack does not run.
        """

    def run(
        self,
        table: Any,
        first: int,
        x: np.ndarray,
        more: np.ndarray | None,
        positions: Sequence[Position],
        /,
    ) -> Reached:
        """Run one token of each sequence from layer `first` on, up to a layer that is not in this stack.

        It stops earlier where a layer has to wait for experts. x [T, H] are the residual streams that enter layer
        `first`. If `more` [T, H] is given, it is the output of the experts of layer first - 1, and x are the residual
        streams before them: that layer is finished first, as `Decoder.finish` does. `first` may be the number of layers
        then. `positions` are the tokens' indices in their sequences, each with the addresses of cosines and sines for
        each of the stack's rotations. The run stops after mixer and router of a layer whose experts are not all
        resident in `table`. `table` is an `ExpertTable` of the same kernels; without it, no expert counts as resident.
        A token's results do not depend on the other tokens.
        """

    def set_guesser(self, layer: int, router: np.ndarray, bias: np.ndarray, /) -> None:
        """Let `guess` ask `router` [experts, H] with `bias` [experts], both float32, instead of the layer's router."""

    def guess(self, layer: int, x: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        """Return the experts and routing weights [1, top_k] that `layer` would choose for a residual stream [1, H]."""


class Kernels(Protocol):
    """The operations of a model, and the properties of one implementation of them."""

    name: str  # amx, avx512vbmi, avx512, avxvnni, avx2, i8mm, neon, scalar or numpy
    compiled_isa: str | None  # instruction set of the compiled extension; None for other implementations
    batch_invariant: bool  # whether a token's results do not depend on the other tokens of a call
    reserve_bytes: int  # memory that Python and the allocator may take on top of what is counted
    frees_large_blocks: bool  # whether it frees large temporaries, which the allocator should give back
    timed_at_start: bool  # whether timing a few calls is quick enough to do before each run
    notice: str | None  # what to tell the user about this choice, if anything
    reads: Callable[[int], ReadThreads] | None  # starts that many compiled threads that read files

    # Threads

    def threads(self) -> int:
        """Return how many threads an operation may use."""

    def set_threads(self, count: int, /) -> None:
        """Let operations use `count` threads; results do not depend on their number."""

    def pin_threads(self) -> bool:
        """Pin each worker thread to a processor of its own; return False if that is not possible."""

    # Routed experts

    def prepare(self, layout: RecordLayout, tier: int, segments: Segments, /) -> PreparedExpert:
        """Check the segments and return an expert for `moe`.

        The expert refers to `segments`, whose memory must stay in place. Raises ValueError if they do not fit.
        """

    def prepare_at(self, layout: RecordLayout, tier: int, places: Sequence[Place], /) -> PreparedExpert:
        """Return an expert as `prepare` does, from the place of each segment: its address and bytes.

        The caller keeps the memory alive and in place.
        """

    def moe(
        self, parts: Sequence[ExpertRows], x: np.ndarray, tokens: np.ndarray, y: np.ndarray, activation: str
    ) -> None:
        """Run the rows i of each part through its expert: y[i] = ffn(x[tokens[i]]).

        x is float32 [T, H], tokens int64 [N], y float32 [N, H]. Rows of y that belong to no part keep their values.
        ffn(x) is (act(x @ gate.T) * (x @ up.T)) @ down.T, with the act of ACTIVATIONS that `activation` names, or the
        one of `clamped_swiglu`. If the record has biases, they are added after each product.
        With `batch_invariant` kernels, a row does not depend on the other rows.
        """

    def moe_token(
        self,
        experts: Sequence[PreparedExpert],
        x: np.ndarray,
        weights: np.ndarray,
        activation: str,
        pending: PendingReads | None = None,
    ) -> np.ndarray:
        """Return the weighted sum of the experts' outputs for one token, [1, H].

        x is [1, H]; the routing weights are [1, k], one for each expert. The result equals `moe` and then `combine`.
        A pending expert runs as soon as its read has ended. The caller checks whether the read succeeded.
        """

    def combine(self, y: np.ndarray, rows: np.ndarray, weights: np.ndarray, /) -> np.ndarray:
        """Return the sum over j of weights[t, j] * y[rows[t, j]] for each token t, [T, H].

        y is [N, H], rows int64 [T, k], weights [T, k]. Terms are added in the order of j. Rows must be below N; a
        negative row is left out.
        """

    # The rest of a layer

    def matmul(self, x: np.ndarray, weight: np.ndarray, /) -> np.ndarray:
        """Return x @ weight.T, [T, rows], for a weight [rows, cols] that is not quantized.

        The weight is float32, or uint16 that holds bf16.
        """

    def activate(self, gate: np.ndarray, up: np.ndarray, activation: str, /) -> np.ndarray:
        """Return act(gate) * up, or what `clamped_swiglu` says; gate, up and the result are [T, n]."""

    def route(
        self,
        logits: np.ndarray,
        router: RouterSpec,
        select: np.ndarray | None = None,
        scale: np.ndarray | None = None,
        /,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose experts by a router's logits [T, experts], which include its bias, as `RouterSpec` says.

        `select` and `scale`, float32 [experts], are its tensors `router_select` and `router_scale`.

        Returns (experts, weights), int64 and float32 [T, k], highest weight first. Of equal weights, the expert that
        was chosen first comes first; of equal scores, the expert with the lower number is chosen first. A token whose
        logits are not finite gets the first experts, with NaN weights.
        """

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float, /) -> np.ndarray:
        """Return weight * x / sqrt(mean(x ** 2) + eps) over the last dimension (RMSNorm, arXiv 1910.07467).

        x is [..., n], weight [n].
        """

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float, /) -> np.ndarray:
        """Return weight * (x - mean(x)) / sqrt(variance(x) + eps) + bias over the last dimension (arXiv 1607.06450).

        x is [..., n], weight and bias [n].
        """

    def rotate(self, x: np.ndarray, cosines: np.ndarray, sines: np.ndarray, /) -> np.ndarray:
        """Apply the rotary embedding (arXiv 2104.09864) to x [T, heads, d] in place, and return x.

        cosines and sines are [T, n]: one row for the position of each token. The first n columns of a head turn.
        """

    def attend(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        cache: KVCache,
        start: int,
        window: int | None = None,
        weigh: bool = False,
        sinks: np.ndarray | None = None,
        chunk: int | None = None,
        pause: Callable[[], None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Append k and v [kv_heads, T, d] to `cache` at position `start`, then attend causally with q [heads, T, d].

        A token attends to itself and all earlier positions, or with `window` to the last `window` positions, itself
        included. With `chunk`, it attends only to positions p of its own chunk, which have the same p // chunk.
        `sinks`, float32 [heads], are scores that take part in each softmax, but have no value. `pause`, if given, may
        be called between heads.

        Returns (outputs [heads, T, d], received [T]). `received` is the attention that each token of the call gets
        from the last HEAVY_HITTER_QUERIES tokens of the call, summed over heads. It is None without `weigh`.
        """

    def gated_delta(
        self, spec: GatedDeltaSpec, mixed: np.ndarray, rates: np.ndarray, weights: DeltaWeights, state: DeltaArrays, /
    ) -> np.ndarray:
        """Run T tokens through the convolution and the gated delta rule, and update `state`.

        mixed float32 [T, channels] has queries, keys and values; rates [T, 2 * value_heads] has b, then a, of each head
        of values. A channel's convolution with its `taps` last values is followed by silu. Queries and keys are divided
        by their length, sqrt(sum of squares + 1e-6); queries are divided by sqrt(key_dim). Then for each token, with
        S [key_dim, value_dim] the state of a head, k, q, v its key, query and value:

            S = S * exp(-exp(a_log) * softplus(a + dt_bias))
            S = S + outer(k, sigmoid(b) * (v - k @ S))
            y = q @ S

        Returns y of all heads, float32 [T, values]. A token's result does not depend on how the tokens are divided
        into calls, but for rounding.
        """

    def linear(self, layout: RecordLayout, tier: int, segments: Segments, x: np.ndarray, /) -> np.ndarray:
        """Return x @ weight.T for the quantized matrix "weight" of a record; x [T, cols] -> [T, rows]."""

    def embed(self, layout: RecordLayout, tier: int, segments: Segments, ids: np.ndarray, /) -> np.ndarray:
        """Return the rows `ids`, int64 [N], of the quantized matrix "weight" of a record: float32 [N, cols]."""

    def dequantize(self, layout: RecordLayout, tier: int, segments: Segments, name: str, /) -> np.ndarray:
        """Return the quantized matrix `name` of a record as float32 [rows, cols]."""

    # One decoded token through whole layers

    def decode_stack(self, layers: Sequence[DecodeWeights | None], activation: str, /) -> LayerStack | None:
        """Return a stack that runs one token through `layers`, or None if these kernels have none.

        An entry of `layers` is None for a layer that the stack cannot run; `LayerStack.run` stops before it. The
        weights must outlive the stack. `rotation` of a layer is an index into the addresses of a `Position`.
        """

    def resident_table(self, layers: int, experts: int, ladder: Sequence[int], /) -> ExpertTable | None:
        """Return an empty table in which a stack finds resident experts, or None if these kernels have no stack."""

    # Memory

    def attention_bytes(self, heads: int, kv_heads: int, head_dim: int, tokens: int, context: int, /) -> int:
        """Return the most bytes that `attend` allocates in addition to its arguments and results."""

    def product_bytes(self) -> int:
        """Return the most bytes that a matrix product allocates in addition to its arguments and results."""

    def kept_bytes(self, tokens: int, expert_width: int, widest: int, /) -> int:
        """Return the bytes that stay allocated after a prefill pass of `tokens`.

        They hold quantized tokens of at most `widest` columns, and the experts' hidden activations.
        """


def ffn(
    kernels: Kernels, layout: RecordLayout, tier: int, segments: Segments, x: np.ndarray, activation: str
) -> np.ndarray:
    """Return one expert's output for all tokens; x [T, H] -> [T, H]."""
    y = np.empty(x.shape, np.float32)
    kernels.moe([ExpertRows(kernels.prepare(layout, tier, segments), 0, len(x))], x, np.arange(len(x)), y, activation)
    return y
