"""The section on quality: figures of each point, the same against size, and examples of next tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from dymoe_compile.report.values import Json, compared, default_of, name_of, numbers, points_of, scalar
from dymoe_runtime.tools.charts.markup import element, fold, paragraph, section, table, tag, text
from dymoe_runtime.tools.charts.numbers import MISSING, finite, fixed, kl, number, percent, size
from dymoe_runtime.tools.charts.plot import Figure, Point, Series, plot
from dymoe_runtime.tools.charts.scales import Axis

# What the kinds of points are. The index of a kind sets its colour, whichever kinds were measured.
KINDS = {
    "mixed": "more bits for the experts that matter to the token, fitted for each layer",
    "uniform": "the same bits for all experts",
    "static": "bits for each expert, whatever the token",
    "cosine": "as mixed, less strict with depth by a cosine",
    "flat": "as mixed, equally strict in all layers",
    "peers": "other quantizers",
}
# Characters of a token that are not broken into lines.
UNBROKEN = 14
COLUMNS = (
    ("effective_bits", "bits per weight", lambda value: fixed(value, 2)),
    ("bytes_per_token", "experts per token", size),
    ("top1_agreement", "same next token", percent),
    ("kl", "KL", kl),
    ("kl_interval", "95% interval", lambda value: interval(value)),
    ("prefill_kl", "KL of prompts", kl),
    ("nll", "NLL", lambda value: fixed(value, 3)),
)


def quality(findings: Json) -> str:
    """Return the section on how near the points are to the original."""
    tokens = findings.get("measured_tokens")
    where = f" on {number(tokens)} tokens of held-out text" if finite(tokens) else ""
    about = (
        f"Each point was compared with the original model{where}. “Same next token” is how often both take the same "
        "token for the likeliest. KL says how far apart their predictions are, in nats per token: up to 0.01 the texts "
        "are hard to tell apart, at 0.05 a careful reader notices, beyond 0.2 it is another model."
    )
    shown = points_table(findings) + pareto(findings) + examples(findings)
    return section(
        "How good it is", element("p", tag("measured"), text(f" {about}")) if shown else "", shown, name="quality"
    )


def points_table(findings: Json) -> str:
    """Return the table of the operating points."""
    points = points_of(findings)
    rows = _rows(points, findings)
    chosen = [i for i, p in enumerate(points) if p is default_of(findings)]
    nll = findings.get("reference_nll")
    words = "“Bits per weight” has scales in it; “KL of prompts” is when a prompt is read, not written."
    words += f" NLL is in nats per token; the original's is {fixed(nll, 3)}." if finite(nll) is not None else ""
    return paragraph(words, class_="soft") + table("Points of the bundle", *rows, chosen=chosen) if rows else ""


def _rows(points: Sequence[Json], findings: Json) -> tuple[Sequence[str], list[list[str]]] | tuple[()]:
    """Return heading and rows of a table of points, with the columns that any of them has; () without points."""
    if not points:
        return ()
    columns = [(key, title, show) for key, title, show in COLUMNS if any(show(p.get(key)) != MISSING for p in points)]
    rows = []
    for point in points:
        rows.append([name_of(point, findings), *(show(point.get(key)) for key, _, show in columns)])
    return ("point", *(title for _, title, _ in columns)), rows


def interval(value: object) -> str:
    """Return the text of an interval of KL, or a dash if it is missing."""
    bounds = numbers(value)
    return MISSING if len(bounds) != 2 or None in bounds else f"{kl(bounds[0])} to {kl(bounds[1])}"


def pareto(findings: Json) -> str:
    """Return the figure of quality against size of all measured points and of peers, and the others as a table."""
    emitted = points_of(findings)
    known = {(p.get("kind"), p.get("name")) for p in emitted}
    compared = [p for p in findings.get("compared") or [] if (p.get("kind"), p.get("name")) not in known]
    others = [*compared, *({**peer, "kind": "peers"} for peer in findings.get("peers") or [])]
    drawn: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    for measured, hollow in ((emitted, False), (others, True)):
        for point in measured:
            drawn.setdefault(scalar(point.get("kind")), []).extend(_mark(point, hollow, findings))
    series = [
        Series(kind, slot, sorted(points, key=lambda p: p.x), kind != "peers", KINDS.get(kind, ""))
        for slot, (kind, points) in enumerate(drawn.items())
    ]
    caption = "Lower and further left is better. Filled marks are in the bundle, hollow ones were measured to compare."
    x, y = Axis("bits per expert weight"), Axis("KL, nats per token", log=True)
    named = [{**point, "name": f"{scalar(point.get('kind'))} {scalar(point.get('name'))}".strip()} for point in others]
    rows = _rows(named, {})
    listed = fold("Measured to compare, as a table", table("Points that are not in the bundle", *rows)) if rows else ""
    return plot(Figure("Quality against size", caption, beside=True), series, x, y) + listed


def _mark(point: Json, hollow: bool, findings: Json) -> list[Point]:
    """Return the mark of a measured point, or [] if its size or KL is missing.

    Peers and the default point are labelled in the chart.
    """
    x, y, name = finite(point.get("effective_bits")), finite(point.get("kl")), scalar(point.get("name"))
    if x is None or y is None:
        return []
    tip = f"{name} ({scalar(point.get('kind'))}): {fixed(x, 2)} bits, KL {kl(y)}"
    named = point.get("kind") == "peers" or (not hollow and name and point.get("name") == findings.get("default_point"))
    return [Point(x, y, tip, name if named else "", hollow, label_below=not hollow)]


def examples(findings: Json) -> str:
    """Return the examples of next tokens: those spread evenly, then those where the smallest point differs."""
    found = findings.get("examples") or {}
    shown = [example for example in found.get("shown") or [] if isinstance(example, Mapping)]
    points = compared(findings)
    if not shown or not points:
        return ""
    places, agreed = finite(found.get("places")), found.get("agreed") or {}
    smallest = scalar(points[0].get("name"))
    even = [example for example in shown if not example.get("differs")]
    odd = [example for example in shown if example.get("differs")]
    about = (
        "What is taken to come next in pieces of the held-out text, with its probability. Nobody picked the places: "
        "they are spread evenly over the text."
    )
    counts = ""
    if places:
        told = (f"{scalar(p.get('name'))} at {number(agreed.get(p.get('name')))}" for p in points)
        counts = f"At {number(int(places))} such places the same token as the original was taken by {_listed(told)}."
    where = (
        f"In addition, some of these {number(int(places or 0))} where {smallest}, the smallest point, takes another "
        "token than the original. They show how it fails, not how often."
    )
    return "".join(
        (
            element("h3", text("Examples of next tokens")),
            paragraph(about, counts),
            _cards(even, points, findings),
            paragraph(where) + _cards(odd, points, findings) if odd else "",
        )
    )


def _cards(shown: Iterable[Json], points: Sequence[Json], findings: Json) -> str:
    return element("ul", *(element("li", _card(example, points, findings)) for example in shown), class_="cards")


def _card(example: Json, points: Sequence[Json], findings: Json) -> str:
    """Return a piece of text, and what the original and each point take to follow it."""
    made = example.get("points") or {}
    guesses: list[tuple[str, object]] = [("in the text", {"token": example.get("follows")})]
    guesses += [("original", example.get("original"))]
    guesses += [(name_of(point, findings), made.get(point.get("name"))) for point in points]
    rows = [_guess(name, guess) for name, guess in guesses if isinstance(guess, Mapping)]
    head = element("tr", *(element("th", text(title), scope="col") for title in ("model", "next token", "probability")))
    whole = element("table", element("thead", head), element("tbody", *rows))
    quote = text(f"… {scalar(example.get('context')).lstrip()}")
    return element("blockquote", quote, class_="quote", dir="auto") + whole


def _guess(name: str, guess: Json) -> str:
    """Return the row of a guess; one that differs from the original's says so, and what it gave that one."""
    differs = guess.get("same") is False
    mark = element("span", text(" differs"), class_="other") if differs else ""
    sure = percent(guess.get("probability"), 0) if "probability" in guess else ""
    if differs and finite(guess.get("of_original")) is not None:
        sure += f" (original's {percent(guess.get('of_original'), 0)})"
    cells = element("td", _code(guess.get("token")), mark) + element("td", text(sure))
    return element("tr", element("th", text(name), scope="row"), cells)


def _code(token: object) -> str:
    """Return a token with its spaces and line breaks visible."""
    shown = re.sub(" {5,}", lambda run: f"␣×{len(run[0])}", scalar(token))
    shown = shown.translate({ord(" "): "␣", ord("\n"): "⏎", ord("\r"): "␍", ord("\t"): "⇥"})
    long = {"class_": "long"} if len(shown) > UNBROKEN else {}
    return element("code", element("bdi", text(shown)), **long) if shown else text(MISSING)


def _listed(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
