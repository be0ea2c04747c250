"""Heat maps: a cell for each expert of each layer, as wide as the page, with labels that keep their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from dymoe_runtime.tools.charts.markup import SHADES, element, short, text

# Pixels of a cell at most, and of all rows about.
CELL_WIDTH, CELL_HEIGHT, HEIGHT = 44, 18, 420
# Pixels between labels, at least, where all columns have the width of a small phone's page.
LABEL_HEIGHT, LABEL_WIDTH, PHONE = 15, 30, 290
LABELS = 38  # pixels left of the cells


def heatmap(
    title: str,
    rows: Mapping[int, Sequence[float | None]],
    show: Callable[[float], str],
    tip: Callable[[int, int], str],
    power: float = 1.0,
    caption: str = "",
) -> str:
    """Return a figure with one row of cells per layer, or "" if all values are missing.

    `show` gives the text of a value, `tip` the tooltip of (layer, column). A `power` below 1 gives small values more of
    the shades.
    """
    known = [value for row in rows.values() for value in row if value is not None]
    if not known:
        return ""
    low, high, columns = min(known), max(known), max(map(len, rows.values()))
    span, height = high - low, min(CELL_HEIGHT, max(6.0, HEIGHT / len(rows)))

    def shade(value: float) -> int:
        return min(SHADES - 1, int(SHADES * ((value - low) / span) ** power)) if span else 0

    cells = "".join(
        f'<path class="c{shade(value)}" d="M{column} {i}h1v1h-1z"><title>{text(tip(layer, column))}</title></path>'
        for i, (layer, row) in enumerate(rows.items())
        for column, value in enumerate(row)
        if value is not None
    )
    description = f"{show(low)} to {show(high)} over {len(rows)} layers of up to {columns} experts. {caption}"
    tall = f"height:{short(height * len(rows))}px"
    picture = element(
        "svg",
        element("title", text(title)),
        element("desc", text(description.strip())),
        cells,
        role="img",
        viewBox=f"0 0 {columns} {len(rows)}",
        preserveAspectRatio="none",
        style=tall,
    )
    down = [
        element("span", text(str(layer)), style=f"top:{short(100 * (i + 0.5) / len(rows))}%")
        for i, layer in _every(list(rows), LABEL_HEIGHT / height)
    ]
    along = [
        element("span", text(str(i)), style=f"left:{short(100 * (i + 0.5) / columns)}%")
        for i, _ in _every(range(columns), LABEL_WIDTH / min(CELL_WIDTH, PHONE / columns))
    ]
    whole = element(
        "div",
        element("div", *down, style=tall, aria_hidden="true"),
        picture,
        element("div", class_="corner"),
        element("div", *along, class_="columns", aria_hidden="true"),
        class_="heat",
        style=f"max-width:{LABELS + CELL_WIDTH * columns}px",
    )
    ramp = element("span", *(element("span", class_=f"swatch c{i}") for i in range(SHADES)), class_="ramp")
    scale = element("p", text(show(low)), ramp, text(show(high)), class_="soft") if span else ""
    ways = "Rows are layers, the first at the top; columns are experts."
    return element(
        "figure", element("h3", text(title)), scale, whole, element("figcaption", text(f"{ways} {caption}".strip()))
    )


def _every(items: Sequence[int], least: float) -> list[tuple[int, int]]:
    """Return (index, item) of every n-th item, where n is a round number of at least `least`."""
    stride = next((s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128) if s >= least), math.ceil(least))
    return list(enumerate(items))[::stride]
