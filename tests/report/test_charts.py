"""Charts: their scales, and text that stays legible on a small phone."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from compile_kit import Page
from report.kit import findings

from dymoe_compile.report.page import render
from dymoe_runtime.tools.charts.markup import STYLE
from dymoe_runtime.tools.charts.numbers import kl, number, percent, size
from dymoe_runtime.tools.charts.plot import MAX_COLUMNS, Figure, Layer, Point, Series, plot, stack
from dymoe_runtime.tools.charts.scales import Axis, linear_ticks, log_ticks

# CSS pixels of a small phone's screen, and of the page's margins there.
SCREEN, MARGINS = 375, 32
SMALLEST_TEXT = 11


@pytest.mark.parametrize("seed", range(200))
def test_ticks_enclose_their_values(seed: int) -> None:
    rng = random.Random(seed)
    low = 10 ** rng.uniform(-11, 6)
    high = low * rng.choice([1, 1 + 1e-15, 1.001, 3, 1e3, 1e9])
    for ticks, ends in (
        (log_ticks(low, high), (low, high)),
        (linear_ticks(low, high), (low, high)),
        (linear_ticks(-high, low), (-high, low)),
    ):
        assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 16
        slack = 1e-9 * max(map(abs, ticks))
        assert ticks[0] <= ends[0] + slack and ticks[-1] >= ends[1] - slack


@pytest.mark.parametrize(("layers", "experts"), [(6, 8), (48, 128)])
def test_text_of_drawings_is_legible_on_a_phone(layers: int, experts: int) -> None:
    """Drawings shrink to the screen with their text; all other text has a size of its own."""
    page = render(findings(layers, experts))
    drawn = re.search(r"svg text\{font:(\d+)px", page)
    widths = [float(width) for width in re.findall(r'class="plot" viewBox="0 0 ([\d.]+) ', page)]
    assert drawn is not None and len(widths) == 5
    assert min(int(drawn[1]) * (SCREEN - MARGINS) / width for width in widths) >= SMALLEST_TEXT
    for amount, unit in re.findall(
        r"font(?:-size)?:(?:[a-z]+ )?([\d.]+)(px|rem|em)", STYLE.partition("@media print")[0]
    ):
        assert float(amount) * {"px": 1, "rem": 16, "em": 16}[unit] >= SMALLEST_TEXT, (amount, unit)


@pytest.mark.parametrize("low", [1e-9, 0.0012, 1.0, 123456.0])
@pytest.mark.parametrize("reach", [1.5, 1e3, 1e6])
@pytest.mark.parametrize("log", [True, False])
def test_labels_of_an_axis_keep_apart_and_inside(low: float, reach: float, log: bool) -> None:
    points = [Point(i, low * reach ** (i / 47), "") for i in range(48)]
    figure = plot(Figure("a"), [Series("s", 0, points)], Axis("x", whole=True), Axis("y", log=log))
    labels = re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" text-anchor="end">([^<]*)</text>', figure)
    heights = sorted(float(y) for _, y, _ in labels)
    assert len(heights) >= 2 and all(after - before >= SMALLEST_TEXT for before, after in itertools.pairwise(heights))
    assert all(float(x) - 6.6 * len(text) >= 0 for x, _, text in labels)  # about the width of a digit of 12 pixels


def test_a_stack_adds_up() -> None:
    heights = [[1.0, 2.0, 3.0], [4.0, 0.0, 1.0]]
    layers = [Layer(name, i, row) for i, (name, row) in enumerate(zip(("low", "high"), heights, strict=True))]
    figure = stack(Figure("Parts"), layers, Axis("token", whole=True), Axis("ms", from_zero=True))
    Page(f"<div>{figure}</div>")
    tips = re.findall(r"<title>(token[^<]*)</title>", figure)
    assert tips == ["token 0: 5 (low 1, high 4)", "token 1: 2 (low 2, high 0)", "token 2: 4 (low 3, high 1)"]
    low, high = re.findall(r'class="area s\d" d="M([^"]*)z"', figure)
    tops = [float(pair.split()[1]) for pair in low.split("L")][:6]
    bottoms = [float(pair.split()[1]) for pair in high.split("L")][6:]
    assert tops == bottoms[::-1]  # the upper layer stands on the lower


def test_a_long_stack_is_drawn_as_means() -> None:
    count = 10 * MAX_COLUMNS + 1
    figure = stack(Figure("Parts"), [Layer("one", 0, [1.0] * count)], Axis("token", whole=True), Axis("ms"))
    assert len(re.findall(r"<title>token", figure)) <= MAX_COLUMNS
    assert "mean of 11 in a row" in figure
    assert stack(Figure("Parts"), [Layer("none", 0, [])], Axis("token"), Axis("ms")) == ""


def test_numbers_have_one_format_each() -> None:
    assert [size(n) for n in (0, 999, 1000, 1 << 20, 999.6 * 2**20, 5.5 * 2**40)] == [
        "0\xa0B",
        "999\xa0B",
        "0.977\xa0KiB",
        "1.00\xa0MiB",
        "0.976\xa0GiB",
        "5,632\xa0GiB",
    ]
    assert [kl(n) for n in (0, 0.05845, 0.00352, 0.000123, 2.5, None)] == [
        "0",
        "0.0585",
        "0.0035",
        "0.00012",
        "2.5000",
        "–",
    ]
    assert [percent(n) for n in (1, 0.95869, 0.0004, float("nan"))] == ["100.0%", "95.9%", "0.0%", "–"]
    assert [number(n) for n in (32768, 1234.5, 0.5, 1e-9, True)] == ["32,768", "1,230", "0.5", "1e-09", "–"]
