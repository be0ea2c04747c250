"""The compiled kernels of one instruction set, with the signatures of the reference."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from dymoe_runtime.attention import HEAVY_HITTER_QUERIES
from dymoe_runtime.kernels import _native, reference
from dymoe_runtime.kernels.descent import Descent, Grid
from dymoe_runtime.kernels.job import Expert, Job
from dymoe_runtime.kv_cache import KVCache, row_bytes
from dymoe_runtime.memory import Place
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.tiers import MatrixLayout, Part, RecordLayout

# Bits up to which codes are found by counting the levels below: kMostFittedBits in kernels.h.
MOST_FITTED = 5

Reads = _native.Reads
available_isas = _native.available_isas
pin_threads = _native.pin_threads


class StoredDense(Protocol):
    """Dense weights as a bundle keeps them; None for what there is not."""

    def record(self, name: str) -> tuple[RecordLayout, torch.Tensor] | None: ...

    def optional(self, name: str) -> torch.Tensor | None: ...


class Native:
    """Activations are quantized to int8 in blocks of 64; bad arguments raise ValueError."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        self.threads = _native.threads
        self.set_threads = _native.set_threads

    def prepare(self, layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor]) -> Expert:
        return Expert(layout, tier, segments, _plan_of(layout).expert(tier, _segments(segments)))

    def prepare_at(self, layout: RecordLayout, tier: int, places: Sequence[Place]) -> Expert:
        return Expert(layout, tier, (), _plan_of(layout).expert(tier, places))

    def moe(
        self,
        jobs: Sequence[Job],
        x: torch.Tensor,
        tokens: torch.Tensor,
        y: torch.Tensor,
        activation: str = "silu",
    ) -> None:
        work = [(expert.views, first, rows) for expert, first, rows in jobs]
        where = _vector(tokens, torch.int64, "tokens")
        _native.moe(self.isa, work, _matrix(x, "x"), where, _matrix(y, "y"), activation)

    def moe_token(
        self, experts: Sequence[Expert], x: torch.Tensor, gates: torch.Tensor, activation: str = "silu"
    ) -> torch.Tensor:
        out = torch.empty(x.shape)
        views = [expert.views for expert in experts]
        _native.moe_token(self.isa, views, _matrix(x, "x"), _matrix(gates, "gates"), _matrix(out, "out"), activation)
        return out

    def combine(self, y: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        _check(rows, torch.int64, 2, "rows")
        if rows.shape != gates.shape:
            raise ValueError(f"rows: expected {list(gates.shape)}, got {list(rows.shape)}")
        out = torch.empty(len(rows), y.shape[1])
        _native.combine(_matrix(y, "y"), _matrix(gates, "gates"), rows.data_ptr(), _matrix(out, "out"))
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight: expected {list(x.shape[-1:])}, got {list(weight.shape)}")
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(rows.shape)
        _native.norm(self.isa, _matrix(rows, "x"), _address(weight), eps, _matrix(out, "out"))
        return out.view(x.shape)

    def rotate(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        expected = (x.shape[0], x.shape[2])
        if cosines.shape != expected or sines.shape != expected:
            raise ValueError(f"tables: expected {list(expected)}, got {list(cosines.shape)} and {list(sines.shape)}")
        _check(x, torch.float32, 3, "x")
        _native.rotate((x.data_ptr(), len(x), x.shape[1] * x.shape[2]), _matrix(cosines, "cosines"), _address(sines))
        return x

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
        layer: int,
        window: int | None = None,
        weigh: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads, tokens, head_dim = q.shape
        kv_heads = cache.rows.shape[2]
        if row_bytes(head_dim, cache.bits) != cache.rows.shape[-1] or k.shape != (kv_heads, tokens, head_dim):
            raise ValueError(f"k: {list(k.shape)} does not fit q, {list(q.shape)}, and the cache")
        if v.shape != k.shape:
            raise ValueError(f"v: expected {list(k.shape)}, got {list(v.shape)}")
        rows = [x.transpose(0, 1).contiguous() for x in (q, k, v)]
        for x in rows:
            _check(x, torch.float32, 3, "q, k, v")
        shape, last = (tokens, heads, kv_heads, head_dim), min(tokens, HEAVY_HITTER_QUERIES) if weigh else 0
        out = torch.empty(rows[0].shape)
        mass = torch.empty(_native.receiving_parts(self.isa, shape, last), tokens)
        vectors = [x.data_ptr() for x in (*rows, out)]
        where, received = cache.addresses[layer], _matrix(mass, "received")
        _native.attend_prompt(self.isa, shape, cache.length, window or 0, last, vectors, where, received)
        return out.transpose(0, 1), mass.sum(0) if weigh else None

    def linear(
        self, layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        rows = _matrix(x, "x")
        y = torch.empty(x.shape[0], layout.matrices["weight"].rows)
        _plan_of(layout).linear(self.isa, tier, _segments(segments), rows, _matrix(y, "y"))
        return y

    def embed(
        self, layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], ids: torch.Tensor
    ) -> torch.Tensor:
        wanted = _vector(ids, torch.int64, "ids")
        y = torch.empty(ids.shape[0], layout.matrices["weight"].cols)
        _plan_of(layout).embed(self.isa, tier, _segments(segments), wanted, _matrix(y, "y"))
        return y

    def dequantize(self, layout: RecordLayout, tier: int, segments: Sequence[torch.Tensor], name: str) -> torch.Tensor:
        where = layout.matrices[name]
        y = torch.empty(where.rows, where.cols)
        _plan_of(layout).dequantize(self.isa, tier, _segments(segments), name, _matrix(y, "y"))
        return y

    def fit(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        if grid.ladder[-1] > MOST_FITTED:
            return reference.fit(weight, grid)
        grid.check(weight)
        tiers, (rows, cols) = len(grid.ladder), weight.shape
        codes = torch.empty(rows, cols, dtype=torch.uint8)
        scales = torch.empty(tiers, *grid.starts.shape[1:])
        _check(grid.starts, torch.float32, 3, "starts")
        _native.fit(
            self.isa,
            list(grid.ladder),
            list(grid.weights),
            _matrix(weight, "weight"),
            _vector(grid.importance, torch.float32, "importance")[0],
            len(grid.starts),
            grid.starts.data_ptr(),
            scales.data_ptr(),
            codes.data_ptr(),
        )
        return codes, scales

    def descend(self, block: Descent) -> None:
        cols = block.columns.stop - block.columns.start
        tiers, rows, pitch = block.error.shape
        _check(block.error, torch.float32, 3, "error")
        _check(block.codes, torch.uint8, 2, "codes")
        _check(block.hessian, torch.float32, 2, "hessian")
        shapes = {
            "ladder": (len(block.ladder), tiers),
            "codes": (tuple(block.codes.shape), (rows, pitch)),
            "hessian": (tuple(block.hessian.shape), (pitch, pitch)),
            "slope": (tuple(block.slope.shape), (tiers, rows, cols)),
            "scales": (tuple(block.scales.shape), (tiers, rows)),
            "units": (None if block.units is None else tuple(block.units.shape), (tiers, rows)),
            "columns": (0 <= block.columns.start < block.columns.stop <= pitch, True),
        }
        for name, (found, expected) in shapes.items():
            if found is not None and found != expected:
                raise ValueError(f"{name}: expected {expected}, got {found}")
        slope = block.slope.view(tiers * rows, cols)
        first = block.columns.start
        _native.descend(
            self.isa,
            list(block.ladder),
            list(block.weights),
            (block.hessian.data_ptr() + 4 * first * (pitch + 1), cols, cols),
            pitch,
            _matrix(slope, "slope"),
            0 if block.units is None else _matrix(block.units, "units")[0],
            _matrix(block.scales, "scales")[0],
            block.error.data_ptr() + 4 * first,
            block.codes.data_ptr() + first,
            pitch,
            block.last,
        )


def read_memory(data: torch.Tensor) -> int:
    """Read all of `data`, uint8 [n], with all threads: how fast this is bounds every kernel."""
    return _native.read_memory(_vector(data, torch.uint8, "data"))


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


def _address(tensor: torch.Tensor) -> int:
    _check(tensor, torch.float32, tensor.dim(), "tensor")
    return tensor.data_ptr()


def _segments(segments: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return [_vector(segment, torch.uint8, "segments") for segment in segments]


def _vector(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> tuple[int, int]:
    """Address and length of a tensor that is safe to read there."""
    _check(tensor, dtype, 1, name)
    return tensor.data_ptr(), tensor.numel()


def _matrix(tensor: torch.Tensor, name: str) -> tuple[int, int, int]:
    _check(tensor, torch.float32, 2, name)
    return tensor.data_ptr(), *tensor.shape


def _check(tensor: torch.Tensor, dtype: torch.dtype, dims: int, name: str) -> None:
    if tensor.dtype is dtype and tensor.dim() == dims and tensor.is_cpu and tensor.is_contiguous():
        return
    raise ValueError(
        f"{name}: expected a contiguous {dtype} tensor of {dims} dimensions on the CPU, "
        f"got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
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
