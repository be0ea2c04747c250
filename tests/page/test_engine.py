"""The page on a real model, served by dymoe-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from page.kit import until
from serving.kit import serving

from dymoe_runtime.bundle.bundle import Bundle


def test_the_model_answers_and_its_figures_are_seen(driver: Any, shipped_path: Path) -> None:
    from page.browser import Page

    spec = Bundle.open(shipped_path).spec
    with serving(shipped_path, "--max-tokens", 40, "--model-name", "demo") as running:
        page = Page(driver, running.url).open()
        assert f"{spec.num_layers} layers" in page.text("#welcome")
        answer = page.ask("Once upon a time")
        said = running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once upon a time"}]})
        assert len(answer) > 10 and answer.split() == said["choices"][0]["message"]["content"].split()
        until(lambda: len(page.find(".map .tier")) == len(spec.moe_layers) * spec.top_k)
        assert page.texts(".legend li") == ["4 bits\n100%"] or "2 bits" in page.text(".legend")
        assert page.text("#live .tiers .figure") == "4.00\nbits on average"
        page.picture("engine")
        page.check()
        page.driver.get("about:blank")
