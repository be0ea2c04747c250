"""The report of a compilation: one self-contained HTML page.

The page has no script and no outside reference: it opens from a bundle on any machine, today or in ten years. Names
and notes come from untrusted checkpoints, so all text is escaped by `text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dymoe_runtime.tools.charts import Axis, Point, Series, element, finite, heatmap, number, page, plot, text

Json = Mapping[str, Any]

# The index of a kind sets its colour, whichever kinds were measured.
KINDS = ("mixed", "uniform", "static", "cosine", "flat", "peers")
COLUMNS = (
    ("bits_mean", "mean bits"),
    ("effective_bits", "effective bits"),
    ("bytes_per_token", "MiB per token"),
    ("kl", "KL, nats per token"),
    ("prefill_kl", "prefill KL, nats per token"),
    ("nll", "NLL, nats per token"),
    ("top1_agreement", "top-1 agreement"),
)
MIB, GIB = 1 << 20, 1 << 30


def render(findings: Json) -> str:
    """Return the page for a parsed compile.json; sections without data are left out."""
    name = str((findings.get("model") or {}).get("name") or "Compiled model")
    layers = findings.get("layers") or []
    parts = (
        summary(findings),
        operating_points(findings),
        pareto(findings),
        sensitivity(layers),
        importance(layers),
        expert_error(layers),
        router_overlap(layers),
        look_ahead(layers),
        outliers(layers),
        section("Provenance", definitions(flat(findings.get("provenance") or {}))),
    )
    return page(name, *parts)


def summary(findings: Json) -> str:
    """Return the default point, the key facts of model and bundle, and the notes."""
    storage, model = findings.get("storage") or {}, findings.get("model") or {}
    per_tier = storage.get("bits_per_weight") or {}
    shape = {
        "family": model.get("family"),
        "layers": model.get("num_layers"),
        "experts per layer": model.get("num_experts"),
        "experts per token": model.get("top_k"),
        "hidden size": model.get("hidden_size"),
        "expert width": model.get("expert_width"),
        "ladder, bits": findings.get("ladder"),
        "effective bits per expert weight": [f"{number(v)} at {bits(tier)}" for tier, v in per_tier.items()],
        "experts on disk": size(storage.get("expert_bytes")),
        "dense weights": size(storage.get("dense_bytes")),
        "dense bits": dense_bits(storage.get("dense_bits")),
        "KL that fewer dense bits add": [
            f"{kind} {number(kl)} at {bits(width)}"
            for kind, row in (storage.get("dense_kl") or {}).items()
            for width, kl in (row or {}).items()
        ],
        "quantizer": ", ".join(f"{key} {value}" for key, value in flat(findings.get("quantizer") or {})),
        "NLL of the original, nats per token": findings.get("reference_nll"),
    }
    notes = "".join(element("li", text(note)) for note in map(scalar, findings.get("notes") or []))
    return headline(findings) + definitions(flat(shape)) + (element("ul", notes) if notes else "")


def headline(findings: Json) -> str:
    """Return the default point in a sentence, or "" if it is missing."""
    chosen = findings.get("default_point")
    point = next((p for p in findings.get("points") or [] if p.get("name") == chosen), None)
    if chosen is None or point is None:
        return ""
    sentence = (
        f"Default point {chosen}: {number(point.get('effective_bits'))} effective bits per expert weight, "
        f"{size(point.get('bytes_per_token')) or '–'} of experts per token, "
        f"KL to the original {number(point.get('kl'))} nats per token."
    )
    return element("p", text(sentence))


def operating_points(findings: Json) -> str:
    """Return the section with the table of operating points."""
    points = findings.get("points") or []
    return section("Operating points", points_table(points, findings.get("default_point")) if points else "")


def points_table(points: Sequence[Json], chosen: object = None) -> str:
    """Return a table of points, with the columns that any of them has; `chosen` is the name to mark as default."""
    columns = [(key, title) for key, title in COLUMNS if any(finite(p.get(key)) is not None for p in points)]
    rows = [
        (scalar(p.get("name")), scalar(p.get("kind")), *(column_text(key, p.get(key)) for key, _ in columns))
        for p in points
    ]
    marked = [i for i, row in enumerate(rows) if row[0] == chosen]
    rows = [(f"{name} (default)" if i in marked else name, *others) for i, (name, *others) in enumerate(rows)]
    return table(("point", "kind", *(title for _, title in columns)), rows, marked)


def column_text(key: str, value: object) -> str:
    """Return the text of a point's figure; bytes are in MiB."""
    nbytes = finite(value) if key == "bytes_per_token" else None
    return number(value if nbytes is None else nbytes / MIB, 6)


