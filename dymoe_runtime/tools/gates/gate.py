"""The result of gates: as values, as a table, and as JUnit's XML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from xml.etree import ElementTree

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.console import one_line
from dymoe_runtime.tools.intervals import Interval
from dymoe_runtime.units import format_size

VERSION = 1
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
BYTES, NATS, RATE, DIGEST = "bytes", "nats per token", "tokens/s", "SHA-256"


@dataclass(frozen=True)
class Gate:
    """What one gate found. `measured` is None if it was skipped; `detail` says on what, or why it was."""

    gate: str
    status: str  # PASSED, FAILED or SKIPPED
    measured: float | str | None
    limit: float | str
    unit: str
    detail: str = ""
    interval: Interval | None = None  # of 95%


def at_most(gate: str, measured: float, limit: float, unit: str, detail: str = "", interval: Any = None) -> Gate:
    """Return a gate that a figure passes up to `limit`; one that is no number fails."""
    return Gate(gate, PASSED if measured <= limit else FAILED, measured, limit, unit, detail, interval)


def at_least(gate: str, measured: float, limit: float, unit: str, detail: str = "") -> Gate:
    """Return a gate that a figure passes from `limit` on."""
    return Gate(gate, PASSED if measured >= limit else FAILED, measured, limit, unit, detail)


def failed(gates: Sequence[Gate]) -> list[str]:
    """Return the names of the gates that failed."""
    return [gate.gate for gate in gates if gate.status == FAILED]


def to_json(bundle: Bundle, point: str, profile: str | None, gates: Sequence[Gate]) -> dict[str, Any]:
    """Return the result as docs/schemas/check.schema.json describes it."""
    return {
        "version": VERSION,
        "bundle": str(bundle.path),
        "digest": bundle.manifest.digest,
        "point": point,
        "profile": profile,
        "passed": not failed(gates),
        "gates": [asdict(gate) for gate in gates],
    }


def format_gates(gates: Sequence[Gate]) -> str:
    """Return a table with a row for each gate."""
    rows = [("gate", "result", "measured", "limit", ""), *map(_row, gates)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4])).rstrip()
        for row in rows
    )


def _row(gate: Gate) -> tuple[str, str, str, str, str]:
    measured = "" if gate.measured is None else _figure(gate.measured, gate.unit)
    if gate.interval is not None:
        measured += f" ({gate.interval[0]:.5f} to {gate.interval[1]:.5f})"
    return gate.gate, gate.status, measured, _figure(gate.limit, gate.unit), gate.detail


def _figure(value: float | str, unit: str) -> str:
    if isinstance(value, str):
        return f"{value[:12]}…"
    if unit == BYTES:
        return format_size(value)
    return f"{value:.5f}" if unit == NATS else f"{value:.1f}/s"


def to_junit(result: dict[str, Any]) -> bytes:
    """Return the result of `to_json` as the XML of JUnit: a test case for each gate."""
    gates = result["gates"]
    counts = {
        "tests": str(len(gates)),
        "failures": str(sum(gate["status"] == FAILED for gate in gates)),
        "skipped": str(sum(gate["status"] == SKIPPED for gate in gates)),
    }
    suite = ElementTree.Element("testsuite", {"name": one_line(f"dymoe-bundle check {result['bundle']}"), **counts})
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "dymoe.check", "name": one_line(gate["gate"])})
        said = one_line(f"measured {gate['measured']}, limit {gate['limit']} {gate['unit']}; {gate['detail']}")
        if gate["status"] == PASSED:
            ElementTree.SubElement(case, "system-out").text = said
        else:
            kind = "failure" if gate["status"] == FAILED else "skipped"
            ElementTree.SubElement(case, kind, {"message": said})
    suites = ElementTree.Element("testsuites", counts)
    suites.append(suite)
    ElementTree.indent(suites)
    return bytes(ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)) + b"\n"
