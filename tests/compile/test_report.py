"""The page of a compilation: well formed, self-contained, safe with any text, whole with any gaps."""

from __future__ import annotations

import html
import json
import math
import random
import re
from typing import Any

import pytest
from compile_kit import Page

from dymoe_compile.report.page import MIB, render
from dymoe_runtime.tools.charts import linear_ticks, log_ticks, number

HOSTILE = "</title><script>alert(\"1\")</script><img src=x onerror='y'>&amp;"
KINDS = ("mixed", "uniform", "static", "cosine", "flat")
SECTIONS = (
    "Operating points",
    "Quality against size",
    "Sensitivity by depth",
    "Importance of experts",
    "Error of experts",
    "Router overlap",
    "Look-ahead",
    "Outliers",
    "Provenance",
)
# Those that a model without experts has as well.
PLAIN = ("Operating points", "Quality against size", "Provenance")


def headings(page: Page) -> list[str]:
    return [text for text in page.texts if text in SECTIONS]


def point(rng: random.Random, name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "bits_mean": round(rng.uniform(2, 4), 4),
        "effective_bits": round(rng.uniform(2, 4.3), 4),
        "bytes_per_token": rng.randrange(10**6, 10**9),
        "kl": float(f"{math.exp(rng.uniform(-8, 0)):.4g}"),
        "nll": round(rng.uniform(1, 3), 5),
        "top1_agreement": round(rng.uniform(0.5, 1), 4),
        "prefill_kl": rng.choice([None, 0.0123]),
    }


def layer(rng: random.Random, index: int, experts: int, ladder: list[int], dense: bool) -> dict[str, Any]:
    if dense:
        empty = {"sensitivity": {}, "router_overlap": {}, "expert_error": {}, "pinned": [], "data_free": []}
        guesses = {"router": [], "linear": [], "two_ahead": [], "used": "none"}
        return {"layer": index, "dense": True, "frequency": [], "gate_mass": [], **empty, "look_ahead": guesses}
    mass = [rng.random() ** 3 for _ in range(experts)]
    return {
        "layer": index,
        "dense": False,
        "frequency": [rng.random() for _ in range(experts)],
        "gate_mass": [value / sum(mass) for value in mass],
        "sensitivity": {str(t): 0.02 * 4.0 ** (2 - t) * rng.uniform(0.5, 2) for t in ladder},
        "router_overlap": {str(t): 1 - 0.1 * 4.0 ** (2 - t) * rng.random() for t in ladder},
        "expert_error": {str(t): [2.0 ** (1 - t) * rng.uniform(0.5, 1) for _ in range(experts)] for t in ladder},
        "pinned": [0] if index % 2 else [],
        "data_free": [experts - 1],
        "look_ahead": {
            "router": [0.9, 0.8],
            "linear": [0.95, 0.9],
            "two_ahead": [0.7, 0.5],
            "used": "linear",
        },
    }


def findings(layers: int = 6, experts: int = 8, dense: tuple[int, ...] = (0,), seed: int = 0) -> dict[str, Any]:
    rng, ladder = random.Random(seed), [2, 3, 4]
    emitted = [point(rng, f"uniform-{t}", "uniform") for t in ladder] + [point(rng, "2.75", "mixed")]
    return {
        "version": 1,
        "model": {
            "name": "small",
            "family": "olmoe",
            "num_layers": layers,
            "num_experts": experts,
            "top_k": min(2, experts),
            "hidden_size": 64,
            "expert_width": 32,
        },
        "ladder": ladder,
        "storage": {
            "bits_per_weight": {"2": 2.13, "3": 3.19, "4": 4.25},
            "expert_bytes": 123456789,
            "dense_bytes": 2345678901,
            "dense_bits": {"attn": 8, "embed": 16, "lm_head": 8},
            "dense_kl": {"attn": {"6": 0.00123, "4": 0.0456}},
        },
        "quantizer": {"method": "coordinate descent", "block": 64, "steps": "ratio 3", "sweeps": 4, "nested": True},
        "layers": [layer(rng, i, experts, ladder, i in dense) for i in range(layers)],
        "points": emitted,
        "default_point": "2.75",
        "compared": [emitted[-1], *(point(rng, f"{kind} {i}", kind) for kind in KINDS for i in range(3))],
        "peers": [{"name": "llama.cpp Q2_K", "effective_bits": 2.9, "kl": 0.04}],
        "notes": ["importance is flat"],
        "provenance": {"tokens": 4096, "source": {"sha256": "ab" * 32, "revision": None}, "texts": ["a", "b"]},
        "reference_nll": 1.23456,
    }


