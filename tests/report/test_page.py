"""The page of a compilation: well formed, self-contained, safe with any text, whole with any gaps."""

from __future__ import annotations

import html
import itertools
import json
import random
import re

import pytest
from compile_kit import Page
from report.kit import example, findings, strings_replaced, tortured

from dymoe_compile.report.inside import excess
from dymoe_compile.report.memory import Memory
from dymoe_compile.report.page import render
from dymoe_runtime.tools.charts.markup import STYLE
from dymoe_runtime.tools.charts.numbers import fixed, kl, percent, size

HOSTILE = "</title><script>alert(\"1\")</script><img src=x onerror='y'>&amp;"
# Text that would be shown in another order than it has, and other characters that nobody sees.
UNSEEN = "a\u202eb\u2066c\x07d\x1be\u2028f"
SECTIONS = (
    "Which point for which memory",
    "How fast it can be",
    "How good it is",
    "Inside the model",
    "How it was made",
    "Words",
)
# Charts by their headings, those of a plain model first.
PLAIN = ("Quality against size",)
CHARTS = (
    *PLAIN,
    "Read from the disk per token",
    "Sensitivity of each layer",
    "Prefetch: guesses that were right",
    "Experts that stay chosen",
    "Importance of experts",
    "Error of experts at 2 bits",
)


def headings(page: str) -> list[str]:
    return re.findall("<h2[^>]*>([^<]*)</h2>", page)


@pytest.mark.parametrize(
    ("layers", "experts", "dense"),
    [(6, 8, (0,)), (1, 8, ()), (6, 1, ()), (1, 1, ()), (3, 4, (0, 1, 2)), (8, 5, (1, 3, 5, 7)), (48, 128, ())],
)
def test_pages_are_well_formed_and_ask_for_nothing(layers: int, experts: int, dense: tuple[int, ...]) -> None:
    page = render(findings(layers, experts, dense))
    parsed = Page(page)
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(parsed.tags)
    assert "default-src &#x27;none&#x27;" in page  # whatever else there was, a browser would not fetch it
    targets = {value for name, value in parsed.attributes if name == "id"}
    links = [value for name, value in parsed.attributes if name in ("href", "src")]
    assert links and all(link.startswith("#") and link[1:] in targets for link in links)
    assert all(not name.startswith("on") for name, _ in parsed.attributes)
    left = [title for title in SECTIONS if len(dense) < layers or title in SECTIONS[2:3] + SECTIONS[4:]]
    assert headings(page) == left


def test_what_people_choose_by_comes_first() -> None:
    found = findings()
    texts = Page(render(found).partition("<nav")[0] + "</header></body></html>").texts
    for figure in ("original_bytes", "bundle_bytes"):
        assert size(found["storage"][figure]) in texts
    assert size(found["memory"]["floor_bytes"]) in texts
    assert percent(found["points"][-1]["top1_agreement"]) in texts


def test_headings_and_tables_are_structured() -> None:
    page = render(findings())
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert '<html lang="en">' in page and page.count("<main>") == 1
    assert page.count("<th ") == page.count('<th scope="')
    assert page.count("<caption>") + page.count('class="cards"') >= page.count('class="scroll"') > 0


def test_every_chart_has_a_text_alternative() -> None:
    page = render(findings())
    charts = re.findall(r'<svg role="img"[^>]*>|<svg [^>]*role="img"[^>]*>', page)
    assert len(charts) == len(CHARTS)
    for title in CHARTS:
        assert re.search(rf'<svg [^>]*role="img"[^>]*><title>{title}</title><desc>\S', page), title


def test_operating_points_are_listed_with_their_numbers() -> None:
    found = findings()
    rows = Page(render(found)).rows
    for expected in found["points"]:
        name = expected["name"] + (" (default)" if expected["name"] == found["default_point"] else "")
        shown = {
            fixed(expected["effective_bits"], 2),
            size(expected["bytes_per_token"]),
            percent(expected["top1_agreement"]),
            kl(expected["kl"]),
            fixed(expected["nll"], 3),
        }
        assert any(row[0] == name and shown <= set(row) for row in rows)


def test_dense_bits_and_what_fewer_cost_are_told() -> None:
    page = render(findings())
    assert "8: attn, lm_head; 16: embed" in page
    assert "attn 0.0012 at 6 bits" in page and "attn 0.0456 at 4 bits" in page


def test_a_point_measured_twice_is_drawn_once() -> None:
    page = render(findings())
    assert page.count("<title>2.75 (mixed)") == 1


def test_sensitivity_is_what_a_layer_adds_to_the_floor() -> None:
    layers = [
        {"layer": 0, "sensitivity": {"2": 0.03, "3": 0.01, "4": 0.003}},
        {"layer": 1, "sensitivity": {}},
        {"layer": 2, "sensitivity": {"2": 0.02, "3": None, "4": 0.003}},
    ]
    lines, floor = excess(layers)
    assert floor == 0.003
    assert lines == {"2 bits": {0: 0.03 - 0.003, 2: 0.02 - 0.003}, "3 bits": {0: 0.01 - 0.003, 2: None}}
    page = render({"layers": layers})
    assert "All at 4 bits have a KL of 0.0030, the floor" in page and "layer 0, 2 bits: 0.0270" in page


def test_recall_is_that_of_as_many_guesses_as_a_token_has_experts() -> None:
    found = findings()
    assert found["model"]["top_k"] == 2
    for layer in found["layers"]:
        layer["look_ahead"]["router"] = [0.9, 0.7, 0.0, 0.0]
    texts = Page(render(found)).texts
    assert f"layer 3, router: {percent(0.8)}" in texts
    assert "90% 70%" in texts and not any("0% 0%" in text for text in texts)


