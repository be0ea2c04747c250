_Part = tuple[int, int, int]  # segment, offset, nbytes
_Plane = tuple[int, int, _Part]  # width, tier
_Layout = tuple[str, int, int, list[int], list[_Plane], list[_Part], _Part]  # name, rows, cols, ...
_Vector = tuple[int, int]  # address, length
_Matrix = tuple[int, int, int]  # address, rows, cols

class Plan:
    @staticmethod
    def make(matrices: list[_Layout]) -> Plan: ...
    def ffn(self, isa: str, tier: int, segments: list[_Vector], x: _Matrix, y: _Matrix, activation: str) -> None: ...
    def linear(self, isa: str, tier: int, segments: list[_Vector], x: _Matrix, y: _Matrix) -> None: ...
    def embed(self, isa: str, tier: int, segments: list[_Vector], ids: _Vector, y: _Matrix) -> None: ...
    def dequantize(self, isa: str, tier: int, segments: list[_Vector], name: str, y: _Matrix) -> None: ...

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
def threads() -> int: ...
def set_threads(count: int) -> None: ...
