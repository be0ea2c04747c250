"""The descent on the trellis grid in plain NumPy: slow, and the reference for the compiled code.

The codes of a column are chosen for all rows of a group at once, plane after plane, each by the algorithm of Viterbi
(Error bounds for convolutional codes, 1967). tiers.py says what codes mean. Sums have the order of the
compiled code, because a rounding difference can change a path, and with it all columns after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dymoe_compile.quantize.descent import Descent
from dymoe_runtime.bundle import tiers
from dymoe_runtime.bundle.tiers import SCALE_SIZES

# Curvatures below this count as zero.
TINY = np.float32(1e-30)
# Weight of the error that a plane leaves at a higher tier, for each plane that is still to come: kAhead in trellis.h.
AHEAD = np.float32(0.35)
# Cost of a symbol that must not be chosen.
NEVER = np.float32(1e30)
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
    """Give each column its best codes: new ones, or the current ones improved, or the better of both."""
    rows, top = len(group.codes), group.ladder[-1]
    for j, h in enumerate(group.hessian.diagonal()):
        inverse = 1 / h if h > TINY else np.float32(0)
        target = group.scales * group.levels[:, :, j] - group.slope[:, :, j] * inverse  # [tiers, rows]
        choices: list[Planes] = []
        if keep:
            choices.append(_improved(group, target, _planes_of(group.codes[:, j], top)))
        if new:
            choices.append(_new(group, target))
        chosen = min(choices, key=lambda planes: _cost(group, target, planes))
        level = _levels(chosen, group.ladder, rows)
        moved = group.scales * (level - group.levels[:, :, j])
        group.slope += group.hessian[j] * moved[:, :, None]
        group.levels[:, :, j] = level
        group.codes[:, j] = _codes_of(chosen, rows, top)


def _new(group: _Group, target: np.ndarray) -> Planes:
    """Return symbols chosen from the first plane on, for the targets [tiers, rows] of a column."""
    chosen: dict[int, np.ndarray] = {}
    for plane in range(group.ladder[-1] - 1):
        rest = target - group.scales * _levels(chosen, group.ladder, len(group.codes))
        chosen[plane] = closed_path(_errors(group, rest, plane, AHEAD))
    return chosen


def _improved(group: _Group, target: np.ndarray, planes: Planes) -> Planes:
    """Return symbols chosen again, one plane after another, given those of all other planes."""
    chosen = dict(planes)
    for plane, known in planes.items():
        others = {other: symbols for other, symbols in chosen.items() if other != plane}
        rest = target - group.scales * _levels(others, group.ladder, len(group.codes))
        chosen[plane] = closed_path(_errors(group, rest, plane, np.float32(1)), known)
    return chosen


def _cost(group: _Group, target: np.ndarray, planes: Planes) -> float:
    """Return the weighted squared error of a column, summed over tiers and rows."""
    error = group.scales * _levels(planes, group.ladder, len(group.codes)) - target
    return float((group.weights[:, None] * error * error).sum())


def _errors(group: _Group, rest: np.ndarray, plane: int, ahead: np.float32) -> np.ndarray:
    """Return the weighted squared error of each entry of a plane at each symbol, float32 [symbols, entries].

    rest [tiers, rows] is what the other planes leave of the targets.
    """
    span = 1 if plane == 0 else 2  # rows of a symbol
    errors = np.zeros((-(-len(group.codes) // span), 16), np.float32)
    for t, tier in enumerate(group.ladder):
        if tier < plane + 2:
            continue
        weight = group.weights[t] * ahead ** (tier - plane - 2)
        for i in range(span):
            scales = group.scales[t, i::span, None]
            error = scales * TABLES[tier][plane, i] - rest[t, i::span, None]
            errors[: len(error)] += weight * error * error
    if len(group.codes) % span:
        errors[-1, np.arange(16) % 4 >= 2] = NEVER  # the bit of a row that the last pair lacks is 0
    return errors


def closed_path(errors: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the symbols uint8 [count] of a cheap path that closes its ring: it begins with its last symbols.

    Those are the ones of `known` or, if there is no such path, of the best path around the place where the ring closes.
    errors is [count, entries]. A path of too few symbols has no ring; there is 0 above it.
    """
    ring = len(errors) // 2 * 2 if len(errors) >= tiers.TRELLIS_RING else 0
    if not ring:
        return cheapest_path(errors, np.zeros(3, np.uint8))
    if known is not None:
        before = known[ring - 3 : ring]
    else:
        each = min(ring, AROUND)
        around = cheapest_path(np.concatenate([errors[ring - each : ring], errors[:each]]), None)
        before = around[each - 3 : each]
    errors = errors.copy()
    for place, symbol in enumerate(before, start=ring - 3):
        errors[place, np.arange(16) % 4 != symbol] = NEVER
    return cheapest_path(errors, before)


def cheapest_path(errors: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Return the symbols uint8 [count] of the cheapest path after the three symbols `before`; None: after any three.

    errors is [count, entries].
    """
    # The cheapest path to each state, [last but one, last but two, last].
    cost = np.full((4, 4, 4), 0 if before is None else NEVER, np.float32)
    if before is not None:
        cost[before[1], before[0], before[2]] = 0
    fallen = []  # for each new symbol, the one that leaves the state: [last but one, last, new]
    for each in errors[:, ASKED]:
        costs = cost[..., None] + each  # [last but one, last but two, last, new]
        fallen.append(costs.argmin(1))
        cost = costs.min(1).transpose(1, 0, 2)
    second, third, last = np.unravel_index(cost.argmin(), cost.shape)
    symbols = np.empty(len(errors), np.uint8)
    for i in reversed(range(len(errors))):
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