def pareto(findings: Json) -> str:
    """Return the section that shows quality against size of all measured points and of peers."""
    emitted = list(findings.get("points") or [])
    known = {(p.get("kind"), p.get("name")) for p in emitted}
    compared = [p for p in findings.get("compared") or [] if (p.get("kind"), p.get("name")) not in known]
    others = [*compared, *({**peer, "kind": "peers"} for peer in findings.get("peers") or [])]
    drawn: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    for measured, hollow in ((emitted, False), (others, True)):
        for point in measured:
            drawn.setdefault(scalar(point.get("kind")), []).extend(_mark(point, hollow, findings.get("default_point")))
    series = [
        Series(kind, slot, sorted(points, key=lambda p: p.x), joined=kind != "peers")
        for slot, (kind, points) in enumerate(drawn.items())
    ]
    caption = "Lower and further left is better. Filled marks: in the bundle. Hollow: measured for comparison."
    x, y = Axis("effective bits per expert weight"), Axis("KL, nats per token", log=True)
    listed = fold("Measured for comparison", points_table(others)) if others else ""
    return section("Quality against size", plot("KL against size", series, x, y, caption), listed)


def sensitivity(layers: Sequence[Json]) -> str:
    """Return the section that shows the sensitivity of each layer at each tier."""
    caption = "KL to the original with only this layer's experts at the tier and all others at the highest."
    lines = tier_lines(layers, "sensitivity")
    chart = by_depth("Sensitivity of each layer", lines, Axis("KL, nats per token", log=True), caption)
    return section("Sensitivity by depth", chart)


def importance(layers: Sequence[Json]) -> str:
    """Return the section that shows the share of routing weights of each expert."""
    mass = {layer["layer"]: numbers(layer.get("gate_mass")) for layer in layers}
    often = {layer["layer"]: numbers(layer.get("frequency")) for layer in layers}

    def tip(layer: int, expert: int) -> str:
        tokens = f", {number(often[layer][expert], 3)} of tokens" if expert < len(often[layer]) else ""
        return f"{layer}.{expert}: {number(mass[layer][expert], 3)} of gates{tokens}"

    caption = "Share of its layer's gates that each expert got." + blank_rows(mass)
    return section("Importance of experts", heatmap("Gate mass", mass, tip, 0.5, caption))


def expert_error(layers: Sequence[Json]) -> str:
    """Return the section that shows the error of each expert at the lowest tier, and layer means at every tier."""
    tiers = tiers_of(layers, "expert_error")
    if not tiers:
        return ""
    by_tier = {layer["layer"]: layer.get("expert_error") or {} for layer in layers}
    errors = {tier: {layer: numbers(row.get(tier)) for layer, row in by_tier.items()} for tier in tiers}
    lowest = errors[tiers[0]]

    def tip(layer: int, expert: int) -> str:
        return f"{layer}.{expert}: {number(lowest[layer][expert], 3)}"

    caption = "Error of an expert's output relative to that output, weighted by gates." + blank_rows(lowest)
    means = [
        (layer, *(number(mean(errors[tier][layer]), 3) for tier in tiers))
        for layer in lowest
        if any(errors[tier][layer] for tier in tiers)
    ]
    listed = fold("Mean error by layer and tier", table(("layer", *map(bits, tiers)), means)) if means else ""
    return section("Error of experts", heatmap(f"Error at {bits(tiers[0])}", lowest, tip, 1.0, caption), listed)


def router_overlap(layers: Sequence[Json]) -> str:
    """Return the section that shows how many experts of the next layer stay chosen."""
    caption = "Share of the next layer's chosen experts that stay the same with this layer at the tier."
    lines = tier_lines(layers, "router_overlap")
    return section("Router overlap", by_depth("Experts that stay chosen", lines, Axis("share of experts"), caption))


def look_ahead(layers: Sequence[Json]) -> str:
    """Return the section that shows the recall of prefetch guesses."""
    guesses = {layer["layer"]: layer["look_ahead"] for layer in layers if layer.get("look_ahead")}
    names = list(dict.fromkeys(name for guess in guesses.values() for name in guess if name != "used"))
    recall = {name: {layer: numbers(guess.get(name)) for layer, guess in guesses.items()} for name in names}
    lines = {words(name): {layer: mean(row) for layer, row in rows.items()} for name, rows in recall.items()}
    caption = "Share of the guessed experts that the layer then chose, mean over ranks."
    chart = by_depth("Look-ahead recall", lines, Axis("recall"), caption)
    rows = [
        (layer, scalar(guess.get("used")), *(" ".join(number(v, 2) for v in recall[name][layer]) for name in names))
        for layer, guess in guesses.items()
        if any(recall[name][layer] for name in names)
    ]
    listed = fold("Recall by rank, likeliest first", table(("layer", "used", *map(words, names)), rows))
    return section("Look-ahead", chart, listed if chart else "")


def outliers(layers: Sequence[Json]) -> str:
    """Return the section that lists pinned and data-free experts."""

    def listed(layer: Json, key: str) -> str:
        return ", ".join(f"{layer['layer']}.{expert}" for expert in layer.get(key) or []) or "–"

    odd = [layer for layer in layers if layer.get("pinned") or layer.get("data_free")]
    rows = [(layer["layer"], listed(layer, "pinned"), listed(layer, "data_free")) for layer in odd]
    return section("Outliers", table(("layer", "pinned", "data-free"), rows) if rows else "")


