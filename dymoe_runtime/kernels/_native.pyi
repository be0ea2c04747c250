_Part = tuple[int, int, int]  # segment, offset, nbytes
_Plane = tuple[int, int, _Part]  # width, tier
_Layout = tuple[str, int, int, list[int], list[_Plane], list[_Part], _Part]  # name, rows, cols, ...
_Vector = tuple[int, int]  # address, length
_Matrix = tuple[int, int, int]  # address, rows, cols
_Cache = tuple[int, int, int, int]  # addresses of a layer's keys and values, capacity, bits
_Job = tuple[Expert, int, int]  # first row, rows

class Expert: ...

class Plan:
    @staticmethod
    def make(matrices: list[_Layout]) -> Plan: ...
    def expert(self, tier: int, segments: list[_Vector]) -> Expert: ...
    def linear(self, isa: str, tier: int, segments: list[_Vector], x: _Matrix, y: _Matrix) -> None: ...
    def embed(self, isa: str, tier: int, segments: list[_Vector], ids: _Vector, y: _Matrix) -> None: ...
    def dequantize(self, isa: str, tier: int, segments: list[_Vector], name: str, y: _Matrix) -> None: ...

class DecodeLayer:
    @staticmethod
    def make(
        isa: str,
        heads: tuple[int, int, int, int],  # hidden, heads, kv_heads, head_dim
        window: int,
        routing: tuple[int, int, bool],  # experts, top_k, norm_topk
        eps: float,
        clip: float,
        qk_norm: str,
        vectors: list[int],  # addresses of attn_norm, q_norm, k_norm, mlp_norm
        router: int,
        matrices: list[tuple[Plan, int, list[_Vector], int]],  # q, k, v, o; address of the bias or 0
    ) -> DecodeLayer: ...
    def attend(self, x: int, position: int, cosines: int, sines: int, cache: _Cache, out: int, /) -> None: ...
    def route(self, x: int, h: int, experts: int, gates: int, router: int = 0, bias: int = 0) -> None: ...

def moe(isa: str, jobs: list[_Job], x: _Matrix, tokens: _Vector, y: _Matrix, activation: str) -> None: ...
def moe_token(isa: str, experts: list[Expert], x: _Matrix, gates: _Matrix, out: _Matrix, activation: str) -> None: ...
def norm(isa: str, x: _Matrix, weight: int, eps: float, out: _Matrix) -> None: ...
def rotate(x: _Matrix, cosines: _Matrix, sines: int) -> None: ...
def combine(y: _Matrix, gates: _Matrix, rows: int, out: _Matrix) -> None: ...
def receiving_parts(isa: str, shape: tuple[int, int, int, int], last: int) -> int: ...
def attend_prompt(
    isa: str,
    shape: tuple[int, int, int, int],  # tokens, heads, kv_heads, head_dim
    start: int,
    window: int,
    last: int,
    vectors: list[int],  # addresses of queries, keys, values and out
    cache: _Cache,
    received: _Matrix,
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
def available_isas() -> list[str]: ...
def read_memory(data: _Vector) -> int: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def pin_threads(pinned: bool) -> bool: ...
