"""Charts of lines, separate marks and stacked areas as inline SVG.

A drawing is as wide as a small phone, so that its text stays legible there, and grows with the screen. Series differ in
mark and dash as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dymoe_runtime.tools.charts.markup import SERIES, element, short, text
from dymoe_runtime.tools.charts.scales import LEAST, Axis, Scale, across, up

# Marks of the series as SVG paths around the origin: circle, square, triangle, diamond, triangle down, bar.
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-5l4.5 8h-9z",
    "M0-5l5 5l-5 5l-5-5z",
    "M0 5l4.5-8h-9z",
    "M-5-2h10v4h-10z",
)
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 4", "1 4")
# Marks of longer series are drawn smaller, so that they do not cover each other.
MANY_POINTS = 24
# Width of a digit of a label, and distance of two labels of the vertical axis, at least.
DIGIT_WIDTH, LABEL_HEIGHT = 7.2, 18
# Most characters of a mark's label.
MAX_LABEL = 24
# Most columns of a stack; more items than that are drawn as means of neighbours.
MAX_COLUMNS = 150


@dataclass(frozen=True)
class Frame:
    """The size of a drawing, and the margins around what is plotted."""

    width: float = 340
    height: float = 236
    left: float = 30  # or as much as the labels of the vertical axis need
    right: float = 12
    top: float = 26
    bottom: float = 38


PHONE = Frame()


@dataclass(frozen=True)
class Point:
    """A mark of a series, with a tooltip and an optional label."""

    x: float
    y: float
    tip: str
    label: str = ""  # drawn next to the mark
    hollow: bool = False  # whether the mark is an outline
    label_below: bool = False


@dataclass(frozen=True)
class Series:
    """Points that share a name, colour and mark, joined by a line if `joined`; `about` explains it in the legend."""

    name: str
    slot: int  # of colour, mark and dash
    points: Sequence[Point]
    joined: bool = True
    about: str = ""


@dataclass(frozen=True)
class Figure:
    """The title of a drawing, the sentence below it, and whether there is room for a legend beside it."""

    title: str
    caption: str = ""
    beside: bool = False
    frame: Frame = field(default=PHONE)


def plot(figure: Figure, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Return a figure of lines or separate marks, or "" if there are no points to draw."""
    shown = [
        Series(s.name, s.slot, [p for p in s.points if p.y > LEAST or not y.log], s.joined, s.about) for s in series
    ]
    shown = [s for s in shown if s.points]
    if not shown:
        return ""
    points = [point for s in shown for point in s.points]
    frame, scales = _fitted(figure.frame, [p.x for p in points], [p.y for p in points], x, y)
    hidden = sum(len(s.points) for s in series) - len(points)
    unseen = f" Not shown on the logarithmic scale, being 0 or less: {hidden}." if hidden else ""
    drawing = (_grid(frame, scales, x, y), *(_series(s, scales, frame) for s in shown))
    legend = [(_key(s.slot, s.joined), s.name, s.about) for s in shown]
    ranges = (f"{s.name}: {_extent(y, (p.y for p in s.points))} over {len(s.points)} points" for s in shown)
    description = f"{y.title} against {x.title}. {'; '.join(ranges)}."
    return _figure(figure, description, legend, drawing, figure.caption + unseen)


@dataclass(frozen=True)
class Layer:
    """One part of each column of a stack."""

    name: str
    slot: int
    heights: Sequence[float]
    about: str = ""


