"""The compiled kernels of one instruction set: `interface.Kernels`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy as np

import dymoe_runtime.kernels._native as _native
from dymoe_runtime.bundle.tiers import MatrixLayout, Part, RecordLayout
from dymoe_runtime.kernels.interface import Position, Reached
from dymoe_runtime.kernels.kv_cache import HEAVY_HITTER_QUERIES, KVCache, row_bytes
from dymoe_runtime.kernels.prepared import (
    DecodeWeights,
    DeltaArrays,
    DeltaWeights,
    ExpertRows,
    LinearWeights,
    PreparedExpert,
)
from dymoe_runtime.kernels.reads import PendingReads
from dymoe_runtime.memory import Place, address_of
from dymoe_runtime.spec import AttentionSpec, GatedDeltaSpec, MixerSpec, MoeSpec, RouterSpec


def available() -> list[str]:
    """Return the instruction sets that were compiled and run on this machine, best first."""
    return _native.available_isas()


def load(name: str, notice: str | None = None) -> NativeKernels:
    """Return the kernels of the instruction set `name`."""
    return NativeKernels(name)


# Multiplications of attention between two pauses.
ATTENDED_AT_ONCE = 1 << 28


class NativeKernels:
    """`Kernels` of one instruction set. Activations are quantized to int8 in blocks of 64 columns."""

    batch_invariant = True
    reserve_bytes = 24 << 20
    frees_large_blocks = False
    timed_at_start = True
    notice: str | None = None
    reads: Callable[[int], _native.ReadThreads] | None = _native.ReadThreads

    def __init__(self, name: str) -> None:
        self.name = name
        self.compiled_isa: str | None = name
        self._plans: WeakKeyDictionary[RecordLayout, _native.Plan] = WeakKeyDictionary()

    def threads(self) -> int:
        return _native.threads()

    def set_threads(self, count: int) -> None:
        _native.set_threads(count)

    def pin_threads(self) -> bool:
        return _native.pin_threads(True)

    def prepare(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray]) -> PreparedExpert:
        return PreparedExpert(layout, tier, segments, self._plan(layout).expert(tier, _segments(segments)))

    def prepare_at(self, layout: RecordLayout, tier: int, places: Sequence[Place]) -> PreparedExpert:
        return PreparedExpert(layout, tier, (), self._plan(layout).expert(tier, places))

    def moe(
        self, parts: Sequence[ExpertRows], x: np.ndarray, tokens: np.ndarray, y: np.ndarray, activation: str
    ) -> None:
        rows = [(expert.views, first, count) for expert, first, count in parts]
        where = _vector(tokens, np.int64, "tokens")
        _native.moe(self.name, rows, _matrix(x, "x"), where, _matrix(y, "y"), activation)

    def moe_token(
        self,
        experts: Sequence[PreparedExpert],
        x: np.ndarray,
        weights: np.ndarray,
        activation: str,
        pending: PendingReads | None = None,
    ) -> np.ndarray:
        out = np.empty(x.shape, np.float32)
        views = [expert.views for expert in experts]
        where = _matrix(x, "x"), _matrix(weights, "weights"), _matrix(out, "out")
        if pending is None:
            _native.moe_token(self.name, views, *where, activation)
        elif isinstance(pending.reads, _native.ReadThreads):
            pending.wait_s += _native.moe_token(self.name, views, *where, activation, pending.reads, pending.tickets)
        else:
            pending.wait()
            _native.moe_token(self.name, views, *where, activation)
        return out

    def combine(self, y: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        _check(rows, np.int64, 2, "rows")
        out = np.empty((len(rows), y.shape[1]), np.float32)
        where = address_of(rows), *rows.shape
        _native.combine(_matrix(y, "y"), _matrix(weights, "weights"), where, _matrix(out, "out"))
        return out

    def matmul(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        is_bf16 = weight.dtype == np.uint16
        _check(weight, np.uint16 if is_bf16 else np.float32, 2, "weight")
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(f"x: expected {weight.shape[1]} columns, got {x.shape[-1]}")
        y = np.empty((len(x), len(weight)), np.float32)
        _native.matmul(self.name, _matrix(x, "x"), address_of(weight), is_bf16, _matrix(y, "y"))
        return y

    def activate(self, gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
        if gate.shape != up.shape:
            raise ValueError(f"up: expected {list(gate.shape)}, got {list(up.shape)}")
        hidden = gate.copy()
        _native.activate(self.name, _matrix(hidden, "gate"), _address(up), activation)
        return hidden

    def route(
        self,
        logits: np.ndarray,
        router: RouterSpec,
        select: np.ndarray | None = None,
        scale: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        added, factors = _vector_or_0(select, router.experts, "select"), _vector_or_0(scale, router.experts, "scale")
        experts = np.empty((len(logits), router.top_k), np.int64)
        weights = np.empty((len(logits), router.top_k), np.float32)
        used_up = logits.copy()
        where = address_of(experts), _matrix(weights, "weights")
        _native.route(self.name, _matrix(used_up, "logits"), router, added, factors, *where)
        return experts, weights

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])
        out = np.empty(rows.shape, np.float32)
        factors = _floats(weight, x.shape[-1], "weight")
        _native.norm(self.name, _matrix(rows, "x"), factors, eps, _matrix(out, "out"))
        return out.reshape(x.shape)

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])
        out = np.empty(rows.shape, np.float32)
        vectors = _floats(weight, x.shape[-1], "weight"), _vector_or_0(bias, x.shape[-1], "bias")
        _native.layer_norm(self.name, _matrix(rows, "x"), *vectors, eps, _matrix(out, "out"))
        return out.reshape(x.shape)

    def rotate(self, x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
        _check(x, np.float32, 3, "x")
        tokens, heads, n = x.shape
        if sines.shape != cosines.shape:
            raise ValueError(f"tables: expected one shape, got {list(cosines.shape)} and {list(sines.shape)}")
        _native.rotate((address_of(x), tokens, heads * n), n, _matrix(cosines, "cosines"), _address(sines))
        return x

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
        heads, tokens, head_dim = q.shape
        kv_heads = cache.rows.shape[1]
        if row_bytes(head_dim, cache.bits) != cache.rows.shape[-1] or k.shape != (kv_heads, tokens, head_dim):
            raise ValueError(f"k: {list(k.shape)} does not fit q, {list(q.shape)}, and the cache")
        if v.shape != k.shape:
            raise ValueError(f"v: expected {list(k.shape)}, got {list(v.shape)}")
        if heads % kv_heads:
            raise ValueError(f"q: the shapes do not fit, {heads} heads and {kv_heads} of keys")
        group, last = heads // kv_heads, min(tokens, HEAVY_HITTER_QUERIES) if weigh else 0
        sight = (start, window or 0, chunk or 0)
        _vector_or_0(sinks, heads, "sinks")
        if pause is None:
            at_once = kv_heads
        else:
            at_once = max(1, ATTENDED_AT_ONCE // max(1, 2 * tokens * (start + tokens) * head_dim * group))
        outs, masses = list[np.ndarray](), list[np.ndarray]()
        for first in range(0, kv_heads, at_once):
            own, mine = slice(first, first + at_once), slice(first * group, (first + at_once) * group)
            rows = [np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (q[mine], k[own], v[own])]
            for x in rows:
                _check(x, np.float32, 3, "q, k, v")
            shape = (tokens, rows[0].shape[1], rows[1].shape[1], head_dim)
            outs.append(np.empty(rows[0].shape, np.float32))
            masses.append(np.empty((_native.receiving_parts(self.name, shape, last), tokens), np.float32))
            some = None if sinks is None else sinks[mine]
            vectors = [*(address_of(x) for x in (*rows, outs[-1])), _vector_or_0(some, shape[1], "sinks")]
            received = _matrix(masses[-1], "received")
            _native.attend_prompt(self.name, shape, sight, last, vectors, cache.address_from(first), received)
            if pause is not None:
                pause()
        mass = np.concatenate(masses).sum(0) if weigh else None
        return np.concatenate(outs, axis=1).transpose(1, 0, 2) if len(outs) > 1 else outs[0].transpose(1, 0, 2), mass

    def gated_delta(
        self, spec: GatedDeltaSpec, mixed: np.ndarray, rates: np.ndarray, weights: DeltaWeights, state: DeltaArrays
    ) -> np.ndarray:
        shapes = (
            (weights.conv, (spec.channels, spec.taps)),
            (weights.a_log, (spec.value_heads,)),
            (weights.dt_bias, (spec.value_heads,)),
            (state.tail, (spec.taps - 1, spec.channels)),
            (state.memory, (spec.value_heads, spec.key_dim, spec.value_dim)),
        )
        for array, shape in shapes:
            if array.shape != shape:
                raise ValueError(f"gated_delta: expected {list(shape)}, got {list(array.shape)}")
        y = np.empty((len(mixed), spec.values), np.float32)
        vectors = [_address(array) for array, _ in shapes]
        _native.gated_delta(self.name, spec, _matrix(mixed, "mixed"), _matrix(rates, "rates"), vectors, _matrix(y, "y"))
        return y

    def linear(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
        rows = _matrix(x, "x")
        y = np.empty((x.shape[0], layout.matrices["weight"].rows), np.float32)
        self._plan(layout).linear(self.name, tier, _segments(segments), rows, _matrix(y, "y"))
        return y

    def embed(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], ids: np.ndarray) -> np.ndarray:
        wanted = _vector(ids, np.int64, "ids")
        y = np.empty((ids.shape[0], layout.matrices["weight"].cols), np.float32)
        self._plan(layout).embed(self.name, tier, _segments(segments), wanted, _matrix(y, "y"))
        return y

    def dequantize(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], name: str) -> np.ndarray:
        where = layout.matrices[name]
        y = np.empty((where.rows, where.cols), np.float32)
        self._plan(layout).dequantize(self.name, tier, _segments(segments), name, _matrix(y, "y"))
        return y

    def decode_stack(self, layers: Sequence[DecodeWeights | None], activation: str) -> NativeStack:
        known = [None if layer is None else self._decode_layer(layer) for layer in layers]
        stack = _native.DecodeStack(self.name, known, activation)
        return NativeStack(stack, layers)

    def resident_table(self, layers: int, experts: int, ladder: Sequence[int]) -> _native.ResidentTable:
        return _native.ResidentTable(layers, experts, ladder)

    def attention_bytes(self, heads: int, kv_heads: int, head_dim: int, tokens: int, context: int) -> int:
        """Return the bytes of one decoded token's scores, and of the received attention of a prompt.

        The last HEAVY_HITTER_QUERIES tokens of a prompt are computed in tiles of at least 8 rows. Each tile has its
        own float32 [tokens] of received attention. A head has one score more, for its sink.
        """
        return 4 * (heads * (context + 1 + HEAVY_HITTER_QUERIES // 8 * tokens) + kv_heads * tokens)

    def product_bytes(self) -> int:
        return 0

    def kept_bytes(self, tokens: int, expert_width: int, widest: int) -> int:
        """Return the bytes of the experts' hidden activations and of the quantized tokens.

        There are two float32 arrays of hidden activations, for gate and up. There are two buffers of int8 tokens, for
        `moe` and `linear`; some kernels keep them in two orders, each padded to 256 columns. A block of 64 columns has
        at most eleven float32 scales and sums, padded to 16 blocks. The scratch memory of threads is a part of
        `reserve_bytes`, and so are the places of at most 30 tokens by which the second order may be padded with AMX.
        """
        quantized = 2 * -(-widest // 256) * 256 + 11 * 4 * -(-widest // 1024) * 16
        return tokens * (2 * 4 * expert_width + 2 * quantized)

    def _plan(self, layout: RecordLayout) -> _native.Plan:
        """Return the layout as the compiled kernels know it; each layout is checked only once."""
        plan = self._plans.get(layout)
        if plan is None:
            vectors = [(name, _part(part)) for name, part in layout.vectors.items()]
            plan = _native.Plan.make([_layout(name, where) for name, where in layout.matrices.items()], vectors)
            self._plans[layout] = plan
        return plan

    def _decode_layer(self, layer: DecodeWeights) -> _native.DecodeLayer:
        """Return the checked weights of a layer; raise ValueError if they do not fit its specification."""
        return _native.DecodeLayer.make(
            self.name,
            layer.hidden,
            (layer.norm, layer.eps),
            layer.layer,
            (layer.rotation, _turning(layer.layer.mixer)),
            {name: _rows_and_columns(tensor) for name, tensor in layer.plain.items()},
            {name: self._linear(name, weights) for name, weights in layer.quantized.items()},
        )

    def _linear(self, name: str, weights: LinearWeights) -> _native._Linear:
        layout, data, bias = weights
        rows = layout.matrices["weight"].rows
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"{name}_bias: expected [{rows}], got {list(bias.shape)}")
        return self._plan(layout), layout.ladder[0], _segments([data]), 0 if bias is None else _address(bias)


class NativeStack:
    """`LayerStack` of the compiled kernels."""

    def __init__(self, stack: _native.DecodeStack, layers: Sequence[DecodeWeights | None]) -> None:
        """Keep a reference to `layers`, because `stack` points to their arrays."""
        self._stack, self._layers = stack, layers
        known = [layer for layer in layers if layer is not None]
        self._hidden, top_k = known[0].hidden, max(1, *(_top_k(layer) for layer in known))
        self._top_k = top_k
        self._make_buffers(1)
        self._guessed = np.empty((1, top_k), np.int64), np.empty((1, top_k), np.float32)
        self._guess_buffers = address_of(self._guessed[0]), address_of(self._guessed[1])
        self._guessers: dict[int, tuple[int, int]] = {}  # by layer, the addresses of router and bias
        self._kept: list[np.ndarray] = []  # what they point to

    def knows(self, layer: int) -> bool:
        known = self._layers[layer]
        return known is not None and _top_k(known) > 0

    def set_states(self, sequences: Sequence[Sequence[KVCache | DeltaArrays | None]]) -> None:
        if len(sequences) != len(self.residual):
            self._make_buffers(len(sequences))
        self._stack.set_states([[_state(state) for state in states] for states in sequences])

    def run(
        self,
        table: _native.ResidentTable | None,
        first: int,
        x: np.ndarray,
        more: np.ndarray | None,
        positions: Sequence[Position],
    ) -> Reached:
        address = self._residual if x is self.residual else self._tokens(x, "x")
        experts = 0 if more is None else self._tokens(more, "more")
        return self._stack.run(table, first, address, experts, positions, self._buffers)

    def set_guesser(self, layer: int, router: np.ndarray, bias: np.ndarray) -> None:
        self._kept += router, bias
        self._guessers[layer] = _address(router), _address(bias)

    def guess(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        address = self._residual if x is self.residual else _address(x)
        router, bias = self._guessers.get(layer, (0, 0))
        self._stack.route(layer, address, *self._guess_buffers, router, bias)
        return self._guessed

    def _make_buffers(self, tokens: int) -> None:
        """Make the arrays that `run` writes; they are kept, because making them takes as long as a small norm."""
        self.residual, self.h = (np.empty((tokens, self._hidden), np.float32) for _ in range(2))
        self.experts = np.empty((tokens, self._top_k), np.int64)
        self.weights = np.empty((tokens, self._top_k), np.float32)
        self._residual = address_of(self.residual)
        self._buffers = self._residual, address_of(self.h), address_of(self.experts), address_of(self.weights)

    def _tokens(self, x: np.ndarray, what: str) -> int:
        """Return the address of x [T, H]; raise ValueError if it has another shape."""
        if x.shape != self.residual.shape:
            raise ValueError(f"{what}: expected {list(self.residual.shape)}, got {list(x.shape)}")
        return _matrix(x, what)[0]


def _top_k(layer: DecodeWeights) -> int:
    """Return how many experts the router of a layer chooses; 0 if it has none."""
    part = layer.layer.feed_forward
    return part.router.top_k if isinstance(part, MoeSpec) else 0


def _turning(mixer: MixerSpec) -> int:
    """Return the leading columns of a head that a rotary embedding turns, 0 without one."""
    if not isinstance(mixer, AttentionSpec) or mixer.rope is None:
        return 0
    return mixer.head_dim if mixer.rope.kind == "proportional" else mixer.rope.dims or mixer.head_dim


def _state(state: KVCache | DeltaArrays | None) -> _native._Cache | _native._Delta | None:
    if isinstance(state, DeltaArrays):
        return (_address(state.tail), state.tail.size), (_address(state.memory), state.memory.size)
    return None if state is None else state.address


def read_memory(data: np.ndarray) -> int:
    """Read `data`, uint8 [n], with all threads and return the sum of its 64-bit words, modulo 2 ** 64.

    No kernel can read the same memory faster. Up to 127 bytes at the end are left out.
    """
    return _native.read_memory(_vector(data, np.uint8, "data"))


def _address(array: np.ndarray) -> int:
    _check(array, np.float32, array.ndim, "array")
    return address_of(array)


def _rows_and_columns(array: np.ndarray) -> tuple[int, int, int]:
    """Return (address, rows, columns) of a float32 matrix, or of a vector, which has one row."""
    rows = len(array) if array.ndim == 2 else 1
    return _address(array), rows, array.size // rows


def _vector_or_0(array: np.ndarray | None, length: int, name: str) -> int:
    """Return the address of a float32 vector of `length`, or 0 for None."""
    return 0 if array is None else _floats(array, length, name)


def _floats(array: np.ndarray, length: int, name: str) -> int:
    """Return the address of a float32 vector of `length`; raise ValueError if it is another."""
    _check(array, np.float32, 1, name)
    if array.shape != (length,):
        raise ValueError(f"{name}: expected [{length}], got {list(array.shape)}")
    return address_of(array)


def _segments(segments: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    return [_vector(segment, np.uint8, "segments") for segment in segments]


def _vector(array: np.ndarray, dtype: type, name: str) -> tuple[int, int]:
    """Return (address, length) of a vector; raise ValueError unless it is contiguous and of this dtype."""
    _check(array, dtype, 1, name)
    return address_of(array), array.size


def _matrix(array: np.ndarray, name: str) -> tuple[int, int, int]:
    """Return (address, rows, columns) of a matrix; raise ValueError unless it is contiguous float32."""
    found = _native.matrix_at(array)
    if found is None:
        _check(array, np.float32, 2, name)
        raise ValueError(f"{name}: its memory cannot be had")
    return found


def _check(array: np.ndarray, dtype: type, dims: int, name: str) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    if array.dtype == dtype and array.ndim == dims and array.flags.c_contiguous:
        return
    raise ValueError(
        f"{name}: expected a contiguous array of {np.dtype(dtype)} of {dims} dimensions, "
        f"got {array.dtype} of shape {list(array.shape)}"
    )


def _layout(name: str, where: MatrixLayout) -> _native._Layout:
    planes = [(plane.width, plane.tier, _part(plane.part)) for plane in where.planes]
    indices = [_part(part) for part in where.scale_indices]
    return name, where.rows, where.cols, list(where.ladder), planes, indices, _part(where.multiplier), where.grid


def _part(part: Part) -> tuple[int, int, int]:
    return part.segment, part.offset, part.nbytes
