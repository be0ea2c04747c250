"""The sections for who chooses: sizes at a glance, and which point for which memory."""

from __future__ import annotations

from dymoe_compile.report.memory import Memory
from dymoe_compile.report.values import Json, default_of, name_of, points_of, scalar
from dymoe_runtime.tools.charts.markup import element, paragraph, section, table, tag, text, tiles
from dymoe_runtime.tools.charts.numbers import finite, kl, number, percent, size


def glance(findings: Json) -> str:
    """Return the first words: what this is, its sizes, and how good its default point is."""
    storage, model = findings.get("storage") or {}, findings.get("model") or {}
    memory, point = Memory.of(findings), default_of(findings)
    original, bundle = finite(storage.get("original_bytes")), finite(storage.get("bundle_bytes"))
    facts = []
    if original:
        facts.append(("Original", size(original), "tensors of the checkpoint"))
    if bundle:
        facts.append(("Bundle", size(bundle), f"{percent(bundle / original, 0)} of the original" if original else ""))
    if memory is not None:
        facts.append(
            ("Least memory", size(memory.floor_bytes), f"whole process, {number(memory.context)} tokens of context")
        )
    if point is not None:
        if (agreed := finite(point.get("top1_agreement"))) is not None:
            facts.append(("Same next token", percent(agreed), f"as the original, at point {scalar(point.get('name'))}"))
        used = finite(point.get("bytes_per_token"))
        if memory is not None and used:
            facts.append(("No disk needed from", size(memory.needed_bytes(used)), "of memory, at the same point"))
        elif used:
            facts.append(("Experts per token", size(used), "at the same point"))
    shape = [model.get(key) for key in ("num_layers", "num_experts", "top_k")]
    layers, experts, top_k = map(number, shape)
    words = [f"A mixture-of-experts model of {layers} layers"] if shape[0] is not None else []
    words += [f"with {experts} experts each, of which a token uses {top_k}"] if None not in shape[1:] else []
    described = f"{' '.join(words)}. " if words else ""
    lede = (
        f"{described}This page says what was measured while it was compiled for DyMoE, and what follows for choosing."
    )
    return paragraph(lede, class_="lede") + tiles(facts)


def memory_table(findings: Json) -> str:
    """Return the section that says from which memory on each point runs without the disk."""
    memory, default = Memory.of(findings), default_of(findings)
    if memory is None:
        return ""
    listed = [p for p in best_of(points_of(findings)) if finite(p.get("bytes_per_token"))]
    rows = [
        (
            name_of(p, findings),
            size(memory.needed_bytes(p["bytes_per_token"])),
            percent(p.get("top1_agreement")),
            kl(p.get("kl")),
        )
        for p in listed
    ]
    about = (
        "An operating point is a rule that gives each expert of each token a number of bits, called its tier; it is "
        "named by the mean. More bits are nearer to the original and take more memory. Take the last line that your "
        "memory reaches: from there on no expert is read from the disk."
    )
    least = (
        f" Any point runs from {size(memory.floor_bytes)} on. With less memory than in its line, experts that do not "
        "fit are read from the disk when they are needed, which costs speed and no quality."
    )
    note = (
        f"Memory is that of the whole process, with a context of {number(memory.context)} tokens; longer ones take "
        "more. It has a few MiB in reserve. Points are left out where a smaller one is as good."
    )
    auto, budget = element("code", "--point auto"), element("code", "--memory")
    how = (text("With "), auto, text(" a run chooses by such a table itself; "), budget, text(" sets the budget."))
    return section(
        "Which point for which memory",
        paragraph(about),
        element("p", tag("computed from sizes"), text(least)),
        table(
            "Memory from which on a point needs no disk",
            ("point", "memory from", "same next token", "KL"),
            rows,
            [i for i, p in enumerate(listed) if p is default],
        ),
        paragraph(note, class_="soft") + element("p", *how, class_="soft"),
        name="memory",
    )


def best_of(points: list[Json]) -> list[Json]:
    """Return the points, smallest first, without those that a smaller one beats in KL."""
    best: list[Json] = []
    for point in points:
        reached = finite(point.get("kl"))
        lowest = min((value for p in best if (value := finite(p.get("kl"))) is not None), default=None)
        if reached is not None and (lowest is None or reached < lowest):
            best.append(point)
    return best
