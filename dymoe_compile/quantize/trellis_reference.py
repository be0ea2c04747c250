"""The descent on the trellis grid in plain NumPy: slow, and the reference for the compiled code.

The codes of a column are chosen for all rows of a group at once, plane after plane, each by the algorithm of Viterbi
(Error bounds for convolutional codes, 1967). tiers.py says what codes mean. A path is chosen by whole numbers, so that
all instruction sets choose the same. Sums have the order of the compiled code, because a rounding difference can change
a path, and with it all columns after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dymoe_compile.quantize.descent import Descent
from dymoe_runtime.bundle import tiers
from dymoe_runtime.bundle.tiers import SCALE_SIZES

# Curvatures below this count as zero.
TINY = np.float32(1e-30)
# Weight of the error that a plane leaves at a higher tier, for each plane that is still to come: kAhead in trellis.h.
AHEAD = np.float32(0.35)
# What a symbol usually costs; how costs above FAR_COST rise; and the most that a symbol may cost.
USUAL_COST, FAR_COST, FAR_RISE, MAX_COST = np.float32(16), np.float32(896), np.float32(1 / 32), 1023
# Least and most that rows cost, relative to the median row of their group.
LEAST_SHARE, MOST_SHARE = np.float32(0.25), np.float32(4)
# Rows whose usual squared error is no larger are not weighed: they would divide by almost nothing.
TOO_SMALL = np.float32(1e-36)
# Usual squared error of a tier, relative to a row's mean square.
USUAL_ERRORS = {2: 0.08, 3: 0.024, 4: 0.0075, 5: 0.0022, 6: 0.0006}
# Cost of a symbol that must not be chosen. It is more than any three others cost together.
FORBIDDEN = 3 * MAX_COST + 1
# Symbols after which it matters little how a path begins, or ends.
AROUND = 12
# The entry that a new symbol asks for, [last but two, last, new].
ASKED = np.array([[[new + 4 * (last ^ third) for new in range(4)] for last in range(4)] for third in range(4)])
# What each entry of a plane adds to the level of a tier: [planes, row of a pair, entries].
TABLES = {
    tier: np.array([[base, base], *tiers.TRELLIS_STEPS.get(tier, ())], np.float32)
    for tier, base in (
        (t, np.array(numbers) - tiers.TRELLIS_CENTRES[t]) for t, numbers in tiers.TRELLIS_NUMBERS.items()
    )
}

Planes = Mapping[int, np.ndarray]  # plane -> its symbols in one column, uint8 [count]


@dataclass
class _Group:
    """A group of rows in a block of columns."""

    ladder: tuple[int, ...]
    weights: np.ndarray  # [tiers]
    hessian: np.ndarray  # [cols, cols]
    slope: np.ndarray  # [tiers, rows, cols]: error times Hessian
    units: np.ndarray | None  # [tiers, rows]
    scales: np.ndarray  # [tiers, rows]
    codes: np.ndarray  # uint8 [rows, cols]
    levels: np.ndarray  # [tiers, rows, cols]: of the codes, or weight / scale if there are none yet


def descend(block: Descent) -> None:
    """Choose new codes and scales for a block of columns on the trellis grid; see DescentKernels."""
    for first in range(0, len(block.codes), tiers.TRELLIS_ROWS):
        rows = slice(first, min(first + tiers.TRELLIS_ROWS, len(block.codes)))
        group = _load(block, rows)
        start = group.scales[:, :, None] * group.levels
        if block.weight is not None:
            _choose_columns(group, new=True, keep=False)
            _fit_scales(group)
        else:
            _fit_scales(group)
            _choose_columns(group, new=not block.last, keep=True)
            if block.last:
                _fit_scales(group)
        block.error.numpy()[:, rows, block.columns] += group.scales[:, :, None] * group.levels - start
        block.scales.numpy()[:, rows] = group.scales
        block.codes.numpy()[rows, block.columns] = group.codes


def _load(block: Descent, rows: slice) -> _Group:
    scales = block.scales[:, rows].numpy().copy()
    codes = block.codes[rows, block.columns].numpy().copy()
    if block.weight is None:
        levels = np.stack([tiers.trellis_levels(codes >> (block.ladder[-1] - tier), tier) for tier in block.ladder])
    else:
        weight = np.broadcast_to(block.weight[rows, block.columns].numpy(), (len(scales), *codes.shape))
        levels = np.divide(weight, scales[:, :, None], out=np.zeros_like(weight), where=scales[:, :, None] > 0)
    return _Group(
        block.ladder,
        np.array(block.weights, np.float32),
        block.hessian[block.columns, block.columns].numpy(),
        block.slope[:, rows].numpy().copy(),
        None if block.units is None else block.units[:, rows].numpy(),
        scales,
        codes,
        levels,
    )


def _fit_scales(group: _Group) -> None:
    """Set all scales to those of least error for the current levels."""
    old, cols = group.scales, group.levels.shape[-1]
    curve = np.zeros_like(group.levels)  # levels times Hessian
    for j in range(cols):
        curve += group.hessian[:, j] * group.levels[:, :, j, None]
    along, square = np.zeros_like(old), np.zeros_like(old)
    for j in range(cols):
        along += group.slope[:, :, j] * group.levels[:, :, j]
        square += curve[:, :, j] * group.levels[:, :, j]
    moved = old - along / np.maximum(square, TINY)
    scales = np.where((moved > 0) & (square > TINY), moved, old)
    if group.units is not None:
        sizes = group.units[:, :, None] * SCALE_SIZES[1:]
        nearest = np.abs(sizes - scales[:, :, None]).argmin(-1)[:, :, None]
        scales = np.take_along_axis(sizes, nearest, -1)[:, :, 0]
    scales = np.where(old == 0, np.float32(0), scales)
    group.slope += (scales - old)[:, :, None] * curve
    group.scales = scales


def _choose_columns(group: _Group, new: bool, keep: bool) -> None:
    """Give each column its best codes: new ones, or the current ones improved, or the better of both improved."""
    rows, top = len(group.codes), group.ladder[-1]
    planes = range(top - 1)
    fresh = [_Weighing.of(group, plane, AHEAD) for plane in planes] if new else []
    others_known = [_Weighing.of(group, plane, np.float32(1)) for plane in planes] if keep else []
    for j, h in enumerate(group.hessian.diagonal()):
        inverse = 1 / h if h > TINY else np.float32(0)
        target = group.scales * group.levels[:, :, j] - group.slope[:, :, j] * inverse  # [tiers, rows]
        choices = [_planes_of(group.codes[:, j], top)] if keep else []
        if new:
            choices.append(_new(group, fresh, target))
        chosen = _cheapest(group, target, choices)
        if keep:
            chosen = _cheapest(group, target, [chosen, _improved(group, others_known, target, chosen)])
        level = _levels(chosen, group.ladder, rows)
        moved = group.scales * (level - group.levels[:, :, j])
        group.slope += group.hessian[j] * moved[:, :, None]
        group.levels[:, :, j] = level
        group.codes[:, j] = _codes_of(chosen, rows, top)


def _new(group: _Group, weighings: Sequence[_Weighing], target: np.ndarray) -> Planes:
    """Return symbols chosen from the first plane on, for the targets [tiers, rows] of a column."""
    chosen: dict[int, np.ndarray] = {}
    for plane, weighing in enumerate(weighings):
        rest = target - group.scales * _levels(chosen, group.ladder, len(group.codes))
        chosen[plane] = closed_path(weighing.costs(group, rest))
    return chosen


def _improved(group: _Group, weighings: Sequence[_Weighing], target: np.ndarray, planes: Planes) -> Planes:
    """Return symbols chosen again, one plane after another, given those of all other planes.

    The first plane changes only if there is no other: a step of it is too large for what is left.
    """
    chosen = dict(planes)
    for plane in range(min(1, len(planes) - 1), len(planes)):
        others = {other: symbols for other, symbols in chosen.items() if other != plane}
        rest = target - group.scales * _levels(others, group.ladder, len(group.codes))
        chosen[plane] = closed_path(weighings[plane].costs(group, rest), planes[plane])
    return chosen


def _cheapest(group: _Group, target: np.ndarray, choices: Sequence[Planes]) -> Planes:
    """Return the first of those with the least weighted squared error of a column, summed over tiers and rows."""

    def cost(planes: Planes) -> float:
        error = group.scales * _levels(planes, group.ladder, len(group.codes)) - target
        return float((group.weights[:, None] * error * error).sum())

    return min(choices, key=cost) if len(choices) > 1 else choices[0]


@dataclass
class _Weighing:
    """What the entries of a plane cost, as far as it does not depend on the column."""

    plane: int
    tiers: list[int]  # indices of those that have the plane
    square: np.ndarray  # [tiers, rows]: weight * scale^2
    lean: np.ndarray  # [tiers, rows]: -2 * weight * scale
    plain: np.ndarray  # [symbols, entries]: sum of square * number^2

    @classmethod
    def of(cls, group: _Group, plane: int, ahead: np.float32) -> _Weighing:
        """Weigh errors so that a symbol usually costs USUAL_COST; `ahead` is as AHEAD, or 1."""
        rows, span = len(group.codes), _span(plane)
        with_plane = [t for t, tier in enumerate(group.ladder) if tier >= plane + 2]
        weights, usual = {}, np.zeros(rows, np.float32)
        for t in with_plane:
            tier = group.ladder[t]
            weights[t] = group.weights[t]
            for _ in range(plane + 2, tier):
                weights[t] *= ahead
            size = group.scales[t] * (1 / np.float32(tiers.TRELLIS_UNITS[tier]))
            usual += weights[t] * np.float32(USUAL_ERRORS[tier if ahead == 1 else plane + 2]) * size * size
        large = np.sort(usual[usual > TOO_SMALL])
        median = large[len(large) // 2] if len(large) else np.float32(1)
        per_symbol = USUAL_COST / span
        cost = np.clip(usual * (per_symbol / median), LEAST_SHARE * per_symbol, MOST_SHARE * per_symbol)
        unit = np.divide(cost, usual, out=np.zeros_like(usual), where=usual > TOO_SMALL)
        square, lean = np.zeros_like(group.scales), np.zeros_like(group.scales)
        plain = np.zeros((-(-rows // span), 16), np.float32)
        for t in with_plane:
            weight = weights[t] * unit
            square[t], lean[t] = weight * group.scales[t] * group.scales[t], -2 * weight * group.scales[t]
        for i in range(span):
            for t in with_plane:
                numbers = TABLES[group.ladder[t]][plane, i]
                plain[: len(square[t, i::span])] += square[t, i::span, None] * (numbers * numbers)
        return cls(plane, with_plane, square, lean, plain)

    def costs(self, group: _Group, rest: np.ndarray) -> np.ndarray:
        """Return what each entry costs at each symbol, int64 [symbols, entries].

        rest [tiers, rows] is what the other planes leave of the targets. The cost that even the best number in range
        would have is left out.
        """
        spared = np.zeros(len(group.codes), np.float32)
        for t in self.tiers:
            scales = group.scales[t]
            wanted = rest[t] * np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
            widest = np.abs(TABLES[group.ladder[t]][self.plane]).max()
            reached = np.clip(wanted, -widest, widest)
            spared += self.square[t] * reached * (2 * wanted - reached)
        costs, span = self.plain.copy(), _span(self.plane)
        for i in range(span):
            some = costs[: len(spared[i::span])]
            some += spared[i::span, None]
            for t in self.tiers:
                some += (self.lean[t] * rest[t])[i::span, None] * TABLES[group.ladder[t]][self.plane, i]
        risen = np.minimum(costs, FAR_COST * (1 - FAR_RISE) + FAR_RISE * costs)
        whole: np.ndarray = np.maximum(np.minimum(risen, np.float32(MAX_COST)).astype(np.int64), 0)
        if len(group.codes) % span:
            whole[-1, np.arange(16) % 4 >= 2] = FORBIDDEN  # the bit of a row that the last pair lacks is 0
        return whole


def _span(plane: int) -> int:
    """Return the number of rows of a symbol."""
    return 1 if plane == 0 else 2


def closed_path(costs: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the symbols uint8 [count] of a cheap path that closes its ring: it begins with its last symbols.

    Those are the ones of `known` or, if there is no such path, of the best path around the place where the ring closes.
    costs is [count, entries]. A path of too few symbols has no ring; there is 0 above it.
    """
    ring = len(costs) // 2 * 2 if len(costs) >= tiers.TRELLIS_RING else 0
    if not ring:
        return cheapest_path(costs, np.zeros(3, np.uint8))
    if known is not None:
        before = known[ring - 3 : ring]
    else:
        around = cheapest_path(np.concatenate([costs[ring - AROUND : ring], costs[:AROUND]]), None)
        before = around[AROUND - 3 : AROUND]
    symbols = cheapest_path(costs[:ring], before, before)
    for i in range(ring, len(costs)):
        above = symbols[i - 1] ^ symbols[i - 3]
        symbols = np.append(symbols, np.uint8(costs[i, 4 * above : 4 * above + 4].argmin()))
    return symbols


