"""Charts as inline SVG figures, and the HTML page and style sheet that hold them.

Colours are CSS classes, `s0` to `s5` for series and `c0` to `c6` for cells, so that one drawing serves light screens,
dark screens and paper. Series differ in mark and dash as well as in colour.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 14, 48
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
SHADES = 7
CELL_WIDTH, CELL_HEIGHT = 28.0, 18.0
HEATMAP_HEIGHT = 460
# Values from MOST up count as missing, like NaN. Values up to LEAST are rounding errors; log scales leave them out.
MOST, LEAST = 1e100, 1e-12

STYLE = """
:root{color-scheme:light;--page:#fff;--ink:#1c2733;--soft:#5b6875;--rule:#d5dce3;--mark:#eef3f8;
--s0:#0072b2;--s1:#c24e00;--s2:#007f5f;--s3:#a8508a;--s4:#946200;--s5:#444c55;
--c0:#e3eefa;--c1:#c6dbef;--c2:#9ecae1;--c3:#6baed6;--c4:#4292c6;--c5:#2171b5;--c6:#08306b}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;--page:#11171d;--ink:#e2e8ee;--soft:#9fabb7;
--rule:#333e49;--mark:#1c2732;--s0:#56b4e9;--s1:#f58a4b;--s2:#2cc99a;--s3:#e39bc5;--s4:#e6b84d;--s5:#c3cad1;
--c0:#14273d;--c1:#1b3a5e;--c2:#23548a;--c3:#2f74b5;--c4:#5598d0;--c5:#8dbfe6;--c6:#d9ebfb}}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{margin:0 auto;padding:1.5rem;max-width:56rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{margin:0}h2{margin:2.2rem 0 .5rem;border-bottom:1px solid var(--rule)}h3{font-size:1rem;margin:0 0 .3rem}
figure{margin:1.2rem 0;break-inside:avoid}figcaption,caption,.soft{color:var(--soft);text-align:left;font-size:.9rem}
dl{display:grid;grid-template-columns:minmax(9rem,max-content) 1fr;gap:.15rem 1.2rem;margin:.6rem 0}
dt{color:var(--soft)}dd{margin:0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left}tr.chosen{background:var(--mark);font-weight:600}
details{margin:.8rem 0}summary{cursor:pointer}details table{font-size:.85rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:0;padding:0;list-style:none;font-size:.85rem}
.legend li{overflow-wrap:normal;display:flex;align-items:center;gap:.35rem}
.key{width:32px;height:14px}.swatch{width:14px;height:14px}
svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg text.axis,svg text.label{fill:var(--ink)}
.label{paint-order:stroke;stroke:var(--page);stroke-width:3px}
.grid,.frame{fill:none;stroke:var(--rule)}.cells{shape-rendering:crispEdges}
.line{fill:none;stroke:currentColor;stroke-width:1.6}.mark{fill:currentColor;stroke:currentColor;stroke-width:1.4}
.mark.hollow{fill:var(--page)}
@media print{h2{break-after:avoid}body{max-width:none;padding:0}.wide{overflow:visible}
table,details table{font-size:8pt}th,td{padding:.1rem .35rem}}
""" + "".join(
    [f".s{i}{{color:var(--s{i})}}" for i in range(len(MARKS))]
    + [f".c{i}{{fill:var(--c{i});background:var(--c{i})}}" for i in range(SHADES)]
)


@dataclass(frozen=True)
class Point:
    """A mark of a series, with a tooltip and an optional label."""

    x: float
    y: float
    tip: str
    label: str = ""  # drawn next to the mark
    hollow: bool = False  # whether the mark is an outline


@dataclass(frozen=True)
class Series:
    """Points that share a name, colour and mark, joined by a line if `joined`."""

    name: str
    slot: int  # of colour, mark and dash
    points: Sequence[Point]
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """The title and kind of an axis."""

    title: str
    log: bool = False
    whole: bool = False  # ticks at whole numbers only


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


def page(name: str, *parts: str) -> str:
    """Return an HTML page; `name` is its title and gets escaped, `parts` are markup."""
    title = text(name)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = element("body", element("h1", title), *parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{element("style", STYLE)}</head>{body}</html>\n'


def finite(value: object) -> float | None:
    """Return `value` as a float, or None if it is not a number that can be shown."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < MOST else None


def number(value: object, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits, or a dash if it cannot be shown; an int keeps all digits."""
    shown = finite(value)
    if shown is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{shown:.{digits}g}"


def element(name: str, *children: str, **attributes: object) -> str:
    """Return an HTML element.

    Attribute values get escaped. In attribute names `class_` means class, and other underscores become hyphens.
    Children are markup; escape text with `text`.
    """
    listed = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    return f"<{name}{listed}>{''.join(children)}</{name}>"


def text(value: object) -> str:
    """Return `value` as escaped text, a float with up to two decimals."""
    return html.escape(_short(value) if isinstance(value, float) else str(value))


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


def plot(title: str, series: Sequence[Series], x: Axis, y: Axis, caption: str = "") -> str:
    """Return a figure of lines or separate marks, or "" if there are no points to draw."""
    shown = [Series(s.name, s.slot, [p for p in s.points if p.y > LEAST or not y.log], s.joined) for s in series]
    shown = [s for s in shown if s.points]
    if not shown:
        return ""
    points = [point for s in shown for point in s.points]
    across, up = _across([p.x for p in points], x), _up([p.y for p in points], y)
    hidden = sum(len(s.points) for s in series) - len(points)
    if hidden:
        caption = f"{caption} Not shown on the logarithmic scale, being 0 or less: {hidden}.".strip()
    drawing = (_grid(across, up), _axis_titles(x.title, y.title, HEIGHT), *(_series(s, across, up) for s in shown))
    legend = [(_key(s.slot), s.name) for s in shown]
    ranges = (f"{s.name}: {_extent(p.y for p in s.points)} over {len(s.points)} points" for s in shown)
    description = f"{y.title} against {x.title}. {'; '.join(ranges)}."
    return figure(title, description, legend, drawing, HEIGHT, caption)


def heatmap(
    title: str,
    rows: Mapping[int, Sequence[float | None]],
    tip: Callable[[int, int], str],
    power: float = 1.0,
    caption: str = "",
) -> str:
    """Return a figure with one row of cells per layer, or "" if all values are missing.

    `tip` gives the tooltip of (layer, column). A `power` below 1 gives small values more of the shades.
    """
    known = [value for row in rows.values() for value in row if value is not None]
    if not known:
        return ""
    low, span, columns = min(known), max(known) - min(known), max(map(len, rows.values()))
    width = min(CELL_WIDTH, (WIDTH - LEFT - RIGHT) / columns)
    height = min(CELL_HEIGHT, HEATMAP_HEIGHT / len(rows))

    def shade(value: float) -> int:
        return min(SHADES - 1, int(SHADES * ((value - low) / span) ** power)) if span else 0

    cells = "".join(
        f'<path class="c{shade(value)}" d="M{column} {i}h1v1h-1z"><title>{text(tip(layer, column))}</title></path>'
        for i, (layer, row) in enumerate(rows.items())
        for column, value in enumerate(row)
        if value is not None
    )
    bottom = TOP + height * len(rows)
    drawing = (
        element("g", cells, class_="cells", transform=f"translate({LEFT} {TOP}) scale({width:.4f} {height:.4f})"),
        element("rect", class_="frame", x=LEFT, y=TOP, width=width * columns, height=bottom - TOP),
        *(_row_label(str(layer), TOP + height * (i + 0.5)) for i, layer in _every(list(rows), 14 / height)),
        *(_column_label(str(i), LEFT + width * (i + 0.5), bottom) for i, _ in _every(range(columns), 34 / width)),
        _axis_titles("expert", "layer", bottom + BOTTOM, LEFT + width * columns),
    )
    bounds = [low + span * (i / SHADES) ** (1 / power) for i in range(SHADES if span else 1)]
    legend = [(element("span", class_=f"swatch c{i}"), f"from {number(v, 2)}") for i, v in enumerate(bounds)]
    description = f"{_extent(known)} over {len(rows)} layers of up to {columns} experts."
    return figure(title, description, legend, drawing, bottom + BOTTOM, caption)


def figure(
    title: str,
    description: str,
    legend: Iterable[tuple[str, str]],
    drawing: Iterable[str],
    height: float,
    caption: str = "",
) -> str:
    """Return a drawing with its text alternative, the legend above it and the caption below."""
    keys = "".join(element("li", key, text(name)) for key, name in legend)
    alternative = element("title", text(title)) + element("desc", text(f"{description} {caption}".strip()))
    picture = element("svg", alternative, *drawing, role="img", viewBox=f"0 0 {WIDTH} {_short(height)}")
    below = element("figcaption", text(caption)) if caption else ""
    return element("figure", element("h3", text(title)), element("ul", keys, class_="legend"), picture, below)


def _across(values: Sequence[float], axis: Axis) -> Scale:
    """Return the horizontal scale: the range of the values and a small margin."""
    room = (max(values) - min(values)) * 0.03 or 0.5
    low, high = min(values) - room, max(values) + room
    ticks = tuple(tick for tick in linear_ticks(low, high, axis.whole) if low <= tick <= high)
    return Scale(low, high, LEFT, WIDTH - RIGHT, ticks)


def _up(values: Sequence[float], axis: Axis) -> Scale:
    """Return the vertical scale, from the first tick to the last."""
    ticks = (log_ticks if axis.log else linear_ticks)(min(values), max(values))
    return Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, tuple(ticks), axis.log)


def _grid(across: Scale, up: Scale) -> str:
    lines = [f"M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}" for tick in up.ticks]
    lines += [f"M{across(tick):.1f} {TOP}V{HEIGHT - BOTTOM}" for tick in across.ticks]
    labels = [_row_label(number(tick), up(tick)) for tick in up.ticks]
    labels += [_column_label(number(tick), across(tick), HEIGHT - BOTTOM) for tick in across.ticks]
    return element("path", class_="grid", d="".join(lines)) + "".join(labels)


def _series(series: Series, across: Scale, up: Scale) -> str:
    places = [(across(p.x), up(p.y)) for p in series.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    line = element("path", class_="line", d=path, stroke_dasharray=DASHES[series.slot % len(DASHES)])
    size = 1.0 if len(places) <= MANY_POINTS else 0.6
    marks = (_mark(point, series.slot, x, y, size) for point, (x, y) in zip(series.points, places, strict=True))
    return element("g", line if series.joined and len(places) > 1 else "", *marks, class_=_color(series.slot))


def _mark(point: Point, slot: int, x: float, y: float, size: float) -> str:
    shape = element(
        "path",
        element("title", text(point.tip)),
        class_="mark hollow" if point.hollow else "mark",
        d=MARKS[slot % len(MARKS)],
        transform=f"translate({x:.1f} {y:.1f}) scale({size:g})",
    )
    if not point.label:
        return shape
    anchor, beside = ("end", x - 9) if x > WIDTH * 0.7 else ("start", x + 9)
    return shape + element("text", text(point.label), class_="label", x=beside, y=y - 6, text_anchor=anchor)


def _key(slot: int) -> str:
    """Return the mark and line of a series for the legend."""
    line = element("path", class_="line", d="M0 7H32", stroke_dasharray=DASHES[slot % len(DASHES)])
    mark = element("path", class_="mark", d=MARKS[slot % len(MARKS)], transform="translate(16 7)")
    return element("svg", line, mark, class_=f"key {_color(slot)}", viewBox="0 0 32 14", aria_hidden="true")


def _color(slot: int) -> str:
    return f"s{slot % len(MARKS)}"


def _row_label(label: str, y: float) -> str:
    return element("text", text(label), x=LEFT - 7, y=y + 4, text_anchor="end")


def _column_label(label: str, x: float, bottom: float) -> str:
    return element("text", text(label), x=x, y=bottom + 16, text_anchor="middle")


def _axis_titles(x: str, y: str, height: float, right: float = WIDTH - RIGHT) -> str:
    middle = (TOP + height - BOTTOM) / 2
    turned = f"translate(14 {middle:.1f}) rotate(-90)"
    below = element("text", text(x), x=(LEFT + right) / 2, y=height - 8, text_anchor="middle", class_="axis")
    return below + element("text", text(y), transform=turned, text_anchor="middle", class_="axis")


def _extent(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{number(ordered[0])} to {number(ordered[-1])}"


def _every(items: Sequence[int], least: float) -> list[tuple[int, int]]:
    """Return (index, item) of every n-th item, where n is a round number of at least `least`."""
    stride = next((s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128) if s >= least), math.ceil(least))
    return list(enumerate(items))[::stride]


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
