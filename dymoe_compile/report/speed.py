"""The section on speed: what a token reads with how much memory, and what disks allow. Nothing is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dymoe_compile.report.memory import Memory
from dymoe_compile.report.values import Json, compared, default_of, name_of, scalar
from dymoe_runtime.tools.charts.markup import element, fold, paragraph, section, table, tag, text
from dymoe_runtime.tools.charts.numbers import MISSING, finite, number, percent, size, three
from dymoe_runtime.tools.charts.plot import Figure, Point, Series, plot
from dymoe_runtime.tools.charts.scales import Axis

# Disks that speeds are given for, in bytes per second: one behind SATA or a fast card, an NVMe disk, and a fast one.
DISKS = (0.5e9, 2e9, 5e9)
# Memory bandwidth for which the ceiling of a model in memory is given, bytes per second.
BANDWIDTH = 10e9
# Tokens per second from which on something else than reading sets the limit.
OTHER_LIMIT = 1000
# Memory of the rows of a table, from the least to that of all experts; and steps of the chart between them.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = 24
MIB, GIB = 1 << 20, 1 << 30


def speed(findings: Json) -> str:
    """Return the section on speed, or "" if the figures that it takes are missing."""
    memory = Memory.of(findings)
    points = [p for p in compared(findings) if finite(p.get("bytes_per_token"))]
    if memory is None or not points:
        return ""
    default = default_of(findings)
    main = next((p for p in points if p is default), points[-1])
    about = (
        " Nothing on this page was timed, because speed belongs to a machine. What is known is how many bytes a token "
        "has to read, and while experts come from the disk, that decides. The estimate keeps the experts in memory "
        "that calibration used most; it leaves out prefetching, which hides a part of the reads."
    )
    legend = (
        "Below each disk speed are the tokens/s that it allows at most; a dash is where nothing is read. SATA disks "
        "and fast cards reach about 0.5 GB/s, NVMe disks 2 to 7."
    )
    others = (
        fold(f"The same at point {name_of(p, findings)}", disk_table(memory, p, findings))
        for p in points
        if p is not main
    )
    measure = (
        element("code", "dymoe-run probe BUNDLE"),
        text(" measures a machine, and says what each point reaches."),
    )
    return section(
        "How fast it can be",
        element("p", tag("estimated"), text(about)),
        reads_chart(memory, points, default),
        paragraph(legend),
        disk_table(memory, main, findings),
        *others,
        paragraph(in_memory(findings, main), of_profile(findings, memory, main)),
        element("p", *measure, class_="soft"),
        name="speed",
    )


def disk_table(memory: Memory, point: Json, findings: Json) -> str:
    """Return the table of what a token reads at a point with more and more memory, and what each disk allows."""
    used = float(point["bytes_per_token"])
    rows = []
    for share in SHARES:
        budget = memory.floor_bytes + share * (memory.needed_bytes(used) - memory.floor_bytes)
        read = memory.read_bytes(budget, used)
        rates = [ceiling(rate, read) for rate in DISKS]
        rows.append((size(budget), size(read) if read else "nothing", *rates, percent(1 - read / used, 0)))
        if memory.needed_bytes(used) == memory.floor_bytes:
            break
    heading = ("memory", "read per token", *(f"{rate / 1e9:g} GB/s" for rate in DISKS), "experts found in memory")
    return table(f"Point {name_of(point, findings)}: what the disk allows", heading, rows)


def ceiling(bytes_per_s: float, nbytes: float) -> str:
    """Return how many times a second so many bytes can be read, or a dash if there are none."""
    rate = bytes_per_s / nbytes if nbytes else None
    return MISSING if rate is None else three(rate) if rate < OTHER_LIMIT else f">{number(OTHER_LIMIT)}"


def in_memory(findings: Json, point: Json) -> str:
    """Return what bounds a run whose experts are all in memory."""
    dense = finite((findings.get("storage") or {}).get("dense_bytes_per_token")) or 0.0
    whole = float(point["bytes_per_token"]) + dense
    return (
        f"With all experts in memory a token at point {scalar(point.get('name'))} reads {size(whole)} of weights from "
        f"there: at most {number(BANDWIDTH / whole)} tokens/s for every {BANDWIDTH / 1e9:g} GB/s of memory bandwidth."
    )


def of_profile(findings: Json, memory: Memory, point: Json) -> str:
    """Return what the profile's memory and disk, as it states them, give; "" if it is not known or too small."""
    profile = (findings.get("provenance") or {}).get("profile")
    profile = profile if isinstance(profile, Mapping) else {}
    budget, rate = finite(profile.get("memory_bytes")), finite(profile.get("disk_bytes_per_s"))
    if not budget or not rate or budget < memory.floor_bytes:
        return ""
    read = memory.read_bytes(budget, float(point["bytes_per_token"]))
    reached = f"{size(read)} are read per token, {ceiling(rate, read)} tokens/s at most" if read else "nothing is read"
    stated = f"{size(budget)} of memory and a disk of {number(rate / 1e9)} GB/s"
    return f"The profile {scalar(profile.get('name'))}, for which this was compiled, states {stated}: {reached}."


def reads_chart(memory: Memory, points: Sequence[Json], default: Json | None) -> str:
    """Return a chart of the bytes that a token reads against memory, for each of `points`."""
    most = max(memory.needed_bytes(p["bytes_per_token"]) for p in points)
    if most <= memory.floor_bytes:
        return ""
    unit, name = (GIB, "GiB") if most >= 2 * GIB else (MIB, "MiB")
    steps = [memory.floor_bytes + (most - memory.floor_bytes) * i / STEPS for i in range(STEPS + 1)]
    series = []
    for slot, point in enumerate(points):
        marks = []
        for budget in steps:
            read = memory.read_bytes(budget, float(point["bytes_per_token"]))
            tip = f"{scalar(point.get('name'))} with {size(budget)}: {size(read) if read else 'nothing'} read per token"
            marks.append(Point(budget / unit, read / MIB, tip))
        about = "the default" if point is default else "the smallest" if slot == 0 else "the largest"
        series.append(Series(scalar(point.get("name")), slot, marks, about=f"{about} point"))
    caption = "Lower is faster. Where a line reaches 0, the point needs no disk."
    figure = Figure("Read from the disk per token", caption, beside=True)
    return plot(figure, series, Axis(f"memory of the process, {name}"), Axis("MiB per token", from_zero=True))