def tortured(value: Any, rng: random.Random) -> Any:
    """The same structure with some of its texts, fractions and lists spoilt; counts and ids are kept."""
    if isinstance(value, dict):
        return {key: tortured(item, rng) for key, item in value.items()}
    if not isinstance(value, int) and rng.random() < 0.15:
        return None if not isinstance(value, list) else []
    if isinstance(value, list):
        return [tortured(item, rng) for item in value if item is not None]
    if isinstance(value, float) and rng.random() < 0.5:
        return rng.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 5e-324, 1e308, 1.0, 1 + 1e-15])
    return value


def strings_replaced(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {key: strings_replaced(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [strings_replaced(item, text) for item in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("layers", "experts", "dense"),
    [(6, 8, (0,)), (1, 8, ()), (6, 1, ()), (1, 1, ()), (3, 4, (0, 1, 2)), (8, 5, (1, 3, 5, 7)), (48, 128, ())],
)
def test_pages_are_well_formed_and_refer_to_nothing_outside(layers: int, experts: int, dense: tuple[int, ...]) -> None:
    page = render(findings(layers, experts, dense))
    parsed = Page(page)
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not {name for name, _ in parsed.attributes} & {"src", "href"}
    assert headings(parsed) == [title for title in SECTIONS if len(dense) < layers or title in PLAIN]


def test_every_chart_has_a_text_alternative() -> None:
    page = render(findings())
    charts = re.findall(r'<svg role="img"[^>]*>(.{0,40})', page)
    assert len(charts) == 6 and all(start.startswith("<title>") for start in charts)
    assert page.count("<desc>") == 6


def test_operating_points_are_listed_with_their_numbers() -> None:
    found = findings()
    rows = {row[0]: row for row in Page(render(found)).rows[:5]}
    assert len(rows) == 5
    for expected in found["points"]:
        name = expected["name"] + (" (default)" if expected["name"] == found["default_point"] else "")
        shown = [expected[key] for key in ("bits_mean", "effective_bits", "kl", "nll", "top1_agreement")]
        assert {number(value, 6) for value in shown} <= set(rows[name])
        assert number(expected["bytes_per_token"] / MIB, 6) in rows[name]


def test_dense_bits_and_what_fewer_cost_are_told() -> None:
    page = render(findings())
    assert "8: attn, lm_head; 16: embed" in page
    assert "attn 0.00123 at 6 bits" in page and "attn 0.0456 at 4 bits" in page


def test_a_point_measured_twice_is_drawn_once() -> None:
    page = render(findings())
    assert page.count("<title>2.75 (mixed)") == 1


def test_experts_are_named_where_they_stand_out() -> None:
    found = findings()
    parsed = Page(render(found))
    assert ["3", "3.0", "3.7"] in parsed.rows and ["2", "–", "2.7"] in parsed.rows
    cells = [text for text in parsed.texts if re.match(r"3\.5: .* of gates, .* of tokens", text)]
    assert cells == [
        f"3.5: {number(found['layers'][3]['gate_mass'][5], 3)} of gates, "
        f"{number(found['layers'][3]['frequency'][5], 3)} of tokens"
    ]


def test_dense_layers_leave_blank_rows() -> None:
    parsed = Page(render(findings(layers=4, experts=8, dense=(1,))))
    cells = [text for text in parsed.texts if re.match(r"\d+\.\d+: ", text)]
    assert len(cells) == 2 * 3 * 8 and not any(text.startswith("1.") for text in cells)


def test_hostile_text_stays_text() -> None:
    page = render(strings_replaced(findings(), HOSTILE))
    parsed = Page(page)
    assert not {"script", "img"} & set(parsed.tags)
    assert HOSTILE in parsed.texts
    assert html.escape(HOSTILE) in page


def test_hostile_names_stay_text() -> None:
    found = findings()
    found["provenance"] = {HOSTILE: {HOSTILE: 1}}
    found["storage"]["dense_bits"] = {HOSTILE: 8}
    found["layers"][1]["sensitivity"] = {HOSTILE: 0.1}
    found["layers"][1]["look_ahead"] = {HOSTILE: [0.5], "used": HOSTILE}
    assert not {"script", "img"} & set(Page(render(found)).tags)


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
    assert headings(Page(render({}))) == []


def test_large_models_stay_small_pages() -> None:
    assert len(render(findings(layers=64, experts=128)).encode()) < 2_000_000


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
