"""Axes: the mapping from values to places in a drawing, and the values that get a tick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dymoe_runtime.tools.charts.numbers import number

# Values up to LEAST are rounding errors; log scales leave them out.
LEAST = 1e-12


@dataclass(frozen=True)
class Axis:
    """The title and kind of an axis."""

    title: str
    log: bool = False
    whole: bool = False  # ticks at whole numbers only
    share: bool = False  # labels in percent
    from_zero: bool = False  # whether the axis begins at 0 though no value does

    def label(self, value: float) -> str:
        """Return the text of a tick."""
        if self.share:
            return f"{number(100.0 * value, 4)}%"
        return f"{value:.3g}" if abs(value) >= 1e6 else number(float(value), 4)


@dataclass(frozen=True)
class Scale:
    """A mapping from values to pixels, and the values that get a tick."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel coordinate of `value`."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def across(values: Sequence[float], axis: Axis, start: float, end: float) -> Scale:
    """Return the horizontal scale: the range of the values and a small margin."""
    room = (max(values) - min(values)) * 0.03 or 0.5
    low, high = min(values) - room, max(values) + room
    ticks = tuple(tick for tick in linear_ticks(low, high, axis.whole) if low <= tick <= high)
    return Scale(low, high, start, end, ticks)


def up(values: Sequence[float], axis: Axis, start: float, end: float) -> Scale:
    """Return the vertical scale, from the first tick to the last."""
    low, high = min(values), max(values)
    if axis.from_zero:
        low = min(low, 0.0)
    ticks = (log_ticks if axis.log else linear_ticks)(low, high)
    return Scale(ticks[0], ticks[-1], start, end, tuple(ticks), axis.log)


def linear_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return round values, about a fifth of the range apart, from at most `low` to at least `high`."""
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-6 * largest, LEAST):
        low -= max(largest / 10, LEAST)
    rough = (high - low) / 5
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough * 0.999)
    step = max(1.0, step) if whole else step
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from at most `low` to at least `high`, with 2 and 5 between them in a small range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
    if last - first > 3:
        stride = math.ceil((last - first) / 8)
        return [10.0**i for i in range(first, last + stride, stride)]
    ticks = [factor * 10.0**i for i in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(i for i, tick in enumerate(ticks) if tick <= low or i == 0)
    end = next(i for i, tick in enumerate(ticks) if tick >= high and i > start)
    return ticks[start : end + 1]
