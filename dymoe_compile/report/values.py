"""Values of compile.json as text; what is missing or impossible is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dymoe_runtime.tools.charts.numbers import finite, number

Json = Mapping[str, Any]


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


def tiers_of(layers: Sequence[Json], field: str) -> list[str]:
    """Return the tiers for which any layer has values, lowest first; they are strings, as JSON keys are."""
    return sorted({tier for layer in layers for tier in layer.get(field) or {}}, key=lambda tier: (len(tier), tier))


def bits(tier: object) -> str:
    """Return the name of a tier."""
    return f"{tier} bits"


def words(name: str) -> str:
    """Return a key with spaces for underscores."""
    return name.replace("_", " ")


def points_of(findings: Json) -> list[Json]:
    """Return the operating points, by rising bytes per token as far as those are known."""
    points = [point for point in findings.get("points") or [] if isinstance(point, Mapping)]
    return sorted(points, key=lambda point: finite(point.get("bytes_per_token")) or 0.0)


def default_of(findings: Json) -> Json | None:
    """Return the default point, or None if it is missing."""
    return next((p for p in points_of(findings) if _is_default(p, findings)), None)


def name_of(point: Json, findings: Json) -> str:
    """Return the name of a point, with a remark if it is the default."""
    name = scalar(point.get("name"))
    return f"{name} (default)" if _is_default(point, findings) else name


def _is_default(point: Json, findings: Json) -> bool:
    chosen = findings.get("default_point")
    return chosen is not None and point.get("name") == chosen


def compared(findings: Json) -> list[Json]:
    """Return the smallest, the default and the largest point, without repeating one."""
    points = points_of(findings)
    chosen = (points[0], default_of(findings), points[-1]) if points else ()
    return list({id(point): point for point in chosen if point is not None}.values())
