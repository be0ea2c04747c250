"""How the page looks: both themes, a wide window and a phone, keyboard, screen reader. Pictures are in build/page/."""

from __future__ import annotations

import re
from typing import Any

import pytest
from page.kit import LAYERS, RANKS, Playback, Script, until
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

ANSWER = """An expert is stored **once**, in *planes*:

1. The lowest plane alone is an expert of `2` bits.
   - it is always read first
   - further planes make it more precise
2. A token reads only what its routing weight is worth.

```python
def choose(weights: list[float], thresholds: list[float]) -> list[int]:
    \"\"\"Return the tier of each expert.\"\"\"
    return [sum(weight > threshold for threshold in thresholds) for weight in weights]
```

| tier | bits | share | error |
|:--|--:|--:|--:|
| low | 2 | 38% | 0.089 |
| high | 4 | 35% | 0.033 |

> Reading less is the only way to be faster than the disk.

More is in [the documentation](https://example.org/docs/a-rather-long-path-that-does-not-break-anywhere-at-all).
"""
SMALLEST_TEXT, LEAST_CONTRAST, SMALLEST_TARGET = 11, 4.5, 28
# Tells what is outside of the window, too small, or hardly to be told from its ground; and controls without a name.
MEASURE = """
const [smallest, least, target] = arguments, found = [];
const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
const pen = canvas.getContext("2d", { willReadFrequently: true });
const mixed = (colors) => {
  pen.clearRect(0, 0, 1, 1);
  for (const color of colors) {
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
  }
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((value) => value / 255)
  .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
  .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
const grounds = (element) =>
  element ? [...grounds(element.parentElement), getComputedStyle(element).backgroundColor] : [];
const seen = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
if (document.documentElement.scrollWidth > innerWidth) found.push(["scrolls", document.documentElement.scrollWidth]);
const above = document.querySelector("dialog[open], #shade:not([hidden])");
const roots = above ? "dialog[open], main[inert] ~ #live, .listing #sidebar" : "body";
for (const root of document.querySelectorAll(roots)) {
  const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), parent = texts.currentNode.parentElement;
    if (!text || !seen(parent) || parent.closest(".unseen, .skip, script, style, option, :disabled")) continue;
    const range = document.createRange(), style = getComputedStyle(parent);
    range.selectNodeContents(texts.currentNode);
    const box = range.getBoundingClientRect();
    const outside = box.left < -0.5 || box.right > innerWidth + 0.5;
    if (outside && !parent.closest(".wide-table, pre, .open, #title")) found.push(["outside", text]);
    if (parseFloat(style.fontSize) < smallest) found.push(["small", text]);
    const under = grounds(parent), [a, b] = [light(mixed(under)), light(mixed([...under, style.color]))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least) found.push(["contrast", text, contrast]);
  }
  for (const element of root.querySelectorAll("button, input, textarea, select, a[href], summary")) {
    if (!seen(element) || element.closest(".skip, [inert]")) continue;
    const name = element.getAttribute("aria-label") ?? element.labels?.[0]?.innerText ?? element.textContent;
    if (!name.trim()) found.push(["nameless", element.outerHTML.slice(0, 120)]);
    const { width, height } = element.getBoundingClientRect();
    if (element.matches("button") && Math.min(width, height) < target) found.push(["narrow", name, width, height]);
  }
}
return found;
"""


def measured(page: Any, name: str) -> None:
    """Keep a picture, and assert that everything can be seen."""
    page.rest()
    page.picture(name)
    assert page.run(MEASURE, SMALLEST_TEXT, LEAST_CONTRAST, SMALLEST_TARGET) == [], name


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", ["wide", "phone"])
def test_everything_can_be_seen(page: Any, service: Playback, width: str, dark: bool) -> None:
    tag = f"{width}-{'dark' if dark else 'light'}"
    page.open(width, dark)
    measured(page, f"{tag}-1-welcome")
    words = re.findall(r"\s*\S+", ANSWER)
    service.play(Script(words, ["The question is about tiers.", " Planes, then."]), Script(["word "] * 9, endless=True))
    page.say("How do nested tiers of precision work, and why do they help a small machine?")
    page.finish()
    page.run("document.querySelector('.reasoning').open = true")
    measured(page, f"{tag}-2-answer")
    page.run("document.querySelector('#scroll').scrollTop = 0")
    measured(page, f"{tag}-3-top")
    page.say("Go on")
    until(lambda: "word" in page.texts(".answer .text")[-1])
    measured(page, f"{tag}-4-running")
    page.press("Stop the answer")
    page.finish()
    page.press("Settings")
    measured(page, f"{tag}-5-settings")
    page.press("Done")
    service.play(Script(refusal=RuntimeError("x")))
    page.say("Hm")
    until(lambda: page.find(".fault"))
    measured(page, f"{tag}-6-fault")
    if width == "phone":
        page.press("Conversations")
        measured(page, f"{tag}-7-list")
        page.press("Close the list of conversations")
        page.press("Live figures of the engine")
        until(lambda: page.find(".map span"))
        measured(page, f"{tag}-8-live")
    page.note()
    page.said = [message for message in page.said if "status of 500" not in message]


