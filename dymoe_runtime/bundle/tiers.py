"""Nested precision tiers: a quantized matrix and its layout in bytes.

A matrix is quantized once, to codes of the highest tier T of its ladder. The code of a lower tier t is the top t bits
of the code of T, so tiers share storage: a *plane* holds the bits that lead from one tier to the next. For each row r
and block g of 64 columns

    value = scale_t[r, g] * level_t[code_t]
    scale_t[r, g] = multiplier[r] * unit_t * SCALE_SIZES[index_t[r, g]]

with a 4-bit scale index for each tier and one bf16 multiplier for each row. SCALE_SIZES is a table of 15 sizes, and 0
for an all-zero block. Levels are symmetric around zero; there is no zero point. If T is more than 4, levels are
code_t - (2^t - 1) / 2, and unit_t is 2^(T - t). Otherwise levels come from CURVED, which is denser around zero, and
unit_t is 2^(T - t) times CURVED_UNITS. Columns are padded to whole blocks.

A *record* holds all planes of all matrices of one expert, in one segment per tier, lowest first. Each segment is
padded to whole pages, so that one read brings any run of segments. Segment i holds the planes that lead to tier i,
then the scale indices of tier i; segment 0 also holds the row multipliers, then the vectors of the expert, if it has
any: its biases, float32.

Planes are 8, 4, 2 or 1 bits wide and stored block by block, 8 * width bytes each:

    width 8   byte i is column i
    width 4   byte i (0..31): low nibble is column i, high nibble column i + 32
    width 2   byte i (0..15): bits 2k, 2k+1 are column i + 16 k
    width 1   bit i of the little-endian 64-bit word is column i

Scale indices are two to a byte: the low nibble of byte i is block 2 i, the high one block 2 i + 1.

The grid MXFP4 is for weights that were trained in that format (OCP Microscaling Formats 1.0), whose codes it keeps. The
ladder ends at 4 bits at most. A scale is for 32 columns, and the same for all tiers; index i stands for the size 2^-i.
Codes are the 4-bit floats in rising order, -0 before 0, so that a lower tier joins neighbours; MX_NUMBERS and MX_UNITS
give their levels. The planes are those of blocks of 64 columns, as above.

The grid TRELLIS has codes of the same bits, but the level of a code depends on the codes above it. Every ladder has a
plane of two bits and then planes of one bit; scales are for 64 columns, and units do not depend on the highest tier.
Rows form groups of TRELLIS_ROWS, each of which is a ring: above its first row are its last ones, of an even number of
rows. A group of less than TRELLIS_RING has no ring; there is 0 above it. With x_r the two bits of row r of a column,
the first plane adds

    TRELLIS_NUMBERS[t][x_r + 4 * (x_(r-1) ^ x_(r-3))]

to the number of a weight at tier t. A further plane takes two rows, of one pair, at once: with a_q the bit of row 2 q
plus twice that of row 2 q + 1, it adds to the number in row 2 q + i

    TRELLIS_STEPS[t][plane][i][a_q + 4 * (a_(q-1) ^ a_(q-3))]

The level is the number less the centre of the tier. This is trellis-coded quantization (Marcellin and Fischer 1990)
with a path down each column: each weight has four numbers to choose from, and its choice decides which four the weights
below it have. All planes are stored as symbols of two bits, of each row or of each pair of rows. In every second row of
symbols, neighbouring pieces of 16 columns change places. So a byte of one row and a byte of the row above have between
them, in the same places, the symbols of both rows for two columns: the entries of tables come from a few logical
operations on whole bytes. That is why lags are odd.

The functions of this module define the format. They are plain and slow; the kernels are tested against them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BLOCK = 64
PAGE = 4096
ALIGN = 64
WIDTHS = (8, 4, 2, 1)
# Scale of each 4-bit index. The fine steps, at a ratio of 1.108, cover the blocks of a usual row; exact scales would be
# no better, because codes are chosen for the scale as stored. The coarse steps, at a ratio of 2.5, are for the rare
# block whose outliers dwarf the rest of its row.
SCALE_SIZES = np.array(
    [0, 1, 1.108, 1.229, 1.362, 1.51, 1.673, 1.855, 2.056, 2.279, 2.526, 2.8, 7, 17.5, 43.75, 109.375], np.float32
)
FINE_SCALES = 11
# Levels of ladders up to 4 bits: those of least squared error for normally distributed weights (Lloyd 1982, Max 1960),
# as 6-bit whole numbers around 31.5. The bins of a tier are unions of the next tier's bins. With these levels such
# unions are nearly optimal at fewer bits too; with bins of equal width they would not be.
CURVED = {
    2: (4, 23, 40, 59),
    3: (10, 18, 24, 29, 34, 39, 45, 53),
    4: (1, 9, 14, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45, 49, 54, 62),
}
CURVED_CENTRE = 31.5
# The grid of trained MXFP4 weights: columns of a scale; levels by code, around the centre of their tier; and the unit
# of each tier. Levels of 4 bits times their unit are 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and their negatives. Those of fewer
# bits are the means of the values that they join, for normally distributed weights.
MXFP4 = "mxfp4"
MX_BLOCK = 32
MX_NUMBERS = {
    2: (0, 17, 29, 46),
    3: (0, 14, 21, 26, 30, 35, 42, 56),
    4: (0, 4, 6, 8, 9, 10, 11, 12, 12, 13, 14, 15, 16, 18, 20, 24),
}
MX_UNITS = {2: 0.125, 3: 1 / 6, 4: 0.5}
MX_SIZES = np.array([2.0**-index for index in range(16)], np.float32)
# Factor of the scales of each tier, so that one multiplier per row suits all tiers.
CURVED_UNITS = {2: 0.0433, 3: 0.1539, 4: 0.2590}
MAX_CURVED = 4
# Trellis codes. Tables were trained on normal weights, one plane after another, and rounded together for each tier.
TRELLIS = "trellis"
TRELLIS_ROWS = 128
MAX_TRELLIS = 6  # most bits of a ladder
TRELLIS_PIECE = 16  # columns that are exchanged together
TRELLIS_LAGS = (1, 3)
TRELLIS_RING = 16  # fewest symbols of a column that form a ring

TRELLIS_NUMBERS = {
    2: (22, 35, 14, 41, 0, 18, 35, 61, 34, 45, 52, 27, 44, 27, 27, 11),
    3: (24, 35, 18, 40, 6, 21, 34, 57, 34, 43, 49, 28, 42, 28, 28, 15),
    4: (25, 35, 19, 40, 8, 22, 35, 55, 34, 43, 48, 29, 42, 29, 29, 17),
    5: (97, 128, 79, 142, 45, 88, 126, 190, 125, 151, 168, 108, 149, 108, 108, 70),
    6: (97, 125, 81, 137, 51, 89, 123, 180, 122, 146, 161, 107, 144, 107, 107, 73),
}
TRELLIS_STEPS = {
    3: (
        (
            (1, 5, -2, -6, -4, 0, 1, 0, -3, -1, 2, 4, 2, -3, -4, -2),
            (4, -2, -1, -1, 2, -6, 2, -2, -3, 0, -4, 2, -1, 5, -4, 1),
        ),
    ),
    4: (
        (
            (2, 5, -1, -5, -3, 1, 1, 1, -2, 0, 2, 4, 2, -2, -3, -2),
            (5, -1, -1, -1, 2, -5, 2, -1, -2, 1, -4, 2, -1, 5, -4, 1),
        ),
        (
            (2, -1, -2, 0, -2, 1, 0, 1, 0, 2, 0, -1, 0, -1, -3, 3),
            (0, -3, 2, 1, 1, 2, -1, -1, 3, -2, 1, -1, -1, 1, -1, 1),
        ),
    ),
    5: (
        (
            (6, 16, -3, -17, -10, 2, 4, 3, -7, -1, 7, 13, 7, -5, -9, -5),
            (14, -4, -2, -2, 6, -16, 7, -4, -7, 2, -11, 6, -3, 15, -12, 4),
        ),
        (
            (7, -3, -7, 0, -5, 4, 0, 3, 1, 5, 2, -4, 0, -2, -9, 10),
            (-1, -9, 5, 3, 1, 4, -4, -3, 9, -8, 2, -3, -3, 1, -3, 2),
        ),
        (
            (0, 3, -2, 4, 0, 2, -3, -3, -5, -2, 4, 1, 0, -2, 0, 0),
            (-1, -19, 3, 3, 3, 1, -3, 0, 3, 0, -2, 0, -4, 3, 0, 6),
        ),
    ),
    6: (
        (
            (5, 14, -3, -15, -9, 1, 3, 2, -7, -1, 6, 11, 6, -5, -9, -5),
            (13, -3, -2, -1, 6, -14, 6, -3, -6, 2, -9, 6, -2, 13, -10, 4),
        ),
        (
            (6, -2, -6, 0, -4, 4, 0, 3, 1, 5, 2, -3, 1, -1, -7, 9),
            (-1, -8, 5, 3, 1, 4, -4, -3, 8, -7, 2, -2, -3, 1, -3, 2),
        ),
        (
            (1, 3, -1, 4, 1, 3, -2, -2, -4, -1, 4, 1, 1, -1, 1, 1),
            (-1, -19, 3, 3, 3, 1, -2, 1, 3, 0, -1, 0, -3, 3, 1, 6),
        ),
        (
            (-1, 1, -2, 15, -9, 1, -2, -1, 0, -3, -1, 0, 0, -1, 0, -1),
            (0, -1, -2, 0, -2, 1, 0, -2, -1, -1, 11, 0, -3, -1, -1, 1),
        ),
    ),
}
TRELLIS_CENTRES = {2: 31, 3: 31, 4: 32, 5: 118, 6: 116}
TRELLIS_UNITS = {2: 0.07144, 3: 0.08563, 4: 0.09121, 5: 0.02946, 6: 0.03289}


@dataclass(frozen=True)
class Part:
    """A byte range of one segment of a record."""

    segment: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Plane:
    """A plane: `width` bits of each code of a matrix, which `tier` and all higher tiers need."""

    width: int
    tier: int
    part: Part


@dataclass(frozen=True)
class MatrixLayout:
    """The places of the planes, scale indices and multipliers of one [rows, cols] matrix in a record."""

    rows: int
    cols: int
    ladder: tuple[int, ...]
    planes: tuple[Plane, ...]  # most significant first
    scale_indices: tuple[Part, ...]  # u8 [rows, ceil(scales / 2)], one per tier of the ladder
    multiplier: Part  # bf16 [rows]
    grid: str = ""  # or MXFP4 or TRELLIS

    @property
    def span(self) -> int:
        """Return the columns that share a scale."""
        return MX_BLOCK if self.grid == MXFP4 else BLOCK

    @property
    def scales(self) -> int:
        """Return the number of scales of a row."""
        return -(-self.cols // self.span)

    @property
    def blocks(self) -> int:
        """Return the number of blocks in a row."""
        return blocks_of(self.cols)

    def planes_of(self, tier: int) -> Iterator[Plane]:
        """Return the planes that `tier` needs, most significant first."""
        return (plane for plane in self.planes if plane.tier <= tier)


@dataclass(frozen=True, eq=False)  # hashed by identity: kernels cache a plan for each layout
class RecordLayout:
    """The layout that all records of one kind share.

    `segment_bytes` are the sizes of the segments' content. `segment_spans` are those sizes rounded up to whole pages,
    as stored. Each segment holds its matrices in the order of `matrices`; segment 0 ends with `vectors`, float32 each.
    """

    ladder: tuple[int, ...]
    matrices: Mapping[str, MatrixLayout]
    segment_bytes: tuple[int, ...]
    segment_spans: tuple[int, ...]
    vectors: Mapping[str, Part] = field(default_factory=dict)

    @property
    def record_bytes(self) -> int:
        """Return the bytes of a record, padding included."""
        return sum(self.segment_spans)

    @property
    def weights(self) -> int:
        """Return the number of weights in a record."""
        return sum(m.rows * m.cols for m in self.matrices.values())

    def segments_of(self, tier: int) -> int:
        """Return how many leading segments `tier` needs, 0 for tier 0."""
        return sum(t <= tier for t in self.ladder)

    def prefix_bytes(self, tier: int) -> int:
        """Return the bytes of the leading segments that `tier` needs, padding included."""
        return sum(self.segment_spans[: self.segments_of(tier)])

    def bits_per_weight(self, tier: int) -> float:
        """Return the effective bits per weight at `tier`.

        Scale indices and multipliers count; padding to whole pages does not.
        """
        return 8 * sum(self.segment_bytes[: self.segments_of(tier)]) / self.weights


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix: codes of the highest tier, and the numbers that scale them."""

    codes: np.ndarray  # uint8 [rows, cols]
    scale_indices: Mapping[int, np.ndarray]  # tier -> uint8 [rows, scales], indices of sizes
    multiplier: np.ndarray  # float32 [rows], exact in bf16