def by_depth(title: str, lines: Mapping[str, Mapping[int, object]], axis: Axis, caption: str) -> str:
    """Return a chart over the layers, with one line per name."""
    series = [
        Series(name, slot, [Point(layer, v, f"layer {layer}, {name}: {number(v)}") for layer, v in present(values)])
        for slot, (name, values) in enumerate(lines.items())
    ]
    return plot(title, series, Axis("layer", whole=True), axis, caption)


def tier_lines(layers: Sequence[Json], field: str) -> dict[str, dict[int, object]]:
    """Return name of the tier -> layer -> value of `field`."""
    return {
        bits(tier): {layer["layer"]: (layer.get(field) or {}).get(tier) for layer in layers}
        for tier in tiers_of(layers, field)
    }


def tiers_of(layers: Sequence[Json], field: str) -> list[str]:
    """Return the tiers for which any layer has values, lowest first; they are strings, as JSON keys are."""
    return sorted({tier for layer in layers for tier in layer.get(field) or {}}, key=lambda tier: (len(tier), tier))


def blank_rows(rows: Mapping[int, Sequence[object]]) -> str:
    """Return the caption's sentence about blank rows, or "" if there are none."""
    return "" if all(rows.values()) else " Blank rows: layers without experts."


def section(title: str, *parts: str) -> str:
    """Return a section with a heading, or "" if all parts are empty."""
    return element("section", element("h2", text(title)), *parts) if any(parts) else ""


def fold(title: str, content: str) -> str:
    """Return content that a reader can close; it starts open, so that it prints."""
    return element("details", element("summary", text(title)), content, open="open")


def table(heading: Iterable[object], rows: Iterable[Iterable[object]], chosen: Sequence[int] = ()) -> str:
    """Return a table; rows whose index is in `chosen` are marked."""

    def row(name: str, cells: Iterable[object], **attributes: object) -> str:
        return element("tr", *(element(name, text(cell)) for cell in cells), **attributes)

    body = (row("td", cells, **({"class_": "chosen"} if i in chosen else {})) for i, cells in enumerate(rows))
    whole = element("table", element("thead", row("th", heading)), element("tbody", *body))
    return element("div", whole, class_="wide")


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a definition list of (term, text) pairs, or "" if there are none."""
    listed = "".join(element("dt", text(term)) + element("dd", text(value)) for term, value in pairs)
    return element("dl", listed) if listed else ""


def flat(values: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested values as (dotted name, text), without missing ones."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            listed = ", ".join(filter(None, map(scalar, value)))
            if listed:
                yield name, listed
        elif shown := scalar(value):
            yield name, shown


def scalar(value: object) -> str:
    """Return the text of a plain value, or "" if it is missing."""
    if value is None or isinstance(value, bool):
        return "" if value is None else ("yes" if value else "no")
    if isinstance(value, (int, float)):
        return number(value, 6) if finite(value) is not None else ""
    return str(value)


def size(nbytes: object) -> str:
    """Return a number of bytes in MiB or GiB, or "" if it is missing."""
    value = finite(nbytes)
    if value is None:
        return ""
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.2f} MiB"


def dense_bits(value: object) -> str:
    """Return the text of one width for all kinds, or of each width with its kinds."""
    if not isinstance(value, Mapping):
        return scalar(value)
    tensors: dict[str, list[str]] = {}
    for name, width in value.items():
        tensors.setdefault(scalar(width), []).append(str(name))
    return "; ".join(f"{width}: {', '.join(names)}" for width, names in tensors.items() if width)


def numbers(values: object) -> list[float | None]:
    """Return the items of a list, None for those that are not finite numbers; [] if it is not a list."""
    return [finite(value) for value in values] if isinstance(values, (list, tuple)) else []


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def present(values: Mapping[int, object]) -> list[tuple[int, float]]:
    """Return (layer, value) of the layers with a finite value."""
    return [(layer, value) for layer, raw in values.items() if (value := finite(raw)) is not None]


def bits(tier: object) -> str:
    """Return the name of a tier."""
    return f"{tier} bits"


def words(name: str) -> str:
    """Return a key with spaces for underscores."""
    return name.replace("_", " ")


def _mark(point: Json, hollow: bool, chosen: object) -> list[Point]:
    """Return the mark of a measured point, or [] if its size or KL is missing.

    Peers and the default point are labelled in the chart.
    """
    x, y, name = finite(point.get("effective_bits")), finite(point.get("kl")), scalar(point.get("name"))
    if x is None or y is None:
        return []
    tip = f"{name} ({scalar(point.get('kind'))}): {number(x)} bits, KL {number(y)}"
    named = point.get("kind") == "peers" or (not hollow and name == chosen)
    return [Point(x, y, tip, name if named else "", hollow)]
