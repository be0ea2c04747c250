"""The page of a traced run: where the time of each token went, and how the run would have fared with other memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dymoe_runtime.tools.charts.markup import element, page, paragraph, section, table, text, tiles
from dymoe_runtime.tools.charts.numbers import fixed, number, percent, size
from dymoe_runtime.tools.charts.plot import Figure, Layer, stack
from dymoe_runtime.tools.charts.scales import Axis
from dymoe_runtime.tools.replay import parts_of_tokens

Lines = Sequence[Mapping[str, Any]]
Column = tuple[str, str, Callable[[Any], str]]  # key of a result of `replay`, title, and how it is shown
SETTINGS: tuple[Column, ...] = (
    ("eviction", "eviction", str),
    ("fade", "decay", lambda decay: number(float(decay))),
)
COLUMNS: tuple[Column, ...] = (
    ("arena_bytes", "memory for experts", size),
    *SETTINGS,
    ("decode_hit_rate", "hit rate", percent),
    ("decode_read_bytes_per_token", "read per token", size),
)


def render(lines: Lines, replayed: Lines, name: str) -> str:
    """Return the HTML page of the trace `name`, with the results of `replay` for it."""
    parts = parts_of_tokens(lines)
    top = element("header", element("h1", text(name)), _lede(parts), tiles(_facts(lines)))
    time = section("Where the time went", _chart(parts))
    return page(f"{name}: DyMoE trace", top, element("main", time, _replayed(replayed)))


def _replayed(rows: Lines) -> str:
    """Return the section on replays; a setting that all of them share is said once, and is no column."""
    shared = [key for key, _, _ in SETTINGS if len({row[key] for row in rows}) == 1]
    columns = [column for column in COLUMNS if column[0] not in shared]
    cells = [[show(row[key]) for key, _, show in columns] for row in rows]
    about = (
        "The same requests, sent to a store with other memory for experts. Hits are requests of decoded tokens whose "
        "experts were in memory; prefetching and preloading are left out."
    )
    settings = ", ".join(f"{title} {show(rows[0][key])}" for key, title, show in SETTINGS if key in shared)
    caption = f"Replayed with {settings}" if settings else "Replayed"
    listed = table(caption, [title for _, title, _ in columns], cells)
    return section("With other memory", paragraph(about), listed) if listed else ""


def _lede(parts: Sequence[tuple[float, float, float]]) -> str:
    if not parts:
        return paragraph("The trace has no decoded token.", class_="lede")
    mean = sum(map(sum, parts)) / len(parts)
    tokens = "one decoded token" if len(parts) == 1 else f"{number(len(parts))} decoded tokens"
    return paragraph(f"A run of {tokens}, {fixed(mean, 2)} ms each on average.", class_="lede")


def _facts(lines: Lines) -> list[tuple[str, str, str]]:
    """Return the operating points, the budget and the hit rate of the run, as far as the trace has them."""
    ends = [line for line in lines if "layer" not in line]
    decoded = {line["pass"] for line in ends if not line["prompt"]}
    inside = [line for line in lines if "layer" in line and line["pass"] in decoded]
    asked, hits = sum(len(line["wants"]) for line in inside), sum(line["hits"] for line in inside)
    points = list(dict.fromkeys(str(line["point"]) for line in ends))
    budgets = sorted({line["memory_bytes"] for line in ends if line.get("memory_bytes") is not None})
    arenas = sorted({line["arena_bytes"] for line in ends if line.get("arena_bytes") is not None})
    facts = [("Point" if len(points) == 1 else "Points", ", ".join(points), "that the run was at")]
    below = f"of it {_range(arenas)} for experts" if arenas else ""
    facts.append(("Budget", _range(budgets) if budgets else "unknown", below or "the trace is older than this figure"))
    if asked:
        facts.append(("Hit rate", percent(hits / asked), f"of {number(asked)} requests of decoded tokens"))
        read = sum(line["read_bytes"] for line in inside) / len(decoded)
        facts.append(("Read from the disk", size(read), "per decoded token, prefetching included"))
    return facts


def _range(sizes: Sequence[float]) -> str:
    return size(sizes[0]) if len(sizes) == 1 else f"{size(sizes[0])} to {size(sizes[-1])}"


def _chart(parts: Sequence[tuple[float, float, float]]) -> str:
    """Return the chart that stacks the parts of each decoded token's time."""
    if not parts:
        return ""
    waits, experts, rest = zip(*parts, strict=True)
    means = _means(parts)
    layers = [
        Layer("the rest", 5, rest, f"attention, dense layers, routers, logits; mean {means[2]} ms"),
        Layer("experts", 0, experts, f"choosing, requesting and computing them; mean {means[1]} ms"),
        Layer("waiting", 1, waits, f"for reads of experts from the disk; mean {means[0]} ms"),
    ]
    figure = Figure("Time of each decoded token", "The height of a column is the whole time of a token.", beside=True)
    return stack(figure, layers, Axis("token", whole=True), Axis("ms", from_zero=True))


def _means(parts: Sequence[tuple[float, float, float]]) -> list[str]:
    """Return the mean of each part, in ms."""
    return [fixed(sum(column) / len(parts), 2) for column in zip(*parts, strict=True)]
