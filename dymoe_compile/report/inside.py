"""The section for engineers: what was measured of each layer and each expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dymoe_compile.report.values import Json, bits, mean, numbers, present, scalar, tiers_of, words
from dymoe_runtime.tools.charts.heatmap import heatmap
from dymoe_runtime.tools.charts.markup import element, fold, paragraph, section, table, text
from dymoe_runtime.tools.charts.numbers import finite, kl, percent
from dymoe_runtime.tools.charts.plot import Figure, Point, Series, plot
from dymoe_runtime.tools.charts.scales import Axis

Lines = Mapping[str, Mapping[int, object]]  # name -> layer -> value
Show = Callable[[object], str]  # a value as text
GUESSES = {
    "router": "the next layer's router, asked one layer early",
    "linear": "the same, corrected by a fitted predictor",
    "two_ahead": "the router, asked two layers early",
}


def inside(findings: Json) -> str:
    """Return the section on layers and experts, or "" if nothing was measured."""
    layers = [layer for layer in findings.get("layers") or [] if isinstance(layer, Mapping)]
    model = findings.get("model") or {}
    charts = (sensitivity(layers), look_ahead(layers, model.get("top_k")), router_overlap(layers))
    parts = (
        element("div", *charts, class_="charts") if any(charts) else "",
        importance(layers),
        expert_error(layers),
        outliers(layers),
    )
    about = "Layers are counted from 0. A tier is the bits of an expert's weights; all other weights keep theirs."
    return section("Inside the model", paragraph(about) if any(parts) else "", *parts, name="inside")


def sensitivity(layers: Sequence[Json]) -> str:
    """Return the chart of what each layer costs at each tier, beyond the KL with all layers at the highest."""
    lines, floor = excess(layers)
    if floor is None:
        return ""
    *_, highest = tiers_of(layers, "sensitivity")
    caption = (
        f"KL that is added where only this layer's experts run at the tier and all others at {bits(highest)}. "
        f"All at {bits(highest)} have a KL of {kl(floor)}, the floor, which is subtracted."
    )
    return by_depth("Sensitivity of each layer", lines, Axis("added KL, nats per token", log=True), kl, caption)


def excess(layers: Sequence[Json]) -> tuple[dict[str, dict[int, object]], float | None]:
    """Return the KL that each layer adds at each tier below the highest, and the KL with all at the highest.

    The second is None if there is no tier below the highest, or if a layer lacks the KL at the highest.
    """
    tiers = tiers_of(layers, "sensitivity")
    rows = {layer["layer"]: layer["sensitivity"] for layer in layers if layer.get("sensitivity")}
    floors = {layer: value for layer, row in rows.items() if (value := finite(row.get(tiers[-1]))) is not None}
    if len(tiers) < 2 or not floors:
        return {}, None

    def added(layer: int, tier: str) -> float | None:
        reached = finite(rows[layer].get(tier))
        return None if reached is None or layer not in floors else reached - floors[layer]

    return {bits(tier): {layer: added(layer, tier) for layer in rows} for tier in tiers[:-1]}, mean(floors.values())


def look_ahead(layers: Sequence[Json], top_k: object) -> str:
    """Return the chart of how many guesses of prefetch were right, within the experts that a token uses."""
    guesses = {layer["layer"]: layer["look_ahead"] for layer in layers if isinstance(layer.get("look_ahead"), Mapping)}
    names = list(dict.fromkeys(name for guess in guesses.values() for name in guess if name != "used"))
    within = int(finite(top_k) or 0) or None
    recall = {name: {layer: numbers(guess.get(name))[:within] for layer, guess in guesses.items()} for name in names}
    lines = {words(name): {layer: mean(row) for layer, row in rows.items()} for name, rows in recall.items()}
    count = f"the {within} likeliest experts" if within else "the experts"
    caption = f"Share of {count} guessed for a layer, before it runs, that its router then chose. More is read in time."
    about = {words(name): meaning for name, meaning in GUESSES.items()}
    chart = by_depth("Prefetch: guesses that were right", lines, SHARE, percent, caption, about)
    rows = [
        (layer, scalar(guess.get("used")), *(" ".join(percent(v, 0) for v in recall[name][layer]) for name in names))
        for layer, guess in guesses.items()
        if any(recall[name][layer] for name in names)
    ]
    heading = ("layer", "used", *map(words, names))
    listed = fold("Right guesses by rank", table("Likeliest guess first", heading, rows)) if chart else ""
    return element("div", chart, listed) if chart else ""


SHARE = Axis("share of experts", share=True)


def router_overlap(layers: Sequence[Json]) -> str:
    """Return the chart of how many experts of the next layer stay chosen, at each tier that changes any."""
    caption = "Share of the experts chosen in the next layer that stay the same with only this layer at the tier."
    lines = {
        bits(tier): {layer["layer"]: (layer.get("router_overlap") or {}).get(tier) for layer in layers}
        for tier in tiers_of(layers, "router_overlap")
    }
    changed = {name: row for name, row in lines.items() if any(value != 1 for _, value in present(row))}
    return by_depth("Experts that stay chosen", changed or lines, SHARE, percent, caption)


def by_depth(
    title: str, lines: Lines, axis: Axis, show: Show, caption: str, about: Mapping[str, str] | None = None
) -> str:
    """Return a chart over the layers with one line per name, and its values as a table."""
    series = [
        Series(
            name,
            slot,
            [Point(layer, v, f"layer {layer}, {name}: {show(v)}") for layer, v in present(values)],
            about=(about or {}).get(name, ""),
        )
        for slot, (name, values) in enumerate(lines.items())
    ]
    chart = plot(Figure(title, caption), series, Axis("layer", whole=True), axis)
    layers = list(dict.fromkeys(layer for values in lines.values() for layer, _ in present(values)))
    rows = [(layer, *(show(values.get(layer)) for values in lines.values())) for layer in layers]
    return element("div", chart, fold("By layer", table(title, ("layer", *lines), rows))) if chart else ""


def importance(layers: Sequence[Json]) -> str:
    """Return the heat map of the share of routing weights of each expert."""
    mass = {layer["layer"]: numbers(layer.get("gate_mass")) for layer in layers}
    often = {layer["layer"]: numbers(layer.get("frequency")) for layer in layers}

    def tip(layer: int, expert: int) -> str:
        tokens = f", {percent(often[layer][expert])} of tokens" if expert < len(often[layer]) else ""
        return f"{layer}.{expert}: {percent(mass[layer][expert])} of gates{tokens}"

    caption = "The share of its layer's routing weights that an expert got in calibration." + blank_rows(mass)
    return heatmap("Importance of experts", mass, percent, tip, 0.5, caption)


def expert_error(layers: Sequence[Json]) -> str:
    """Return the heat map of the error of each expert at the lowest tier, and layer means at every tier."""
    tiers = tiers_of(layers, "expert_error")
    if not tiers:
        return ""
    by_tier = {layer["layer"]: layer.get("expert_error") or {} for layer in layers}
    errors = {tier: {layer: numbers(row.get(tier)) for layer, row in by_tier.items()} for tier in tiers}
    lowest = errors[tiers[0]]

    def tip(layer: int, expert: int) -> str:
        return f"{layer}.{expert}: {percent(lowest[layer][expert])}"

    caption = "Squared error of an expert's output, relative to that output squared." + blank_rows(lowest)
    means = [
        (layer, *(percent(mean(errors[tier][layer]), 2) for tier in tiers))
        for layer in lowest
        if any(errors[tier][layer] for tier in tiers)
    ]
    listed = fold("Mean error by layer", table("Mean over the experts of a layer", ("layer", *map(bits, tiers)), means))
    return heatmap(f"Error of experts at {bits(tiers[0])}", lowest, percent, tip, 1.0, caption) + listed


def outliers(layers: Sequence[Json]) -> str:
    """Return the table of pinned and data-free experts."""

    def listed(layer: Json, key: str) -> str:
        return ", ".join(f"{layer['layer']}.{expert}" for expert in layer.get(key) or []) or "–"

    odd = [layer for layer in layers if layer.get("pinned") or layer.get("data_free")]
    rows = [(layer["layer"], listed(layer, "pinned"), listed(layer, "data_free")) for layer in odd]
    about = (
        "Experts, named layer.expert: pinned ones always get the highest tier, because the lowest ruins them; "
        "data-free ones were used too rarely in calibration to fit their weights to it."
    )
    listing = table("Outliers by layer", ("layer", "pinned", "data-free"), rows)
    return element("h3", text("Outliers")) + paragraph(about) + listing if rows else ""


def blank_rows(rows: Mapping[int, Sequence[object]]) -> str:
    """Return the caption's sentence about blank rows, or "" if there are none."""
    return "" if all(rows.values()) else " Blank rows: layers without experts."
