"""A plan as text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dymoe_compile.plan.source import CONFIGURATION, HEADERS
from dymoe_runtime.units import format_size

Row = Sequence[str]
BASES = {
    HEADERS: "config.json and the headers of its tensors",
    CONFIGURATION: "config.json, because not all files with its weights are there",
}


def free_bytes(place: Path) -> int | None:
    """Return the bytes that are free on the disk where `place` is or would be, or None if that is not known."""
    for folder in (place, *place.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except (OSError, ValueError):
            continue
    return None


def format_plan(plan: Mapping[str, Any], free_bytes: int | None = None) -> str:
    """Return a plan as text; `free_bytes` is what the disk has free that the bundle goes to."""
    model, profiles = plan["model"], plan["profiles"]
    lines = [
        f"{model['model_type']}: {model['layers']} layers, {model['moe_layers']} of them with "
        f"{model['experts_per_layer']} experts, {model['experts_per_token']} per token; "
        f"{model['expert_weights'] / 1e9:.3g} B weights in experts",
        f"by {BASES[model['basis']]}; nothing here is measured",
        "",
        *_table(("profile", "bundle", "memory", "least", "fits", "why"), map(_fit, profiles)),
        "",
        *_table(*_sizes(profiles)),
    ]
    notes = _notes(plan, free_bytes)
    fitting = [profile for profile in profiles if profile["fits"]]
    if fitting:
        tokens = plan["prompt_tokens"]
        lines += ["", "tokens/s by operating point; * is the default, in brackets are those that wait for the disk"]
        lines += _by_point(fitting, _speed)
        lines += ["", f"seconds to the first token of a prompt of {tokens}, with no expert in memory at first"]
        lines += _by_point(fitting, lambda point, _: _figure(point["first_token_s"]))
    return "\n".join([*lines, "", *notes])


def _fit(profile: Mapping[str, Any]) -> Row:
    sizes = (format_size(profile[key]) for key in ("bundle_bytes", "memory_bytes", "floor_bytes"))
    return profile["name"], *sizes, "yes" if profile["fits"] else "no", profile["why"]


def _sizes(profiles: Sequence[Mapping[str, Any]]) -> tuple[Row, list[Row]]:
    """Return the header and rows of a table of the bundles that differ, by tier."""
    tiers = sorted({int(tier) for profile in profiles for tier in profile["tier_bytes"]})
    header = ("bundle", "dense", *(f"tier {tier}" for tier in tiers), "other", "compiling", "its disk", "for")
    rows: dict[tuple[str, ...], list[str]] = {}
    for profile in profiles:
        parts = [profile["tier_bytes"].get(str(tier), 0) for tier in tiers]
        sizes = [profile["bundle_bytes"], profile["dense_bytes"], *parts, profile["other_bytes"]]
        cells = [*map(format_size, sizes), _duration(profile["compile_seconds"]), format_size(profile["disk_bytes"])]
        cells[1] += f" at {profile['dense_bits']} bits"
        rows.setdefault(tuple(cells), []).append(profile["name"])
    every = len(rows) == 1 and len(profiles) > 1
    return header, [(*cells, "all profiles" if every else ", ".join(names)) for cells, names in rows.items()]


def _by_point(profiles: Sequence[Mapping[str, Any]], cell: Callable[[Any, Any], str]) -> list[str]:
    names: dict[str, float] = {}
    for profile in profiles:
        names |= {point["name"]: point["bits_mean"] for point in profile["points"]}
    ordered = sorted(names, key=lambda name: (names[name], name))
    rows = []
    for profile in profiles:
        points = {point["name"]: point for point in profile["points"]}
        rows.append((profile["name"], *(cell(points[n], profile) if n in points else "" for n in ordered)))
    return _table(("profile", *ordered), rows, last_left=False)


def _speed(point: Mapping[str, Any], profile: Mapping[str, Any]) -> str:
    text = _figure(point["tokens_per_s"])
    text = text if point["all_resident"] else f"({text})"
    return f"*{text}" if point["name"] == profile["default_point"] else text


def _notes(plan: Mapping[str, Any], free_bytes: int | None) -> list[str]:
    notes = []
    if any(profile["dense_bits_may_change"] for profile in plan["profiles"]):
        notes.append("compiling measures what fewer bits of dense weights cost, and may choose them")
    needed = max(profile["disk_bytes"] for profile in plan["profiles"])
    if free_bytes is not None and free_bytes < needed:
        notes.append(f"compiling takes {format_size(needed)} of disk, {format_size(free_bytes)} are free here")
    notes.append(f"compiling is for {plan['compile_threads']} threads of this machine, an order of magnitude")
    return [f"note: {note}" for note in notes]


def _figure(value: float | None) -> str:
    """Return a number in three digits, or all digits before its point; a dash for an unknown one."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Return a time in two digits."""
    hours = seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h" if hours < 9.95 else f"{hours:.0f} h"


def _table(header: Row, rows: Iterable[Row], last_left: bool = True) -> list[str]:
    """Return lines of columns: the first to the left, and the last one if `last_left`; figures to the right."""
    lines = [header, *rows]
    left = {0, len(header) - 1} if last_left else {0}
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
