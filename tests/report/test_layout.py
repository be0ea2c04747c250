"""Pages in a browser: on a small phone nothing is cut off or too small, and nothing is asked for from outside."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report.kit import findings

from dymoe_compile.report.page import render
from dymoe_runtime.tools import replay_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (375, 1280)
SMALLEST_TEXT = 11
# Runs in the page around: measures the pages in its frames once they are laid out, and prints that as its own text.
MEASURE = """
const seen = [...document.querySelectorAll("iframe")].map((frame) => {
  const page = frame.contentDocument, width = frame.clientWidth;
  page.querySelectorAll("details").forEach((part) => { part.open = true; });
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), small = [], outside = [];
  while (texts.nextNode()) {
    const node = texts.currentNode, parent = node.parentElement, range = page.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!node.data.trim() || !box.width || ["title", "desc", "TITLE"].includes(parent.tagName)) continue;
    const drawing = parent.closest("svg"), scale = drawing ? drawing.getScreenCTM().a : 1;
    const size = parseFloat(frame.contentWindow.getComputedStyle(parent).fontSize) * scale;
    if (size < SMALLEST) small.push([node.data, size]);
    if ((box.left < -0.5 || box.right > width + 0.5) && !parent.closest(".scroll")) outside.push(node.data);
  }
  return {name: frame.title, width, scrolls: page.documentElement.scrollWidth, small, outside,
          texts: page.body.innerText.length,
          requests: frame.contentWindow.performance.getEntriesByType("resource").length};
});
document.body.textContent = "<<" + JSON.stringify(seen) + ">>";
"""


def trace() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for number in range(1, 40):
        common = {"pass": number, "tokens": 1}
        figures = {"wants": [[0, 2, 1]] * 4, "hits": 3, "read_bytes": 1 << 20, "wait_s": 0.001, "seconds": 0.004}
        lines += [common | {"layer": 0} | figures]
        lines += [common | {"seconds": 0.01, "point": "3", "prompt": False, "memory_bytes": 1 << 30}]
    return lines


def pages() -> dict[str, str]:
    long = findings(layers=3)
    name = "n" * 100
    long["default_point"] = long["points"][1]["name"] = long["compared"][2]["name"] = name
    long["provenance"] |= {"origin": {"repository": f"{'o' * 60}/{'m' * 60}"}, name: name}
    long["examples"]["shown"][0] |= {"context": "unbroken" * 40, "follows": name}
    row = {"arena_bytes": 1 << 28, "eviction": "per-layer", "fade": 1.01, "decode_hit_rate": 0.5}
    rows = [row | {"decode_read_bytes_per_token": 12345.6}]
    return {
        "small": render(findings()),
        "large": render(findings(layers=48, experts=128)),
        "long names": render(long),
        "without measurements": render({"model": {"name": "m"}}),
        "replay": replay_page.render(trace(), rows, f"{name}.jsonl"),
    }


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt install chromium)")
def test_pages_fit_a_phone_and_a_screen(tmp_path: Path) -> None:
    frames = "".join(
        f'<iframe title="{name}" style="border:0;width:{width}px;height:600px" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages().items()
        for width in WIDTHS
    )
    around = tmp_path / "around.html"
    script = f"const SMALLEST = {SMALLEST_TEXT}; onload = () => {{ {MEASURE} }};"
    around.write_text(f"<body>{frames}<script>{script}</script>", encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-extensions",
        "--no-first-run",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--dump-dom", around.as_uri()]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    found = re.search(r"<body>&lt;&lt;(.*)&gt;&gt;</body>", printed, re.DOTALL)
    assert found is not None, printed[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert len(seen) == 5 * len(WIDTHS) and all(page["texts"] > 100 for page in seen)
    for page in seen:
        where = (page["name"], page["width"])
        assert page["scrolls"] <= page["width"], where
        assert not page["small"] and not page["outside"], (where, page["small"], page["outside"])
        assert page["requests"] == 0, where