def test_the_theme_is_chosen_and_kept(page: Any) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(ground)
    page.press("Settings")
    Select(page.one("dialog [name=theme]")).select_by_visible_text("Dark")
    dark = page.run(ground)
    page.press("Done")
    page.open(empty=False)
    assert page.run(ground) == dark != light
    page.open(dark=True, empty=False)
    page.press("Settings")
    Select(page.one("dialog [name=theme]")).select_by_visible_text("Light")
    assert page.run(ground) == light


def test_the_keyboard_reaches_everything_in_order(page: Any, service: Playback) -> None:
    service.play(Script(["One"]))
    page.ask("Hi")
    page.open(empty=False)
    name = "const element = document.activeElement; return element.getAttribute('aria-label') ?? element.textContent"
    assert (
        page.run("const first = document.querySelector('a, button'); first.focus(); return first.className") == "skip"
    )
    seen = []
    for _ in range(7):
        page.key(Keys.TAB)
        seen.append(page.run(name))
    assert seen[:4] == ["New conversation", "Hi", "Rename “Hi”", "Delete “Hi”"]
    assert seen[4:] == ["Live figures of the engine", "Settings", "Message"]
    page.run("document.querySelector('.skip').focus()")
    page.key(Keys.ENTER)
    assert page.run("return document.activeElement.id") == "message"
    page.one("#open-settings").send_keys(Keys.ENTER)
    page.one("dialog[open]")
    page.key(Keys.ESCAPE)
    until(lambda: not page.find("dialog"))
    assert page.run("return document.activeElement.id") == "open-settings"


def test_drawers_of_a_phone_hold_the_focus_and_give_it_back(page: Any) -> None:
    page.open("phone")
    hidden = "return [document.querySelector('#sidebar').inert, document.querySelector('main').inert]"
    assert page.run(hidden) == [True, False] and not page.one("#live").is_displayed()
    for button, label in (("Conversations", "open-sidebar"), ("Live figures of the engine", "open-live")):
        page.press(button)
        assert page.run(hidden)[1] is True and page.one("#shade").is_displayed()
        page.key(Keys.ESCAPE)
        assert page.run(hidden) == [True, False] and page.run("return document.activeElement.id") == label
        assert page.one(f"#{label}").get_attribute("aria-expanded") == "false"


def test_a_screen_reader_hears_beginnings_and_ends_alone(page: Any, service: Playback) -> None:
    page.run("""
        window.heard = [];
        new MutationObserver(() => heard.push(document.querySelector("#announcer").textContent))
            .observe(document.querySelector("#announcer"), { childList: true, characterData: true, subtree: true });
    """)
    service.play(Script(["one "] * 40))
    page.ask("Hi")
    assert page.run("return heard") == ["The model answers.", "The answer is complete: 40 words."]
    roles = {"#transcript": "off", "#announcer": None}
    assert {selector: page.one(selector).get_attribute("aria-live") for selector in roles} == roles
    assert page.run("return [...document.querySelectorAll('[aria-live], [role=alert], [role=status]')].length") == 3


def test_who_asks_for_less_motion_gets_none(page: Any, service: Playback) -> None:
    service.play(Script(["word "], endless=True))
    moving = "return document.getAnimations().filter((one) => one.playState === 'running').length"
    page.send("Go")
    until(lambda: page.find(".writing") and page.run(moving))
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    until(lambda: page.run(moving) == 0)
    page.press("Stop the answer")
    page.finish()


def test_the_figures_are_those_of_the_engine(page: Any, service: Playback) -> None:
    until(lambda: page.text("#live .tiers .figure b"))
    assert page.text("#live .tiers .figure") == "2.84\nbits on average"
    assert len(page.find(".map span")) == LAYERS * RANKS
    assert page.texts(".legend li") == ["2 bits\n41%", "3 bits\n23%", "4 bits\n33%", "skipped\n2.6%"]
    label = page.one(".map").get_attribute("aria-label")
    assert "3 bits23%" in label.replace(" ", "").replace("bits", " bits")
    assert page.text("#live .memory .figure") == "6.05 GiB\nof 8.00 GiB" and "3 waiting" in page.text("#live .queue")
    assert page.text("#live .cache .figure b") == "93%" and "MiB a token" in page.text("#live .disk .note")
    until(lambda: page.text("#live .speed .figure span") == "tokens/s")
    page.press("Close the live figures")
    page.open(empty=False)
    assert not page.one("#live").is_displayed()