def blocks_of(cols: int) -> int:
    """Return the number of blocks in a row of `cols` columns."""
    return -(-cols // BLOCK)


def scale_index_bytes(blocks: int) -> int:
    """Return the bytes of the scale indices of a row."""
    return -(-blocks // 2)


def plane_widths(bits: int) -> tuple[int, ...]:
    """Split `bits` (1..8) into plane widths, widest first.

    >>> plane_widths(3)
    (2, 1)
    """
    widths = []
    for width in WIDTHS:
        if bits >= width:
            widths.append(width)
            bits -= width
    return tuple(widths)


def make_layout(
    shapes: Mapping[str, tuple[int, int]],
    ladder: Sequence[int],
    page: int = PAGE,
    vectors: Mapping[str, int] | None = None,
    grid: str = "",
) -> RecordLayout:
    """Return the layout of a record of matrices with `shapes` (name -> (rows, cols)) for `ladder`.

    `vectors` maps the names of float32 vectors, which the first segment holds, to their lengths. Each segment is padded
    to a multiple of `page` bytes. `grid` is that of all matrices. Raises ValueError if the ladder is not valid, or has
    more bits than the grid.

    >>> layout = make_layout({"gate": (64, 128), "up": (64, 128), "down": (128, 64)}, (2, 3, 4))
    >>> layout.segment_spans, round(layout.bits_per_weight(2), 2)
    ((8192, 4096, 4096), 2.25)
    """
    ladder = check_ladder(ladder)
    if grid == MXFP4 and ladder[-1] > max(MX_NUMBERS):
        raise ValueError(f"tiers {list(ladder)}: weights in MXFP4 have {max(MX_NUMBERS)} bits at most")
    if grid == TRELLIS and ladder[-1] > MAX_TRELLIS:
        raise ValueError(f"tiers {list(ladder)}: the trellis grid has {MAX_TRELLIS} bits at most")
    span = MX_BLOCK if grid == MXFP4 else BLOCK
    planes: dict[str, list[Plane]] = {name: [] for name in shapes}
    indices: dict[str, list[Part]] = {name: [] for name in shapes}
    multipliers: dict[str, Part] = {}
    places: dict[str, Part] = {}
    sizes = []
    below = 0
    for segment, tier in enumerate(ladder):
        cursor = 0

        def take(nbytes: int, segment: int = segment) -> Part:
            nonlocal cursor
            part = Part(segment, cursor, nbytes)
            cursor += _round_up(nbytes, ALIGN)
            return part

        for name, (rows, cols) in shapes.items():
            for width in _widths(below, tier, grid):
                planes[name].append(Plane(width, tier, take(_plane_bytes(rows, cols, width, grid))))
        for name, (rows, cols) in shapes.items():
            shared = grid == MXFP4 and segment > 0
            indices[name].append(indices[name][0] if shared else take(rows * scale_index_bytes(-(-cols // span))))
        if segment == 0:
            for name, (rows, _) in shapes.items():
                multipliers[name] = take(2 * rows)
            places = {name: take(4 * length) for name, length in (vectors or {}).items()}
        sizes.append(cursor)
        below = tier
    matrices = {
        name: MatrixLayout(rows, cols, ladder, tuple(planes[name]), tuple(indices[name]), multipliers[name], grid)
        for name, (rows, cols) in shapes.items()
    }
    return RecordLayout(ladder, matrices, tuple(sizes), tuple(_round_up(size, page) for size in sizes), places)


def pack_record(
    layout: RecordLayout,
    matrices: Mapping[str, QuantizedMatrix],
    vectors: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Return the bytes of one record, uint8 [record_bytes], of its matrices and vectors; padding is zero."""
    record = np.zeros(layout.record_bytes, np.uint8)
    segments = split_record(layout, record)
    for name, where in layout.matrices.items():
        matrix = matrices[name]
        assert matrix.codes.shape == (where.rows, where.cols)
        shift = where.ladder[-1]
        for plane in where.planes:
            shift -= plane.width
            if where.grid == TRELLIS:
                symbols = _in_blocks(trellis_symbols(matrix.codes, shift, plane.width))
                _put(segments, plane.part, pack_plane(_swapped(symbols), 2))
                continue
            bits = (matrix.codes >> shift) & ((1 << plane.width) - 1)
            _put(segments, plane.part, pack_plane(bits.astype(np.uint8), plane.width))
        for tier, part in zip(where.ladder, where.scale_indices, strict=True):
            _put(segments, part, pack_scale_indices(matrix.scale_indices[tier]))
        _put(segments, where.multiplier, (matrix.multiplier.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8))
    for name, part in layout.vectors.items():
        assert vectors is not None
        _put(segments, part, np.ascontiguousarray(vectors[name], np.float32).view(np.uint8))
    return record


def split_record(layout: RecordLayout, record: np.ndarray) -> list[np.ndarray]:
    """Return views of the segments of `record`, or of those that a shorter prefix holds whole."""
    segments, start = [], 0
    for span in layout.segment_spans:
        if start + span > record.size:
            break
        segments.append(record[start : start + span])
        start += span
    return segments


def unpack_codes(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int) -> np.ndarray:
    """Return the codes of `tier`, uint8 [rows, cols], from the segments of a record."""
    codes = np.zeros((where.rows, where.blocks * BLOCK), np.uint8)
    for plane in where.planes_of(tier):
        if where.grid == TRELLIS:
            packed = _get(segments, plane.part).reshape(-1, where.blocks, 16)
            bits = trellis_bits(_swapped(unpack_plane(packed, 2)), where.rows, plane.width)
        else:
            packed = _get(segments, plane.part).reshape(where.rows, where.blocks, 8 * plane.width)
            bits = unpack_plane(packed, plane.width)
        codes = (codes << plane.width) | bits
    return np.ascontiguousarray(codes[:, : where.cols])


def vector_of(segments: Sequence[np.ndarray], part: Part) -> np.ndarray:
    """Return the vector at `part`, float32 [n], from the segments of a record."""
    return _get(segments, part).view(np.float32)


def tier_scales_of(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int) -> np.ndarray:
    """Return scale_t of a matrix, float32 [rows, scales], from the segments of a record."""
    multiplier = widen_bf16(_get(segments, where.multiplier).view(np.uint16))
    return tier_scales(_indices_of(segments, where, tier), multiplier, tier, where.ladder[-1], where.grid)


def _indices_of(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int) -> np.ndarray:
    packed = _get(segments, where.scale_indices[where.ladder.index(tier)]).reshape(where.rows, -1)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(where.rows, -1)[:, : where.scales]


def matrix_of(segments: Sequence[np.ndarray], where: MatrixLayout) -> QuantizedMatrix:
    """Return a matrix as `pack_record` takes it, from all segments of a record."""
    indices = {tier: _indices_of(segments, where, tier) for tier in where.ladder}
    multiplier = widen_bf16(_get(segments, where.multiplier).view(np.uint16))
    return QuantizedMatrix(unpack_codes(segments, where, where.ladder[-1]), indices, multiplier)


def tier_scales(indices: np.ndarray, multiplier: np.ndarray, tier: int, top: int, grid: str = "") -> np.ndarray:
    """Return scale_t = multiplier * unit_t * size[index], float32 [..., rows, scales].

    indices [..., rows, scales], multiplier float32 [..., rows]; `top` is the highest tier of the ladder.
    """
    sizes = MX_SIZES if grid == MXFP4 else SCALE_SIZES
    scales: np.ndarray = (multiplier * np.float32(unit_of(tier, top, grid)))[..., None] * sizes[indices]
    return scales


def dequantize(segments: Sequence[np.ndarray], where: MatrixLayout, tier: int) -> np.ndarray:
    """Return the matrix at `tier`, float32 [rows, cols], from the segments of a record."""
    codes = unpack_codes(segments, where, tier)
    scales = tier_scales_of(segments, where, tier).repeat(where.span, axis=1)[:, : where.cols]
    values: np.ndarray = scales * levels_at(codes, tier, where.ladder[-1], where.grid)
    return values


def grid_for(ladder: Sequence[int], trained_bits: int | None = None) -> str:
    """Return the grid of experts that are compiled to `ladder`.

    Those that were trained in MXFP4, which has `trained_bits`, keep their codes if that is the highest tier.

    >>> grid_for((2, 3, 4)), grid_for((2, 3, 4), trained_bits=4), grid_for((4, 8))
    ('trellis', 'mxfp4', '')
    """
    if trained_bits == ladder[-1]:
        return MXFP4
    return TRELLIS if ladder[0] < 4 and ladder[-1] <= MAX_TRELLIS else ""


def levels_at(codes: np.ndarray, tier: int, top: int, grid: str = "") -> np.ndarray:
    """Return the level of each weight at `tier` in a ladder up to `top`, from all codes of that tier.

    codes is uint8 [rows, cols], the result float32 [rows, cols].
    """
    if grid == TRELLIS:
        return trellis_levels(codes, tier)
    levels: np.ndarray = levels_of(tier, top, grid)[codes]
    return levels


def levels_of(tier: int, top: int, grid: str = "") -> np.ndarray:
    """Return the level of each code of `tier` in a ladder up to `top`, float32 [2^tier], rising; not for TRELLIS."""
    if grid == MXFP4:
        numbers = np.array(MX_NUMBERS[tier], np.float32)
        return numbers - np.float32(MX_NUMBERS[tier][-1] / 2)
    if top <= MAX_CURVED:
        return np.array(CURVED[tier], np.float32) - np.float32(CURVED_CENTRE)
    return np.arange(2**tier, dtype=np.float32) - np.float32((2**tier - 1) / 2)


def trellis_numbers(codes: np.ndarray, tier: int) -> np.ndarray:
    """Return the number of each weight at `tier`, uint8 [rows, cols], from all codes of that tier."""
    numbers: np.ndarray = np.array(TRELLIS_NUMBERS[tier], np.uint8)[trellis_entries(codes >> (tier - 2), TRELLIS_ROWS)]
    odd = np.arange(len(codes))[:, None] % 2
    for plane in range(1, tier - 1):
        symbols = trellis_symbols(codes, tier - 2 - plane, width=1)
        entries = trellis_entries(symbols, TRELLIS_ROWS // 2).repeat(2, axis=0)[: len(codes)]
        numbers += np.array(TRELLIS_STEPS[tier][plane - 1], np.int8).view(np.uint8)[odd, entries]  # bytes wrap around
    return numbers


def trellis_levels(codes: np.ndarray, tier: int) -> np.ndarray:
    """Return the level of each weight at `tier`, float32 [rows, cols], from all codes of that tier."""
    levels: np.ndarray = trellis_numbers(codes, tier).astype(np.float32) - np.float32(TRELLIS_CENTRES[tier])
    return levels


def _pairs_of(bits: np.ndarray) -> np.ndarray:
    """Return the bits of two rows as one number of two bits, uint8 [ceil(rows / 2), cols]."""
    padded = np.concatenate([bits, np.zeros((len(bits) % 2, bits.shape[1]), np.uint8)])
    pairs: np.ndarray = padded[::2] | padded[1::2] << 1
    return pairs


def trellis_entries(symbols: np.ndarray, group: int) -> np.ndarray:
    """Return the entries of tables that two-bit symbols [count, cols] ask for, where `group` rows form a group."""
    above = np.zeros_like(symbols)
    for first in range(0, len(symbols), group):
        count = min(group, len(symbols) - first)
        for lag in TRELLIS_LAGS:
            rows = np.arange(count) - lag
            ring = symbols[first + np.where(rows < 0, rows + count // 2 * 2, rows) % count]
            above[first : first + count] ^= ring if count >= TRELLIS_RING else np.where(rows[:, None] < 0, 0, ring)
    entries: np.ndarray = symbols + 4 * above
    return entries


def _symbol_rows(rows: int, width: int) -> int:
    """Return how many rows of symbols a plane of `width` bits has for `rows` rows of a matrix."""
    return rows if width == 2 else -(-rows // 2)


def trellis_symbols(codes: np.ndarray, shift: int, width: int) -> np.ndarray:
    """Return the symbols of a plane whose bits start at bit `shift` of the codes, uint8 [_symbol_rows, cols]."""
    return (codes >> shift) & 3 if width == 2 else _pairs_of((codes >> shift) & 1)


def trellis_bits(symbols: np.ndarray, rows: int, width: int) -> np.ndarray:
    """Return the bits of each weight, uint8 [rows, cols], from the symbols of a plane."""
    if width == 2:
        return symbols
    bits: np.ndarray = np.stack([symbols & 1, symbols >> 1], axis=1).reshape(-1, symbols.shape[1])[:rows]
    return bits


def _swapped(symbols: np.ndarray) -> np.ndarray:
    """Return symbols [count, cols] with neighbouring pieces of columns exchanged in odd rows; cols in whole blocks."""
    pieces = symbols.reshape(len(symbols), -1, 2, TRELLIS_PIECE).copy()
    pieces[1::2] = pieces[1::2, :, ::-1]
    return pieces.reshape(symbols.shape)


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """Return as float32 the bf16 numbers whose bits are given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unit_of(tier: int, top: int, grid: str = "") -> float:
    """Return unit_t, a factor of all scales of `tier` in a ladder up to `top`; it is exact in float32."""
    if grid == MXFP4:
        return float(np.float32(MX_UNITS[tier]))
    if grid == TRELLIS:
        return float(np.float32(TRELLIS_UNITS[tier]))
    curved = float(np.float32(CURVED_UNITS[tier])) if top <= MAX_CURVED else 1.0
    return curved * 2.0 ** (top - tier)


def pack_scale_indices(indices: np.ndarray) -> np.ndarray:
    """Pack indices below 16, uint8 [rows, blocks], two to a byte, uint8 [rows, ceil(blocks / 2)]."""
    rows, blocks = indices.shape
    assert indices.max(initial=0) < len(SCALE_SIZES)
    padded = np.zeros((rows, 2 * scale_index_bytes(blocks)), np.uint8)
    padded[:, :blocks] = indices
    return padded[:, ::2] | padded[:, 1::2] << 4


def _widths(below: int, tier: int, grid: str) -> tuple[int, ...]:
    """Return the widths of the planes that lead from `below` bits to `tier`."""
    if grid == TRELLIS:
        return (1,) * (tier - below) if below else (2,) + (1,) * (tier - 2)
    return plane_widths(tier - below)


def _plane_bytes(rows: int, cols: int, width: int, grid: str) -> int:
    if grid == TRELLIS:
        return _symbol_rows(rows, width) * blocks_of(cols) * 16
    return rows * blocks_of(cols) * 8 * width


def _in_blocks(values: np.ndarray) -> np.ndarray:
    """Return values [rows, cols] with columns of zeros up to whole blocks."""
    rows, cols = values.shape
    padded = np.zeros((rows, blocks_of(cols) * BLOCK), np.uint8)
    padded[:, :cols] = values
    return padded


def pack_plane(bits: np.ndarray, width: int) -> np.ndarray:
    """Pack `width`-bit values, uint8 [rows, cols], into a plane, uint8 [rows, blocks, 8 * width]."""
    rows = len(bits)
    blocks = _in_blocks(bits).reshape(rows, -1, BLOCK)
    if width == 1:
        return np.packbits(blocks, axis=-1, bitorder="little")
    lanes = blocks.reshape(rows, blocks.shape[1], 8 // width, 8 * width)
    packed = np.zeros((rows, blocks.shape[1], 8 * width), np.uint8)
    for k in range(8 // width):
        packed |= lanes[:, :, k] << (width * k)
    return packed


def unpack_plane(packed: np.ndarray, width: int) -> np.ndarray:
    """Unpack a plane, uint8 [rows, blocks, 8 * width], into its values, uint8 [rows, blocks * 64]."""
    rows = packed.shape[0]
    if width == 1:
        return np.unpackbits(packed, axis=-1, bitorder="little").reshape(rows, -1)
    lanes = [(packed >> (width * k)) & ((1 << width) - 1) for k in range(8 // width)]
    return np.concatenate(lanes, axis=-1).reshape(rows, -1)


def _put(segments: Sequence[np.ndarray], part: Part, values: np.ndarray) -> None:
    segments[part.segment][part.offset : part.offset + part.nbytes] = values.reshape(-1)


def _get(segments: Sequence[np.ndarray], part: Part) -> np.ndarray:
    return np.asarray(segments[part.segment])[part.offset : part.offset + part.nbytes]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def check_ladder(ladder: Sequence[int]) -> tuple[int, ...]:
    """Return `ladder` as a tuple.

    Raises ValueError unless its tiers are whole numbers from 2 to 8 that rise strictly.

    >>> check_ladder([2, 3, 4])
    (2, 3, 4)
    >>> check_ladder([4, 3])
    Traceback (most recent call last):
    ValueError: tiers [4, 3]: expected increasing bits between 2 and 8, such as 2,3,4
    """
    tiers = tuple(ladder)
    whole = all(type(tier) is int for tier in tiers)
    if not whole or not tiers or list(tiers) != sorted(set(tiers)) or tiers[0] < 2 or tiers[-1] > 8:
        raise ValueError(f"tiers {list(ladder)}: expected increasing bits between 2 and 8, such as 2,3,4")
    return tiers