def cheapest_path(costs: np.ndarray, before: np.ndarray | None, after: np.ndarray | None = None) -> np.ndarray:
    """Return the symbols uint8 [count] of the cheapest path after the three symbols `before`; None: after any three.

    It ends in the three symbols `after`, or in any. costs is [count, entries].
    """
    # The cheapest path to each state, [last but one, last but two, last].
    cost = np.full((4, 4, 4), 0 if before is None else FORBIDDEN, np.int64)
    if before is not None:
        cost[before[1], before[0], before[2]] = 0
    fallen = []  # for each new symbol, the one that leaves the state: [last but one, last, new]
    for each in costs[:, ASKED]:
        sums = cost[..., None] + each  # [last but one, last but two, last, new]
        fallen.append(sums.argmin(1))
        cost = sums.min(1).transpose(1, 0, 2)
    ends = np.unravel_index(cost.transpose(1, 0, 2).argmin(), cost.shape) if after is None else tuple(after)
    third, second, last = ends
    symbols = np.empty(len(costs), np.uint8)
    for i in reversed(range(len(costs))):
        symbols[i] = last
        last, second, third = second, third, fallen[i][third, second, last]
    return symbols


def _levels(planes: Planes, ladder: tuple[int, ...], rows: int) -> np.ndarray:
    """Return what these planes add to the levels of a column, float32 [tiers, rows]."""
    levels = np.zeros((len(ladder), rows), np.float32)
    odd = np.arange(rows) % 2
    for plane, symbols in planes.items():
        entries = tiers.trellis_entries(symbols[:, None], len(symbols))[:, 0]
        of_rows = entries if plane == 0 else entries.repeat(2)[:rows]
        for t, tier in enumerate(ladder):
            if tier >= plane + 2:
                levels[t] += TABLES[tier][plane, odd, of_rows]
    return levels


def _planes_of(codes: np.ndarray, top: int) -> Planes:
    """Return the symbols of all planes from the codes [rows] of a column."""
    widths = (2, *[1] * (top - 2))
    return {p: tiers.trellis_symbols(codes[:, None], top - 2 - p, width)[:, 0] for p, width in enumerate(widths)}


def _codes_of(planes: Planes, rows: int, top: int) -> np.ndarray:
    """Return the codes of a column, uint8 [rows]."""
    codes = np.zeros(rows, np.uint8)
    for plane, symbols in planes.items():
        codes |= tiers.trellis_bits(symbols[:, None], rows, 1 if plane else 2)[:, 0] << (top - 2 - plane)
    return codes
