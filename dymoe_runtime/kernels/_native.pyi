# The compiled module of src/python. The headers under src say what each function does. Arrays are passed as addresses,
# which are not checked: native.py takes them from contiguous arrays of the right type.

from collections.abc import Callable, Sequence

from dymoe_runtime.kernels.interface import Position, Reached
from dymoe_runtime.spec import GatedDeltaSpec, LayerSpec, RouterSpec

_Part = tuple[int, int, int]  # segment, offset, nbytes
_Plane = tuple[int, int, _Part]  # width, tier, part
# name, rows, cols, ladder, planes, scale indices of each tier, multiplier, grid
_Layout = tuple[str, int, int, list[int], list[_Plane], list[_Part], _Part, str]
_Vector = tuple[int, int]  # address, length
_Matrix = tuple[int, int, int]  # address, rows, cols
_Cache = tuple[int, int, int, int]  # addresses of a layer's keys and values, capacity, bits
_Delta = tuple[_Vector, _Vector]  # a layer's inputs of the convolution, and its memory
_Linear = tuple[Plan, int, list[_Vector], int]  # plan, tier, segments, address of the bias or 0
_Rows = tuple[Expert, int, int]  # expert, first row, number of rows
_Heads = tuple[int, int, int, int]  # tokens, heads, kv_heads, head_dim
_Sight = tuple[int, int, int]  # position of the first token; window and chunk, 0 for none

# The matrices of one expert at one tier: pointers into its segments, which the caller keeps in place.
class Expert: ...

# The checked layout of a record.
class Plan:
    @staticmethod
    def make(matrices: list[_Layout], vectors: list[tuple[str, _Part]]) -> Plan: ...
    def expert(self, tier: int, segments: Sequence[_Vector]) -> Expert: ...
    def linear(self, isa: str, tier: int, segments: list[_Vector], x: _Matrix, y: _Matrix) -> None: ...
    def embed(self, isa: str, tier: int, segments: list[_Vector], ids: _Vector, y: _Matrix) -> None: ...
    def dequantize(self, isa: str, tier: int, segments: list[_Vector], name: str, y: _Matrix) -> None: ...

# The dense weights of one layer.
class DecodeLayer:
    @staticmethod
    def make(
        isa: str,
        hidden: int,
        norm: tuple[str, float],  # kind and epsilon of all norms
        layer: LayerSpec,
        rotation: tuple[int, int],  # index of the rotary embedding or -1, columns of a head that turn
        plain: dict[str, _Matrix],  # vectors have one row
        quantized: dict[str, _Linear],
    ) -> DecodeLayer: ...

# The resident experts, where a decode stack finds them.
class ResidentTable:
    def __init__(self, layers: int, experts: int, ladder: Sequence[int]) -> None: ...
    def put(self, layer: int, expert: int, tier: int, views: Expert) -> None: ...
    def remove(self, layer: int, expert: int, tier: int) -> None: ...
    def set_rule(self, layer: int, thresholds: Sequence[float], pinned: Sequence[int]) -> None: ...
    def choose_tiers(self, layer: int, experts: list[int], weights: list[float]) -> list[int]: ...

# The layers that decoded tokens run through, one of each sequence.
class DecodeStack:
    def __init__(self, isa: str, layers: Sequence[DecodeLayer | None], activation: str) -> None: ...
    def set_states(self, sequences: list[list[_Cache | _Delta | None]]) -> None: ...
    def run(
        self,
        table: ResidentTable | None,
        first: int,
        x: int,
        more: int,  # address, or 0
        positions: Sequence[Position],
        buffers: tuple[int, int, int, int],  # addresses of residual, h, experts, weights
    ) -> Reached: ...
    def route(self, layer: int, x: int, experts: int, weights: int, router: int = 0, bias: int = 0) -> None: ...

# Threads that read files into memory.
class ReadThreads:
    def __init__(self, threads: int) -> None: ...
    def submit(
        self,
        fd: int,
        offset: int,
        places: Sequence[_Vector],
        urgency: int,
        then: Callable[[], None] | None,
        checksums: Sequence[int] = (),
    ) -> int: ...
    def reprioritize(self, ticket: int, now: int, urgency: int) -> bool: ...
    def cancel(self, ticket: int, urgency: int) -> bool: ...
    def started(self) -> list[int]: ...
    def finished(self) -> list[tuple[int, int, int, float]]: ...
    def wait(self, ticket: int) -> None: ...
    def close(self, patience_s: float) -> bool: ...

def moe(isa: str, parts: list[_Rows], x: _Matrix, tokens: _Vector, y: _Matrix, activation: str) -> None: ...
def moe_token(
    isa: str,
    experts: list[Expert],
    x: _Matrix,
    weights: _Matrix,
    out: _Matrix,
    activation: str,
    reads: ReadThreads | None = None,
    pending: Sequence[tuple[int, int]] = (),  # index of the expert, ticket of its read
) -> float: ...  # seconds spent waiting
def matmul(isa: str, x: _Matrix, weight: int, is_bf16: bool, y: _Matrix) -> None: ...
def activate(isa: str, hidden: _Matrix, ups: int, activation: str) -> None: ...
def route(
    isa: str,
    logits: _Matrix,
    router: RouterSpec,
    select: int,  # addresses, or 0
    scale: int,
    experts: int,
    weights: _Matrix,
) -> None: ...
def norm(isa: str, x: _Matrix, weight: int, eps: float, out: _Matrix) -> None: ...
def layer_norm(isa: str, x: _Matrix, weight: int, bias: int, eps: float, out: _Matrix) -> None: ...
def rotate(x: _Matrix, n: int, cosines: _Matrix, sines: int) -> None: ...
def combine(y: _Matrix, weights: _Matrix, rows: _Matrix, out: _Matrix) -> None: ...
def receiving_parts(isa: str, shape: _Heads, last: int) -> int: ...
def attend_prompt(
    isa: str,
    shape: _Heads,
    sight: _Sight,
    last: int,
    vectors: list[int],  # addresses of queries, keys, values, out, sinks; 0 for no sinks
    cache: _Cache,
    received: _Matrix,
) -> None: ...
def gated_delta(
    isa: str,
    spec: GatedDeltaSpec,
    mixed: _Matrix,
    rates: _Matrix,
    vectors: list[int],  # addresses of conv, a_log, dt_bias, tail, memory
    y: _Matrix,
) -> None: ...
def descend(
    isa: str,
    bits: list[int],
    weights: list[float],
    hessian: _Matrix,
    hessian_pitch: int,
    slope: _Matrix,
    units: int,
    scales: int,
    error: int,
    codes: int,
    pitch: int,
    last: bool,
    whole: bool,
    trellis: bool,
    weight: int,
) -> None: ...
def fit(
    isa: str,
    bits: list[int],
    weights: list[float],
    weight: _Matrix,
    importance: int,
    starts: int,
    start: int,
    scales: int,
    codes: int,
) -> None: ...
def matrix_at(array: object) -> _Matrix | None: ...
def available_isas() -> list[str]: ...
def read_memory(data: _Vector) -> int: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def pin_threads(pinned: bool) -> bool: ...