def stack(figure: Figure, layers: Sequence[Layer], x: Axis, y: Axis, first: int = 0) -> str:
    """Return a figure of columns that are divided into layers, the first at the bottom, or "" if there are none.

    All layers have the same number of heights, that of columns; `first` is the number of the first column. Of more
    than MAX_COLUMNS, neighbours are drawn as their mean.
    """
    count = len(layers[0].heights) if layers else 0
    if not count:
        return ""
    each = -(-count // MAX_COLUMNS)
    groups = [range(start, min(start + each, count)) for start in range(0, count, each)]
    means = [[sum(layer.heights[i] for i in group) / len(group) for group in groups] for layer in layers]
    tops = [[sum(column[: level + 1]) for column in zip(*means, strict=True)] for level in range(len(layers))]
    low, high = first - 0.5, first + count - 0.5
    frame, reach = _fitted(figure.frame, [low, high], [0.0, max(max(row) for row in tops)], x, y)
    horizontal = Scale(
        low, high, frame.left, frame.width - frame.right, tuple(t for t in reach[0].ticks if low <= t <= high)
    )
    scales = (horizontal, reach[1])
    edges = [(horizontal(first + group.start - 0.5), horizontal(first + group.stop - 0.5)) for group in groups]
    drawn = [
        _area(layer.slot, edges, [scales[1](v) for v in top], [scales[1](v) for v in below])
        for layer, top, below in zip(layers, tops, [[0.0] * len(groups), *tops[:-1]], strict=True)
    ]
    tips = [
        _column_tip(
            edge, frame, f"{_named(x.title, first + group.start, first + group.stop - 1)}: {_parts(layers, parts, y)}"
        )
        for edge, group, parts in zip(edges, groups, zip(*means, strict=True), strict=True)
    ]
    legend = [(_swatch(layer.slot), layer.name, layer.about) for layer in reversed(layers)]
    ranges = (f"{layer.name}: {_extent(y, layer.heights)}" for layer in layers)
    description = f"{y.title} against {x.title}, {count} columns. {'; '.join(ranges)}."
    merged = f" Each column is the mean of {each} in a row." if each > 1 else ""
    return _figure(figure, description, legend, (_grid(frame, scales, x, y), *drawn, *tips), figure.caption + merged)


def _figure(
    figure: Figure, description: str, legend: Iterable[tuple[str, str, str]], drawing: Iterable[str], caption: str
) -> str:
    """Return a drawing with its text alternative, and legend and caption beside or below it."""
    keys = "".join(
        element("li", key, element("span", element("b", text(name)), text(f": {about}" if about else "")))
        for key, name, about in legend
    )
    alternative = element("title", text(figure.title)) + element("desc", text(f"{description} {caption}".strip()))
    box = f"0 0 {short(figure.frame.width)} {short(figure.frame.height)}"
    picture = element("svg", alternative, *drawing, role="img", class_="plot", viewBox=box)
    below = element("figcaption", text(caption.strip())) if caption.strip() else ""
    kind = {"class_": "beside"} if figure.beside else {}
    heading = element("h3", text(figure.title))
    return element("figure", heading, picture, element("ul", keys, class_="legend"), below, **kind)


def _fitted(
    frame: Frame, xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis
) -> tuple[Frame, tuple[Scale, Scale]]:
    """Return the frame with room for the labels of the vertical axis, and the scales of both axes."""
    vertical = up(ys, y, frame.height - frame.bottom, frame.top)
    room = max(_width(y.label(tick)) for tick in vertical.ticks) + 8
    frame = replace(frame, left=max(frame.left, room))
    return frame, (across(xs, x, frame.left, frame.width - frame.right), vertical)


def _width(label: str) -> float:
    """Return about how many pixels the label of a tick takes."""
    return DIGIT_WIDTH * (len(label) + 0.6 * label.count("%"))


def _grid(frame: Frame, scales: tuple[Scale, Scale], x: Axis, y: Axis) -> str:
    horizontal, vertical = scales
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    lines = [f"M{short(frame.left)} {vertical(tick):.1f}H{short(right)}" for tick in vertical.ticks]
    lines += [f"M{horizontal(tick):.1f} {short(frame.top)}V{short(bottom)}" for tick in horizontal.ticks]
    every = math.ceil(LABEL_HEIGHT * (len(vertical.ticks) - 1) / (bottom - frame.top)) or 1
    labels = [_row_label(y.label(tick), frame.left, vertical(tick)) for tick in vertical.ticks[::every]]
    names = [x.label(tick) for tick in horizontal.ticks]
    wide = max(map(_width, names), default=0) + 10
    apart = math.ceil(wide * max(len(names) - 1, 1) / (right - frame.left))
    labels += [
        _column_label(name, horizontal(tick), bottom)
        for name, tick in list(zip(names, horizontal.ticks, strict=True))[::apart]
    ]
    titles = element("text", text(y.title), x=4, y=13, class_="axis")
    middle = (frame.left + right) / 2
    titles += element("text", text(x.title), x=middle, y=frame.height - 6, text_anchor="middle", class_="axis")
    return element("path", class_="grid", d="".join(lines)) + "".join(labels) + titles


def _series(series: Series, scales: tuple[Scale, Scale], frame: Frame) -> str:
    places = [(scales[0](p.x), scales[1](p.y)) for p in series.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    line = element("path", class_="line", d=path, stroke_dasharray=DASHES[series.slot % len(DASHES)])
    size = 1.0 if len(places) <= MANY_POINTS else 0.6
    marks = (_mark(p, series.slot, x, y, size, frame) for p, (x, y) in zip(series.points, places, strict=True))
    return element("g", line if series.joined and len(places) > 1 else "", *marks, class_=_color(series.slot))


def _mark(point: Point, slot: int, x: float, y: float, size: float, frame: Frame) -> str:
    shape = element(
        "path",
        element("title", text(point.tip)),
        class_="mark hollow" if point.hollow else "mark",
        d=MARKS[slot % len(MARKS)],
        transform=f"translate({x:.1f} {y:.1f}) scale({size:g})",
    )
    if not point.label:
        return shape
    anchor, beside = ("end", x - 8) if x > frame.width * 0.6 else ("start", x + 8)
    lower = min(y + 17, frame.height - frame.bottom - 4) if point.label_below else y - 6
    label = point.label if len(point.label) <= MAX_LABEL else f"{point.label[: MAX_LABEL - 1]}…"
    return shape + element("text", text(label), class_="label", x=beside, y=lower, text_anchor=anchor)


def _area(slot: int, edges: Sequence[tuple[float, float]], tops: Sequence[float], bottoms: Sequence[float]) -> str:
    """Return one layer of a stack: its columns' tops from left to right, and back along their bottoms."""
    there = "L".join(f"{a:.1f} {y:.1f}L{b:.1f} {y:.1f}" for (a, b), y in zip(edges, tops, strict=True))
    back = [f"{b:.1f} {y:.1f}L{a:.1f} {y:.1f}" for (a, b), y in zip(edges, bottoms, strict=True)]
    return element("path", class_=f"area {_color(slot)}", d=f"M{there}L{'L'.join(reversed(back))}z")


def _column_tip(edge: tuple[float, float], frame: Frame, tip: str) -> str:
    left, right = edge
    shape = f"M{left:.1f} {short(frame.top)}H{right:.1f}V{short(frame.height - frame.bottom)}H{left:.1f}z"
    return element("path", element("title", text(tip)), class_="tip", d=shape)


def _named(name: str, first: int, last: int) -> str:
    return f"{name} {first}" if first == last else f"{name} {first} to {last}"


def _parts(layers: Sequence[Layer], heights: Sequence[float], axis: Axis) -> str:
    listed = (f"{layer.name} {axis.label(height)}" for layer, height in zip(layers, heights, strict=True))
    return f"{axis.label(sum(heights))} ({', '.join(listed)})"


def _key(slot: int, joined: bool) -> str:
    """Return the mark and line of a series for the legend."""
    line = element("path", class_="line", d="M0 7H32", stroke_dasharray=DASHES[slot % len(DASHES)]) if joined else ""
    mark = element("path", class_="mark", d=MARKS[slot % len(MARKS)], transform="translate(16 7)")
    return element("svg", line, mark, class_=f"key {_color(slot)}", viewBox="0 0 32 14", aria_hidden="true")


def _swatch(slot: int) -> str:
    shape = element("path", class_="area", d="M0 0h14v14h-14z")
    return element("svg", shape, class_=f"swatch {_color(slot)}", viewBox="0 0 14 14", aria_hidden="true")


def _color(slot: int) -> str:
    return f"s{slot % SERIES}"


def _row_label(label: str, left: float, y: float) -> str:
    return element("text", text(label), x=left - 6, y=y + 4, text_anchor="end")


def _column_label(label: str, x: float, bottom: float) -> str:
    return element("text", text(label), x=x, y=bottom + 15, text_anchor="middle")


def _extent(axis: Axis, values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{axis.label(ordered[0])} to {axis.label(ordered[-1])}"