def test_experts_are_named_where_they_stand_out() -> None:
    found = findings()
    parsed = Page(render(found))
    assert ["3", "3.0", "3.7"] in parsed.rows and ["2", "–", "2.7"] in parsed.rows
    cells = [text for text in parsed.texts if re.match(r"3\.5: .* of gates, .* of tokens", text)]
    assert cells == [
        f"3.5: {percent(found['layers'][3]['gate_mass'][5])} of gates, "
        f"{percent(found['layers'][3]['frequency'][5])} of tokens"
    ]


def test_dense_layers_leave_blank_rows() -> None:
    parsed = Page(render(findings(layers=4, experts=8, dense=(1,))))
    cells = [text for text in parsed.texts if re.match(r"\d+\.\d+: ", text)]
    assert len(cells) == 2 * 3 * 8 and not any(text.startswith("1.") for text in cells)


def test_examples_say_what_each_takes_and_where_it_differs() -> None:
    parsed = Page(render(findings()))
    guesses = [row for row in parsed.rows if row[0] in ("in the text", "original", "uniform-2")]
    assert ["in the text", "␣text", ""] in guesses
    assert ["original", "␣right", percent(0.625, 0)] in guesses
    assert ["uniform-2", "⏎ differs", f"{percent(0.5, 0)} (original's {percent(0.25, 0)})"] in guesses
    assert sum("differs" in row[1] for row in guesses) == 2


def test_a_page_without_figures_of_memory_and_examples_has_the_rest() -> None:
    """As of bundles that were compiled before compile.json had them, or with --no-examples."""
    found = findings()
    del found["memory"], found["examples"], found["storage"]["original_bytes"], found["storage"]["bundle_bytes"]
    page = render(found)
    assert headings(page) == list(SECTIONS[2:])
    assert "Examples of next tokens" not in Page(page).texts


def test_a_bundle_without_measurements_has_a_page() -> None:
    found = findings()
    found["points"], found["compared"], found["peers"] = [], [], []
    for layer in found["layers"]:
        layer["sensitivity"], layer["router_overlap"], layer["look_ahead"] = {}, {}, {}
    page = render(found)
    Page(page)
    assert headings(page) == list(SECTIONS[3:])


def test_memory_decides_what_a_token_reads() -> None:
    memory = Memory.of(findings())
    assert memory is not None
    used = 100e6
    needed = memory.needed_bytes(used)
    steps = [memory.floor_bytes + (needed - memory.floor_bytes) * i / 10 for i in range(11)]
    reads = [memory.read_bytes(step, used) for step in steps]
    assert reads == sorted(reads, reverse=True) and reads[0] <= used and reads[-1] == 0
    assert memory.needed_bytes(memory.largest_bytes_per_token) >= needed > memory.floor_bytes


def test_hostile_text_stays_text() -> None:
    page = render(strings_replaced(findings(), HOSTILE))
    parsed = Page(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert HOSTILE in parsed.texts
    assert html.escape(HOSTILE) in page


def test_hostile_names_stay_text() -> None:
    found = findings()
    found["provenance"] = {HOSTILE: {HOSTILE: 1}, "origin": {"repository": HOSTILE}, "profile": {"name": HOSTILE}}
    found["storage"]["dense_bits"] = {HOSTILE: 8}
    found["layers"][1]["sensitivity"] = {HOSTILE: 0.1}
    found["layers"][1]["look_ahead"] = {HOSTILE: [0.5], "used": HOSTILE}
    found["points"][0]["name"] = HOSTILE
    assert not {"script", "img"} & set(Page(render(found)).tags)


def test_characters_that_nobody_sees_are_spelled_out() -> None:
    page = render(strings_replaced(findings(), UNSEEN))
    assert not set(page) & set(UNSEEN) - set("abcdef")
    assert r"a\u202eb\u2066c\x07d\x1be\u2028f" in page
    found = findings()
    found["examples"]["shown"] = [example("\ud800 lone \u200f", ["2.75"], False)]
    assert r"\ud800 lone \u200f" in render(found)
    render(found).encode()


@pytest.mark.parametrize("seed", range(40))
def test_missing_and_impossible_values_are_left_out(seed: int) -> None:
    found = tortured(findings(dense=(), seed=seed), random.Random(seed))
    for index, entry in enumerate(found["layers"]):
        entry["layer"] = index
    page = render(json.loads(json.dumps(found)))
    Page(page)
    assert not re.search(r"\b(nan|inf|None|NaN|Infinity)\b", page)


@pytest.mark.parametrize("name", sorted(findings()))
@pytest.mark.parametrize("value", ["absent", None, "empty"])
def test_any_section_may_be_missing(name: str, value: str | None) -> None:
    found = findings()
    if value == "absent":
        del found[name]
    else:
        found[name] = None if value is None else type(found[name])()
    page = render(found)
    Page(page)
    assert "None" not in page


def test_nothing_at_all_is_a_page() -> None:
    page = render({})
    Page(page)
    assert headings(page) == ["Words"]


def test_large_models_stay_small_pages() -> None:
    assert len(render(findings(layers=64, experts=128)).encode()) < 2_000_000


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.2."""
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_and_lines_stand_out_from_the_page(scheme: int) -> None:
    blocks = re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)
    colours = {name: value for name, value in re.findall(r"--([a-z0-9]+):#([0-9a-f]+)", blocks[scheme])}
    for ground in ("page", "mark", "tint"):
        for ink in ("ink", "soft", "link", "bad"):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for series in range(6):
        assert contrast(colours[f"s{series}"], colours["page"]) >= 3
    assert contrast(colours["edge"], colours["page"]) >= 3
