"""The HTML of a page: elements, tables and lists, all text escaped; and the style sheet.

A page is one file. It has no script and asks for nothing outside itself, which its content security policy enforces.
Colours are CSS classes, `s0` to `s5` for series and `c0` to `c6` for cells, so that one drawing serves light screens,
dark screens and paper.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from dymoe_runtime.console import printable

SERIES, SHADES = 6, 7

STYLE = """
:root{color-scheme:light;--page:#fff;--ink:#1c2733;--soft:#55626f;--rule:#d5dce3;--edge:#8494a3;--mark:#eaf2fb;
--tint:#f5f8fb;--link:#0b5cad;--bad:#a3330b;
--s0:#0072b2;--s1:#c24e00;--s2:#007f5f;--s3:#a8508a;--s4:#946200;--s5:#444c55;
--c0:#e3eefa;--c1:#c6dbef;--c2:#9ecae1;--c3:#6baed6;--c4:#4292c6;--c5:#2171b5;--c6:#08306b}
@media screen and (prefers-color-scheme:dark){:root{color-scheme:dark;--page:#11171d;--ink:#e2e8ee;--soft:#a7b3bf;
--rule:#333e49;--edge:#6f7d8b;--mark:#1a2f45;--tint:#18212a;--link:#7ab8f5;--bad:#ff9a6b;
--s0:#56b4e9;--s1:#f58a4b;--s2:#2cc99a;--s3:#e39bc5;--s4:#e6b84d;--s5:#c3cad1;
--c0:#14273d;--c1:#1b3a5e;--c2:#23548a;--c3:#2f74b5;--c4:#5598d0;--c5:#8dbfe6;--c6:#d9ebfb}}
*{box-sizing:border-box;print-color-adjust:exact;-webkit-print-color-adjust:exact}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:2rem 1rem 4rem;max-width:66rem;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,sans-serif;overflow-wrap:anywhere}
p,.notes{max-width:46rem}a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
h1{margin:0;font-size:clamp(1.5rem,5vw,2.2rem);line-height:1.2}
h2{margin:3.2rem 0 .6rem;padding-top:.8rem;border-top:2px solid var(--rule);font-size:1.5rem;line-height:1.25}
h3{margin:2rem 0 .3rem;font-size:1.1rem}figure h3{margin-top:0}
.lede{font-size:1.15rem}.soft,figcaption,caption{color:var(--soft)}
figcaption,caption{text-align:left;font-size:.9rem}caption{padding:0 0 .5rem;overflow-wrap:anywhere}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:1rem 0 0;padding:0;list-style:none}
nav a{display:inline-block;padding:.25rem 0}
.tag{display:inline-block;padding:0 .45rem;border:1px solid var(--edge);border-radius:1rem;color:var(--soft);
font-size:.75rem;font-weight:400;white-space:nowrap;vertical-align:middle}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:.7rem;margin:1.4rem 0}
.tiles div{padding:.7rem .9rem;border:1px solid var(--rule);border-radius:.6rem;background:var(--tint)}
.tiles dt{color:var(--soft);font-size:.85rem}.tiles dd{margin:0}
.tiles .value{font-size:1.45rem;font-weight:650;line-height:1.3}.tiles .under{color:var(--soft);font-size:.85rem}
.facts{display:grid;grid-template-columns:minmax(10rem,max-content) 1fr;gap:.25rem 1.4rem;margin:.6rem 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;min-width:0}
@media (max-width:40rem){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin:0 0 .5rem}}
.scroll{overflow-x:auto;margin:1rem 0;width:fit-content;max-width:100%;
background:linear-gradient(var(--page),var(--page)) right -2px top/1.6rem 100% local no-repeat,
linear-gradient(to left,var(--rule),transparent) right -2px top/.7rem 100% scroll no-repeat}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.35rem .7rem;text-align:right;border-bottom:1px solid var(--rule);vertical-align:baseline}
thead th{vertical-align:bottom;border-bottom-color:var(--edge);font-size:.85rem;line-height:1.3}
th:first-child,td:first-child{text-align:left;padding-left:.3rem;overflow-wrap:anywhere;min-width:5.4rem}
.scroll td{white-space:nowrap}.scroll tr>:first-child{position:sticky;left:0;background:var(--page)}
tbody th{font-weight:600}.scroll tr.chosen>*{background:var(--mark)}
@media (max-width:40rem){th,td{padding:.35rem .3rem}table{font-size:.9rem}}
details{margin:1rem 0}summary{cursor:pointer;padding:.25rem 0;color:var(--link)}details table{font-size:.85rem}
figure{margin:1.6rem 0;break-inside:avoid}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem 2.5rem}
.plot{display:block;width:100%;max-width:30rem;height:auto}
@media (min-width:56rem){figure.beside{display:grid;grid-template-columns:minmax(0,32rem) 1fr;gap:0 2.2rem;
grid-template-rows:auto auto 1fr}figure.beside>h3{grid-column:1/-1}
figure.beside>.plot{grid-row:2/span 2;max-width:none}.beside .legend{display:block}.beside .legend li{margin:0 0 .5rem}}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}svg text.axis,svg text.label{fill:var(--ink)}
.label{paint-order:stroke;stroke:var(--page);stroke-width:3px}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.3rem 0;padding:0;list-style:none;font-size:.9rem}
.legend li{display:flex;align-items:baseline;gap:.45rem}.legend svg{flex:none;position:relative;top:.15em}
.key{width:32px;height:14px}.swatch{display:inline-block;width:14px;height:14px}
.ramp{display:inline-flex;margin:0 .4rem;vertical-align:-.15em}
.grid,.frame{fill:none;stroke:var(--rule)}.zero{stroke:var(--edge)}
.line{fill:none;stroke:currentColor;stroke-width:1.6}.mark{fill:currentColor;stroke:currentColor;stroke-width:1.4}
.mark.hollow{fill:var(--page)}.area{fill:currentColor;stroke:var(--page);stroke-width:.6}.tip{fill:transparent}
.heat{display:grid;grid-template-columns:2.4rem minmax(0,1fr);font-size:12px;color:var(--soft)}
.heat svg{width:100%;shape-rendering:crispEdges;border:1px solid var(--rule)}
.heat div{position:relative}.heat span{position:absolute;line-height:1;transform:translateY(-50%);right:.5rem}
.heat .columns{height:1.4rem}.heat .columns span{right:auto;top:.8rem;transform:translate(-50%,-50%)}
.heat .corner{height:1.4rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1rem;margin:1rem 0;
padding:0;list-style:none}
.cards>li{padding:.9rem 1rem;border:1px solid var(--rule);border-radius:.6rem;background:var(--tint);min-width:0}
.quote{margin:0 0 .6rem;white-space:pre-wrap;font-size:.95rem;line-height:1.45}
.cards table{width:100%;font-size:.9rem}.cards th,.cards td{padding:.2rem .35rem}
.cards tbody tr:last-child>*{border-bottom:0}
code{font:.92em ui-monospace,monospace;padding:.05rem .25rem;border-radius:.25rem;background:var(--mark);
white-space:pre-wrap;overflow-wrap:normal}code.long{overflow-wrap:anywhere}
.other{color:var(--bad);font-weight:600}
@media print{body{max-width:none;padding:0;font-size:10pt}h2{break-after:avoid}.scroll{overflow:visible}
nav{display:none}
table,details table{font-size:8pt}th,td{padding:.1rem .35rem}
details::details-content{content-visibility:visible;display:block}}
""" + "".join(
    [f".s{i}{{color:var(--s{i})}}" for i in range(SERIES)]
    + [f".c{i}{{fill:var(--c{i});background:var(--c{i})}}" for i in range(SHADES)]
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(name: str, *parts: str) -> str:
    """Return an HTML page; `name` is its title and gets escaped, `parts` are the markup of its body."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{_meta("Content-Security-Policy", POLICY)}'
        f"<title>{text(name)}</title>"
    )
    body = element("body", *parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{element("style", STYLE)}</head>{body}</html>\n'


def element(name: str, *children: str, **attributes: object) -> str:
    """Return an HTML element.

    Attribute values get escaped. In attribute names `class_` means class, and other underscores become hyphens.
    Children are markup; escape text with `text`.
    """
    listed = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    return f"<{name}{listed}>{''.join(children)}</{name}>"


def text(value: object) -> str:
    """Return `value` as escaped text, a float with up to two decimals.

    Control characters and those that change the direction of text are spelled out, so that text from a checkpoint can
    neither harm a page nor show something else than it says.
    """
    return html.escape(printable(short(value) if isinstance(value, float) else str(value)))


def short(value: float) -> str:
    """Return a coordinate with up to two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def section(title: str, *parts: str, name: str = "") -> str:
    """Return a section with a heading, or "" if all parts are empty; `name` is what links lead to."""
    target = {"id": name} if name else {}
    return element("section", element("h2", text(title), **target), *parts) if any(parts) else ""


def links(sections: Iterable[tuple[str, str]]) -> str:
    """Return links to sections, (name, title) each."""
    items = (element("li", element("a", text(title), href=f"#{name}")) for name, title in sections)
    return element("nav", element("ul", *items), aria_label="Contents")


def paragraph(*sentences: str, **attributes: object) -> str:
    """Return a paragraph of text, or "" without any."""
    return element("p", text(" ".join(filter(None, sentences))), **attributes) if any(sentences) else ""


def tag(name: str) -> str:
    """Return a small mark that says how a figure came about."""
    return element("span", text(name), class_="tag")


def fold(title: str, content: str) -> str:
    """Return content that opens on demand, and on paper, or "" if it is empty."""
    return element("details", element("summary", text(title)), content) if content else ""


def table(caption: str, heading: Iterable[object], rows: Iterable[Sequence[object]], chosen: Sequence[int] = ()) -> str:
    """Return a table whose first column names the rows, or "" without rows; rows in `chosen` are marked.

    A wide one scrolls by itself, with the keyboard too.
    """

    def row(cells: Sequence[object], marked: bool) -> str:
        first, *others = cells
        mark = {"class_": "chosen"} if marked else {}
        return element("tr", element("th", text(first), scope="row"), *(element("td", text(c)) for c in others), **mark)

    body = [row(cells, i in chosen) for i, cells in enumerate(rows)]
    if not body:
        return ""
    head = element("tr", *(element("th", text(title), scope="col") for title in heading))
    whole = element("table", element("caption", text(caption)), element("thead", head), element("tbody", *body))
    return element("div", whole, class_="scroll", role="region", tabindex=0, aria_label=caption)


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a definition list of (term, text) pairs, or "" if there are none."""
    listed = "".join(element("dt", text(term)) + element("dd", text(value)) for term, value in pairs)
    return element("dl", listed, class_="facts") if listed else ""


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Return large figures, (name, value, what is below it) each, or "" if there are none."""
    listed = "".join(
        element(
            "div",
            element("dt", text(name)),
            element("dd", text(value), class_="value"),
            element("dd", text(below), class_="under") if below else "",
        )
        for name, value, below in facts
    )
    return element("dl", listed, class_="tiles") if listed else ""


def _meta(name: str, content: str) -> str:
    return f'<meta http-equiv="{text(name)}" content="{text(content)}">'
