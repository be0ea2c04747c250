"""The record format: planes, scale indices and multipliers against the docstring of tiers.py, read bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from dymoe_compile.quantize.mxfp4 import mxfp4_codes, mxfp4_expert
from dymoe_runtime.bundle.tiers import (
    ALIGN,
    BLOCK,
    CURVED,
    MXFP4,
    PAGE,
    SCALE_SIZES,
    WIDTHS,
    MatrixLayout,
    Part,
    QuantizedMatrix,
    RecordLayout,
    blocks_of,
    check_ladder,
    dequantize,
    make_layout,
    pack_plane,
    pack_record,
    pack_scale_indices,
    plane_widths,
    split_record,
    tier_scales,
    tier_scales_of,
    unpack_codes,
    unpack_plane,
)

LADDERS = [(2, 3, 4), (2, 3, 4, 8), (8,), (4,), (3, 5), (2, 6), (2,), (2, 4), (2, 7), (5, 6, 7), tuple(range(2, 9))]
# What scales of a tier of at most four bits come in, beside 2^(top - tier).
UNITS = {2: 0.0433, 3: 0.1539, 4: 0.2590}
SHAPES = [
    {"gate": (3, 65), "up": (3, 65), "down": (5, 3)},
    {"gate": (4, 64), "up": (4, 64), "down": (64, 4)},
    {"one": (1, 1)},
    {"wide": (2, 300), "tall": (70, 2)},
]


def random_matrix(shape: tuple[int, int], ladder: tuple[int, ...], rng: np.random.Generator) -> QuantizedMatrix:
    rows, cols = shape
    return QuantizedMatrix(
        codes=rng.integers(0, 2 ** ladder[-1], shape, np.uint8),
        scale_indices={tier: rng.integers(0, 16, (rows, blocks_of(cols)), np.uint8) for tier in ladder},
        multiplier=(rng.uniform(1e-4, 1.0, rows).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
    )


def random_record(
    shapes: Mapping[str, tuple[int, int]], ladder: tuple[int, ...], seed: int = 0
) -> tuple[RecordLayout, dict[str, QuantizedMatrix], np.ndarray]:
    rng = np.random.default_rng(seed)
    layout = make_layout(shapes, ladder)
    matrices = {name: random_matrix(shape, ladder, rng) for name, shape in shapes.items()}
    return layout, matrices, pack_record(layout, matrices)


def parts_of(where: MatrixLayout) -> list[Part]:
    return [*(plane.part for plane in where.planes), *where.scale_indices, where.multiplier]


def value_in_plane(packed: np.ndarray, width: int, column: int) -> int:
    """Column `column` (0..63) of one packed block, by the words of the module's docstring."""
    if width == 8:
        return int(packed[column])
    if width == 4:
        return int(packed[column % 32]) >> (4 * (column // 32)) & 15
    if width == 2:
        return int(packed[column % 16]) >> (2 * (column // 16)) & 3
    word = int.from_bytes(packed.tobytes(), "little")
    return word >> column & 1


def plain_scale_size(index: int) -> float:
    """What a scale index stands for: 0, eleven fine sizes up to 2.8, four coarse ones."""
    if index == 0:
        return 0.0
    return round(2.8 ** ((index - 1) / 10), 3) if index <= 11 else 2.8 * 2.5 ** (index - 11)


def plain_code(segments: list[np.ndarray], where: MatrixLayout, tier: int, row: int, col: int) -> int:
    """The code of one weight at `tier`, plane by plane, most significant first."""
    code = 0
    for plane in where.planes:
        if plane.tier > tier:
            continue
        start = plane.part.offset + (row * where.blocks + col // BLOCK) * 8 * plane.width
        packed = segments[plane.part.segment][start : start + 8 * plane.width]
        code = code << plane.width | value_in_plane(packed, plane.width, col % BLOCK)
    return code


@pytest.mark.parametrize("cols", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("width", WIDTHS)
def test_unpacking_a_plane_inverts_packing(width: int, cols: int) -> None:
    bits = np.random.default_rng(cols).integers(0, 2**width, (5, cols), np.uint8)
    packed = pack_plane(bits, width)
    assert packed.dtype == np.uint8
    assert packed.shape == (5, blocks_of(cols), 8 * width)
    unpacked = unpack_plane(packed, width)
    assert np.array_equal(unpacked[:, :cols], bits)
    assert not unpacked[:, cols:].any()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_byte_string_is_the_packing_of_what_it_unpacks_to(width: int) -> None:
    packed = np.random.default_rng(width).integers(0, 256, (3, 2, 8 * width), np.uint8)
    assert np.array_equal(pack_plane(unpack_plane(packed, width), width), packed)


@pytest.mark.parametrize("width", WIDTHS)
def test_planes_are_laid_out_as_documented(width: int) -> None:
    bits = np.random.default_rng(width).integers(0, 2**width, (2, 128), np.uint8)
    packed = pack_plane(bits, width)
    for row, column in itertools.product(range(2), range(128)):
        assert value_in_plane(packed[row, column // BLOCK], width, column % BLOCK) == bits[row, column]


def test_scale_indices_stand_for_zero_and_fine_and_coarse_sizes() -> None:
    assert SCALE_SIZES.dtype == np.float32
    assert SCALE_SIZES.tolist() == pytest.approx([plain_scale_size(index) for index in range(16)], rel=1e-6)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 64])
def test_scale_indices_are_packed_two_to_a_byte_the_first_in_the_low_nibble(blocks: int) -> None:
    indices = np.random.default_rng(blocks).integers(0, 16, (5, blocks), np.uint8)
    packed = pack_scale_indices(indices)
    assert packed.dtype == np.uint8
    assert packed.shape == (5, -(-blocks // 2))
    for row, block in itertools.product(range(5), range(2 * packed.shape[1])):
        expected = indices[row, block] if block < blocks else 0
        assert packed[row, block // 2] >> 4 * (block % 2) & 15 == expected


@pytest.mark.parametrize("bits", range(1, 9))
def test_plane_widths_add_up_and_fall(bits: int) -> None:
    widths = plane_widths(bits)
    assert sum(widths) == bits
    assert set(widths) <= set(WIDTHS)
    assert list(widths) == sorted(set(widths), reverse=True)


def test_three_bits_are_a_plane_of_two_and_one_of_one() -> None:
    assert plane_widths(3) == (2, 1)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_codes_of_a_tier_are_the_top_bits_of_the_highest(
    ladder: tuple[int, ...], shapes: Mapping[str, tuple[int, int]]
) -> None:
    layout, matrices, record = random_record(shapes, ladder)
    segments = split_record(layout, record)
    for name, tier in itertools.product(shapes, ladder):
        codes = unpack_codes(segments, layout.matrices[name], tier)
        assert codes.dtype == np.uint8
        assert codes.flags["C_CONTIGUOUS"]
        assert np.array_equal(codes, matrices[name].codes >> (ladder[-1] - tier))


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_codes_equal_those_read_bit_by_bit(ladder: tuple[int, ...]) -> None:
    layout, _, record = random_record(SHAPES[0], ladder)
    segments = split_record(layout, record)
    for name, tier in itertools.product(SHAPES[0], ladder):
        where = layout.matrices[name]
        codes = unpack_codes(segments, where, tier)
        expected = [[plain_code(segments, where, tier, r, c) for c in range(where.cols)] for r in range(where.rows)]
        assert codes.tolist() == expected


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_the_prefix_of_a_tier_is_enough_to_read_it(ladder: tuple[int, ...]) -> None:
    layout, _, record = random_record(SHAPES[0], ladder)
    whole = split_record(layout, record)
    for tier in ladder:
        prefix = split_record(layout, record[: layout.prefix_bytes(tier)].copy())
        assert len(prefix) == layout.segments_of(tier)
        for where in layout.matrices.values():
            assert np.array_equal(unpack_codes(prefix, where, tier), unpack_codes(whole, where, tier))
            assert np.array_equal(dequantize(prefix, where, tier), dequantize(whole, where, tier))


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_shorter_prefix_is_not_enough(ladder: tuple[int, ...]) -> None:
    layout, _, record = random_record(SHAPES[0], ladder)
    for below, tier in itertools.pairwise(ladder):
        prefix = split_record(layout, record[: layout.prefix_bytes(below)])
        with pytest.raises(IndexError):
            unpack_codes(prefix, layout.matrices["gate"], tier)


@pytest.mark.parametrize("page", [PAGE, 512])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_parts_are_aligned_apart_and_within_their_segments(
    ladder: tuple[int, ...], shapes: Mapping[str, tuple[int, int]], page: int
) -> None:
    layout = make_layout(shapes, ladder, page)
    assert list(layout.matrices) == list(shapes)
    assert len(layout.segment_bytes) == len(layout.segment_spans) == len(ladder)
    for payload, span in zip(layout.segment_bytes, layout.segment_spans, strict=True):
        assert span % page == 0
        assert 0 < payload <= span < payload + page
    parts = [part for where in layout.matrices.values() for part in parts_of(where)]
    for segment, payload in enumerate(layout.segment_bytes):
        mine = sorted((p.offset, p.offset + p.nbytes) for p in parts if p.segment == segment)
        assert all(start % ALIGN == 0 for start, _ in mine)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(mine))
        assert mine[-1][1] <= payload < mine[-1][1] + ALIGN


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_parts_hold_just_what_they_must(ladder: tuple[int, ...], shapes: Mapping[str, tuple[int, int]]) -> None:
    for name, where in make_layout(shapes, ladder).matrices.items():
        rows, cols = shapes[name]
        blocks = -(-cols // 64)
        assert (where.rows, where.cols, where.blocks) == (rows, cols, blocks)
        assert [part.nbytes for part in where.scale_indices] == [rows * -(-blocks // 2)] * len(ladder)
        assert [part.segment for part in where.scale_indices] == list(range(len(ladder)))
        assert (where.multiplier.segment, where.multiplier.nbytes) == (0, 2 * rows)
        assert [plane.part.nbytes for plane in where.planes] == [8 * p.width * rows * blocks for p in where.planes]
        assert all(ladder[plane.part.segment] == plane.tier for plane in where.planes)
        for tier in ladder:
            assert sum(plane.width for plane in where.planes_of(tier)) == tier


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_padding_is_zero(ladder: tuple[int, ...]) -> None:
    layout, _, record = random_record({"gate": (3, 64), "down": (5, 128)}, ladder)
    for segment, data in enumerate(split_record(layout, record)):
        used = np.zeros(data.size, bool)
        for where in layout.matrices.values():
            for part in parts_of(where):
                if part.segment == segment:
                    used[part.offset : part.offset + part.nbytes] = True
        assert not data[~used].any()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_sizes_add_up(ladder: tuple[int, ...]) -> None:
    layout, _, record = random_record(SHAPES[3], ladder)
    assert layout.record_bytes == record.size == layout.prefix_bytes(ladder[-1])
    assert layout.weights == 2 * 300 + 70 * 2
    assert layout.segments_of(0) == layout.prefix_bytes(0) == 0
    assert [layout.segments_of(tier) for tier in ladder] == list(range(1, len(ladder) + 1))
    assert [layout.prefix_bytes(tier) for tier in ladder] == np.cumsum(layout.segment_spans).tolist()


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_dequantizing_equals_the_formula(ladder: tuple[int, ...]) -> None:
    layout, matrices, record = random_record(SHAPES[0], ladder)
    segments = split_record(layout, record)
    for name, tier in itertools.product(SHAPES[0], ladder):
        matrix, where = matrices[name], layout.matrices[name]
        got = dequantize(segments, where, tier)
        assert got.dtype == np.float32
        assert got.shape == (where.rows, where.cols)
        for r, c in itertools.product(range(where.rows), range(where.cols)):
            size = plain_scale_size(int(matrix.scale_indices[tier][r, c // 64]))
            code = int(matrix.codes[r, c]) >> (ladder[-1] - tier)
            level = code - (2**tier - 1) / 2 if ladder[-1] > 4 else (CURVED[tier][code] - 31.5) * UNITS[tier]
            value = matrix.multiplier[r].item() * size * 2 ** (ladder[-1] - tier) * level
            assert got[r, c].item() == pytest.approx(value, rel=1e-6, abs=0)


def squared_error(levels: list[float], bins: list[float]) -> float:
    """Of standard normal values in `bins`, given by their inner bounds, told by `levels`; by quadrature."""
    x = np.linspace(-8, 8, 160001)
    told = np.asarray(levels)[np.digitize(x, bins)]
    return float(np.sum((x - told) ** 2 * np.exp(-x * x / 2)) / np.sum(np.exp(-x * x / 2)))


def scaled_error(numbers: list[float], bins: list[float]) -> float:
    """The least over scales of the levels."""
    return min(squared_error([n * s for n in numbers], bins) for s in np.linspace(0.5, 1.4, 91) * 2.5 / numbers[-1])


# Least squared errors of normal values by any levels (Max 1960, table 1), and by levels of one distance (table 2).
@pytest.mark.parametrize(("tier", "best", "even"), [(2, 0.1175, 0.1188), (3, 0.03454, 0.03744), (4, 0.009497, 0.01154)])
def test_curved_levels_lose_little_though_they_nest(tier: int, best: float, even: float) -> None:
    """In the bins that the top codes leave, at the scale at which the top tier loses least."""
    top = np.asarray(CURVED[4]) - 31.5
    scale = min(np.linspace(0.07, 0.1, 61), key=lambda s: squared_error((top * s).tolist(), _between(top * s)))
    bins = _between(top * scale)[2 ** (4 - tier) - 1 :: 2 ** (4 - tier)]
    error = scaled_error([n - 31.5 for n in CURVED[tier]], bins)
    assert best * 0.999 <= error <= best * 1.04
    assert tier < 4 or error < 0.85 * even


def _between(levels: np.ndarray) -> list[float]:
    return ((levels[1:] + levels[:-1]) / 2).tolist()


def test_scales_equal_those_of_the_quantized_matrix() -> None:
    layout, matrices, record = random_record(SHAPES[0], (2, 3, 4))
    for name, tier in itertools.product(SHAPES[0], (2, 3, 4)):
        got = tier_scales_of(split_record(layout, record), layout.matrices[name], tier)
        matrix = matrices[name]
        assert np.array_equal(got, tier_scales(matrix.scale_indices[tier], matrix.multiplier, tier, 4))


def test_the_grid_is_symmetric() -> None:
    layout, matrices, record = random_record({"gate": (3, 70)}, (2, 3, 4))
    flipped = QuantizedMatrix(15 - matrices["gate"].codes, matrices["gate"].scale_indices, matrices["gate"].multiplier)
    mirrored = pack_record(layout, {"gate": flipped})
    where = layout.matrices["gate"]
    for tier in (2, 3, 4):
        value = dequantize(split_record(layout, record), where, tier)
        assert np.array_equal(dequantize(split_record(layout, mirrored), where, tier), -value)


@pytest.mark.parametrize(
    ("tier", "bits"),
    # planes + scale indices (4 bits per tier and 64 weights) + multiplier (16 bits per row of 256)
    [(2, 2 + 4 / 64 + 16 / 256), (3, 3 + 8 / 64 + 16 / 256), (4, 4 + 12 / 64 + 16 / 256), (0, 0.0)],
)
def test_bits_per_weight_count_scale_indices_and_multipliers(tier: int, bits: float) -> None:
    layout = make_layout({"gate": (256, 256), "up": (256, 256), "down": (256, 256)}, (2, 3, 4))
    assert layout.bits_per_weight(tier) == bits


def test_segments_of_a_known_shape_are_rounded_to_pages() -> None:
    layout = make_layout({"gate": (256, 256), "up": (256, 256), "down": (256, 256)}, (2, 3, 4))
    assert layout.segment_bytes == (3 * (16384 + 512 + 512), 3 * (8192 + 512), 3 * (8192 + 512))
    assert layout.segment_spans == (13 * 4096, 7 * 4096, 7 * 4096)


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_good_ladders_come_back_as_tuples(ladder: tuple[int, ...]) -> None:
    assert check_ladder(list(ladder)) == ladder


@pytest.mark.parametrize("ladder", [[], [1], [1, 2], [4, 3], [3, 3], [2, 9], [0], [-2, 3], [16]], ids=str)
def test_bad_ladders_are_refused_with_what_was_given(ladder: list[int]) -> None:
    with pytest.raises(ValueError) as caught:
        check_ladder(ladder)
    assert str(ladder) in str(caught.value)


def test_a_ladder_of_fractions_is_refused() -> None:
    with pytest.raises(ValueError):
        check_ladder([2.5, 3.5])  # type: ignore[list-item]


def test_packing_checks_the_shape() -> None:
    layout, matrices, _ = random_record({"gate": (3, 70)}, (2, 3, 4))
    with pytest.raises(AssertionError):
        pack_record(layout, {"gate": random_matrix((3, 71), (2, 3, 4), np.random.default_rng(0))})
    assert pack_record(layout, matrices).size == layout.record_bytes


# The grid of MXFP4

MX_LADDERS = [(2, 3, 4), (4,), (2, 4), (3, 4), (2, 3), (3,)]
MX_SHAPES = {"gate": (3, 65), "up": (5, 40), "down": (7, 176), "other": (2, 96), "one": (1, 1)}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
MX_LEVELS = {
    2: [-23, -6, 6, 23],
    3: [-28, -14, -7, -2, 2, 7, 14, 28],
    4: [-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12],
}
MX_UNITS = {2: 1 / 8, 3: 1 / 6, 4: 1 / 2}


def mx_groups(shape: tuple[int, int], apart: int, seed: int = 0) -> np.ndarray:
    """A random matrix in MXFP4, with scales of a row up to 2^apart apart; some groups are zero."""
    rng, (rows, cols) = np.random.default_rng(seed), shape
    values = rng.choice([sign * value for value in E2M1 for sign in (-1.0, 1.0)], shape)
    groups = rows, -(-cols // 32)
    exponents = rng.integers(-apart, 1, groups) + rng.integers(-112, 125, (rows, 1))
    scales = np.where(rng.random(groups) < 0.2, 0.0, np.exp2(exponents.astype(np.float64)))
    return np.asarray(values * scales.repeat(32, axis=1)[:, :cols], np.float32)


def mx_normal(rows: int, cols: int) -> np.ndarray:
    """Normal weights, rounded to MXFP4 as OCP Microscaling Formats 1.0 says (6.3)."""
    x = np.random.default_rng(0).standard_normal((rows, cols // 32, 32))
    scales = np.exp2(np.floor(np.log2(np.abs(x).max(-1, keepdims=True))) - 2)
    nearest = np.abs(np.abs(x / scales)[..., None] - np.array(E2M1)).argmin(-1)
    return np.asarray(np.sign(x) * np.array(E2M1)[nearest] * scales, np.float32).reshape(rows, cols)


def mx_record(weights: Mapping[str, np.ndarray], ladder: tuple[int, ...]) -> tuple[RecordLayout, list[np.ndarray]]:
    layout = make_layout({name: weight.shape for name, weight in weights.items()}, ladder, grid=MXFP4)
    codes = mxfp4_expert({name: torch.from_numpy(weight) for name, weight in weights.items()}, ladder)
    return layout, split_record(layout, pack_record(layout, codes))


@pytest.mark.parametrize("ladder", MX_LADDERS, ids=str)
def test_scales_of_mxfp4_are_for_32_columns_and_all_tiers(ladder: tuple[int, ...]) -> None:
    layout, usual = make_layout(MX_SHAPES, ladder, grid=MXFP4), make_layout(MX_SHAPES, ladder)
    for name, where in layout.matrices.items():
        rows, cols = MX_SHAPES[name]
        scales = -(-cols // 32)
        assert (where.span, where.scales, where.blocks) == (32, scales, -(-cols // 64))
        assert len(where.scale_indices) == len(ladder) and len(set(where.scale_indices)) == 1
        assert (where.scale_indices[0].segment, where.scale_indices[0].nbytes) == (0, rows * -(-scales // 2))
        theirs = usual.matrices[name]
        assert (theirs.span, theirs.scales) == (64, theirs.blocks)
        sizes = [(plane.width, plane.tier, plane.part.segment, plane.part.nbytes) for plane in where.planes]
        assert sizes == [(plane.width, plane.tier, plane.part.segment, plane.part.nbytes) for plane in theirs.planes]
    parts = {part for where in layout.matrices.values() for part in parts_of(where)}
    for segment, payload in enumerate(layout.segment_bytes):
        mine = sorted((p.offset, p.offset + p.nbytes) for p in parts if p.segment == segment)
        assert all(start % ALIGN == 0 for start, _ in mine)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(mine))
        assert mine[-1][1] <= payload < mine[-1][1] + ALIGN


def test_bits_per_weight_of_mxfp4() -> None:
    layout = make_layout({"gate": (256, 256)}, (2, 3, 4), grid=MXFP4)
    scales = 4 / 32 + 16 / 256
    assert [layout.bits_per_weight(tier) for tier in (2, 3, 4)] == [2 + scales, 3 + scales, 4 + scales]


@pytest.mark.parametrize("ladder", [(2, 5), (8,), (2, 3, 4, 5)], ids=str)
def test_mxfp4_has_four_bits_at_most(ladder: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4 bits at most"):
        make_layout(MX_SHAPES, ladder, grid=MXFP4)


@pytest.mark.parametrize("ladder", MX_LADDERS, ids=str)
def test_dequantizing_mxfp4_equals_the_formula(ladder: tuple[int, ...]) -> None:
    rng, shape = np.random.default_rng(0), MX_SHAPES["down"]
    layout = make_layout({"weight": shape}, ladder, grid=MXFP4)
    codes, indices = rng.integers(0, 2 ** ladder[-1], shape, np.uint8), rng.integers(0, 16, (7, 6), np.uint8)
    multiplier = np.exp2(rng.integers(-20, 20, 7)).astype(np.float32)
    matrix = QuantizedMatrix(codes, dict.fromkeys(ladder, indices), multiplier)
    segments = split_record(layout, pack_record(layout, {"weight": matrix}))
    for tier in ladder:
        got = dequantize(segments[: layout.segments_of(tier)], layout.matrices["weight"], tier)
        for r, c in itertools.product(*map(range, shape)):
            level = MX_LEVELS[tier][int(codes[r, c]) >> (ladder[-1] - tier)] * MX_UNITS[tier]
            value = multiplier[r].item() * 2.0 ** -int(indices[r, c // 32]) * level
            assert got[r, c].item() == pytest.approx(value, rel=1e-6, abs=0)


@pytest.mark.parametrize("ladder", [(2, 3, 4), (4,), (2, 4)], ids=str)
@pytest.mark.parametrize("apart", [0, 4, 15])
def test_weights_in_mxfp4_stay_as_they_are(apart: int, ladder: tuple[int, ...]) -> None:
    """Though the scale of a group may be another, as of one in which no magnitude is above 3."""
    for seed in range(10):
        weights = {name: mx_groups(shape, apart, seed) for name, shape in MX_SHAPES.items()}
        layout, segments = mx_record(weights, ladder)
        for name, where in layout.matrices.items():
            assert np.array_equal(dequantize(segments, where, 4), weights[name])


def test_weights_far_below_the_rest_of_their_row_are_rounded() -> None:
    """To half a step of the smallest scale that the row can have."""
    weights = mx_groups((50, 320), apart=30)
    layout, segments = mx_record({"weight": weights}, (2, 3, 4))
    got = dequantize(segments, layout.matrices["weight"], 4)
    largest = np.exp2(np.frexp(np.abs(weights).max(-1, keepdims=True))[1] - 3.0)  # scale of a row
    assert (np.abs(got - weights) <= largest * 2.0**-15 / 4).all()
    assert np.array_equal(got[np.abs(weights) >= largest * 2.0**-12], weights[np.abs(weights) >= largest * 2.0**-12])
    assert not np.array_equal(got, weights)


@pytest.mark.parametrize("ladder", MX_LADDERS, ids=str)
def test_lower_tiers_of_mxfp4_are_near(ladder: tuple[int, ...]) -> None:
    """Their squared errors are little more than those of the usual tiers, which are fitted to the weights."""
    weights = mx_normal(64, 512)
    layout, segments = mx_record({"weight": weights}, ladder)
    square = np.square(weights).sum()
    for tier in ladder:
        got = dequantize(segments, layout.matrices["weight"], tier)
        assert np.square(got - weights).sum() / square <= {2: 0.145, 3: 0.044, 4: 0.0}[tier]
        factor = (got * weights).sum() / np.square(got).sum()
        assert 0.98 <= factor <= 1.05  # levels are as large as the weights that they stand for


def test_codes_of_mxfp4_mirror_and_nest() -> None:
    weight = torch.from_numpy(mx_groups((5, 96), apart=6))
    top, mirrored = mxfp4_codes(weight, (2, 3, 4)), mxfp4_codes(-weight, (2, 3, 4))
    zero = weight.numpy() == 0
    assert np.array_equal(mirrored.codes[~zero], 15 - top.codes[~zero])
    assert (top.codes[zero] == 8).all() and (mirrored.codes[zero] == 8).all()
    for ladder in ((2, 3), (2,)):
        lower = mxfp4_codes(weight, ladder)
        assert np.array_equal(lower.codes, top.codes >> (4 - ladder[-1]))
        assert np.array_equal(lower.multiplier, top.multiplier)
