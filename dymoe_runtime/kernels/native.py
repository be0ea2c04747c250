"""The compiled kernels of one instruction set, with the signatures of the reference."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dymoe_runtime.kernels import _native
from dymoe_runtime.kernels.job import Coming, Expert, Job
from dymoe_runtime.kv_cache import HEAVY_HITTER_QUERIES, KVCache, row_bytes
from dymoe_runtime.memory import Place, address_of
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.tiers import MatrixLayout, Part, RecordLayout

if TYPE_CHECKING:
    import torch

    from dymoe_runtime.kernels.descent import Descent, Grid

Reads = _native.Reads
available_isas = _native.available_isas
pin_threads = _native.pin_threads


class StoredDense(Protocol):
    """Dense weights as a bundle keeps them; None for what there is not."""

    def record(self, name: str) -> tuple[RecordLayout, np.ndarray] | None: ...

    def optional(self, name: str) -> np.ndarray | None: ...


class Native:
    """Activations are quantized to int8 in blocks of 64; bad arguments raise ValueError."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        self.threads = _native.threads
        self.set_threads = _native.set_threads

    def prepare(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray]) -> Expert:
        return Expert(layout, tier, segments, _plan_of(layout).expert(tier, _segments(segments)))

    def prepare_at(self, layout: RecordLayout, tier: int, places: Sequence[Place]) -> Expert:
        return Expert(layout, tier, (), _plan_of(layout).expert(tier, places))

    def moe(
        self,
        jobs: Sequence[Job],
        x: np.ndarray,
        tokens: np.ndarray,
        y: np.ndarray,
        activation: str = "silu",
    ) -> None:
        work = [(expert.views, first, rows) for expert, first, rows in jobs]
        where = _vector(tokens, np.int64, "tokens")
        _native.moe(self.isa, work, _matrix(x, "x"), where, _matrix(y, "y"), activation)

    def moe_token(
        self,
        experts: Sequence[Expert],
        x: np.ndarray,
        gates: np.ndarray,
        activation: str = "silu",
        coming: Coming | None = None,
    ) -> np.ndarray:
        out = np.empty(x.shape, np.float32)
        views = [expert.views for expert in experts]
        where = _matrix(x, "x"), _matrix(gates, "gates"), _matrix(out, "out")
        if coming is not None and isinstance(coming.reads, Reads):
            coming.wait_s += _native.moe_token(self.isa, views, *where, activation, coming.reads, coming.tickets)
            return out
        if coming is not None:
            coming.wait()
        _native.moe_token(self.isa, views, *where, activation)
        return out

    def combine(self, y: np.ndarray, rows: np.ndarray, gates: np.ndarray) -> np.ndarray:
        _check(rows, np.int64, 2, "rows")
        if rows.shape != gates.shape:
            raise ValueError(f"rows: expected {list(gates.shape)}, got {list(rows.shape)}")
        out = np.empty((len(rows), y.shape[1]), np.float32)
        _native.combine(_matrix(y, "y"), _matrix(gates, "gates"), address_of(rows), _matrix(out, "out"))
        return out

    def matmul(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        narrow = weight.dtype == np.uint16
        _check(weight, np.uint16 if narrow else np.float32, 2, "weight")
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(f"x: expected {weight.shape[1]} columns, got {x.shape[-1]}")
        y = np.empty((len(x), len(weight)), np.float32)
        _native.matmul(self.isa, _matrix(x, "x"), address_of(weight), narrow, _matrix(y, "y"))
        return y

    def activate(self, gate: np.ndarray, up: np.ndarray, activation: str) -> np.ndarray:
        if gate.shape != up.shape:
            raise ValueError(f"up: expected {list(gate.shape)}, got {list(up.shape)}")
        hidden = gate.copy()
        _native.activate(self.isa, _matrix(hidden, "gate"), _address(up), activation)
        return hidden

    def choose(self, logits: np.ndarray, top_k: int, norm_topk: bool) -> tuple[np.ndarray, np.ndarray]:
        experts = np.empty((len(logits), top_k), np.int64)
        gates = np.empty((len(logits), top_k), np.float32)
        used_up = logits.copy()
        _native.choose(self.isa, _matrix(used_up, "logits"), norm_topk, address_of(experts), _matrix(gates, "gates"))
        return experts, gates

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight: expected {list(x.shape[-1:])}, got {list(weight.shape)}")
        rows = x.reshape(-1, x.shape[-1])
        out = np.empty(rows.shape, np.float32)
        _native.norm(self.isa, _matrix(rows, "x"), _address(weight), eps, _matrix(out, "out"))
        return out.reshape(x.shape)

    def rotate(self, x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
        expected = (x.shape[0], x.shape[2])
        if cosines.shape != expected or sines.shape != expected:
            raise ValueError(f"tables: expected {list(expected)}, got {list(cosines.shape)} and {list(sines.shape)}")
        _check(x, np.float32, 3, "x")
        _native.rotate((address_of(x), len(x), x.shape[1] * x.shape[2]), _matrix(cosines, "cosines"), _address(sines))
        return x

    def attend(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        cache: KVCache,
        layer: int,
        window: int | None = None,
        weigh: bool = False,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        heads, tokens, head_dim = q.shape
        kv_heads = cache.rows.shape[2]
        if row_bytes(head_dim, cache.bits) != cache.rows.shape[-1] or k.shape != (kv_heads, tokens, head_dim):
            raise ValueError(f"k: {list(k.shape)} does not fit q, {list(q.shape)}, and the cache")
        if v.shape != k.shape:
            raise ValueError(f"v: expected {list(k.shape)}, got {list(v.shape)}")
        rows = [np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (q, k, v)]
        for x in rows:
            _check(x, np.float32, 3, "q, k, v")
        shape, last = (tokens, heads, kv_heads, head_dim), min(tokens, HEAVY_HITTER_QUERIES) if weigh else 0
        out = np.empty(rows[0].shape, np.float32)
        mass = np.empty((_native.receiving_parts(self.isa, shape, last), tokens), np.float32)
        vectors = [address_of(x) for x in (*rows, out)]
        where, received = cache.addresses[layer], _matrix(mass, "received")
        _native.attend_prompt(self.isa, shape, cache.length, window or 0, last, vectors, where, received)
        return out.transpose(1, 0, 2), mass.sum(0) if weigh else None

    def linear(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
        rows = _matrix(x, "x")
        y = np.empty((x.shape[0], layout.matrices["weight"].rows), np.float32)
        _plan_of(layout).linear(self.isa, tier, _segments(segments), rows, _matrix(y, "y"))
        return y

    def embed(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], ids: np.ndarray) -> np.ndarray:
        wanted = _vector(ids, np.int64, "ids")
        y = np.empty((ids.shape[0], layout.matrices["weight"].cols), np.float32)
        _plan_of(layout).embed(self.isa, tier, _segments(segments), wanted, _matrix(y, "y"))
        return y

    def dequantize(self, layout: RecordLayout, tier: int, segments: Sequence[np.ndarray], name: str) -> np.ndarray:
        where = layout.matrices[name]
        y = np.empty((where.rows, where.cols), np.float32)
        _plan_of(layout).dequantize(self.isa, tier, _segments(segments), name, _matrix(y, "y"))
        return y

    def fit(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        from dymoe_runtime.kernels import fitting  # imports torch

        return fitting.fit(self.isa, weight, grid)

    def descend(self, block: Descent) -> None:
        from dymoe_runtime.kernels import fitting

        fitting.descend(self.isa, block)


def read_memory(data: np.ndarray) -> int:
    """Read all of `data`, uint8 [n], with all threads: how fast this is bounds every kernel."""
    return _native.read_memory(_vector(data, np.uint8, "data"))


def row_address(x: np.ndarray) -> int:
    """Of x, float32 [1, n], as `address_of` but several times as fast."""
    return _matrix(x, "x")[0]


def decode_layer(isa: str, spec: ModelSpec, dense: StoredDense, layer: int) -> _native.DecodeLayer:
    """Points into the tensors of `dense`, which must outlive it."""

    def address(name: str) -> int:
        vector = dense.optional(f"layers.{layer}.{name}")
        return 0 if vector is None else _address(vector)

    def linear(name: str) -> tuple[_native.Plan, int, list[tuple[int, int]], int]:
        record = dense.record(f"layers.{layer}.attn.{name}")
        assert record is not None
        layout, data = record
        return _plan_of(layout), layout.ladder[0], _segments([data]), address(f"attn.{name}_bias")

    routed = layer not in spec.dense_layers
    return _native.DecodeLayer.make(
        isa,
        (spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim),
        spec.sliding_window or 0,
        (spec.num_experts, spec.top_k, spec.norm_topk) if routed else (0, 0, False),
        spec.norm_eps,
        spec.clip_qkv or 0.0,
        spec.qk_norm,
        [address(name) for name in ("attn_norm", "attn.q_norm", "attn.k_norm", "mlp_norm")],
        address("router"),
        [linear(name) for name in "qkvo"],
    )


def _address(array: np.ndarray) -> int:
    _check(array, np.float32, array.ndim, "array")
    return address_of(array)


def _segments(segments: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    return [_vector(segment, np.uint8, "segments") for segment in segments]


def _vector(array: np.ndarray, dtype: type, name: str) -> tuple[int, int]:
    """Address and length of an array that is safe to read there."""
    _check(array, dtype, 1, name)
    return address_of(array), array.size


def _matrix(array: np.ndarray, name: str) -> tuple[int, int, int]:
    """Address, rows and columns of an array that is safe to read there."""
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


# By identity: a layout holds a dict and has no hash. An entry goes when its layout does, before
# another object can have that id.
_plans: dict[int, _native.Plan] = {}


def _plan_of(layout: RecordLayout) -> _native.Plan:
    plan = _plans.get(id(layout))
    if plan is None:
        plan = _native.Plan.make([_layout(name, where) for name, where in layout.matrices.items()])
        _plans[id(layout)] = plan
        weakref.finalize(layout, _plans.pop, id(layout), None).atexit = False
    return plan


def _layout(name: str, where: MatrixLayout) -> _native._Layout:
    planes = [(plane.width, plane.tier, _part(plane.part)) for plane in where.planes]
    steps = [_part(part) for part in where.steps]
    return name, where.rows, where.cols, list(where.ladder), planes, steps, _part(where.multiplier)


def _part(part: Part) -> tuple[int, int, int]:
    return part.segment, part.offset, part.nbytes
