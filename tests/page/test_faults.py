"""What goes wrong is said in plain words, and what can work again can be tried again."""

from __future__ import annotations

from typing import Any

from page.kit import Playback, Script, served, until

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.serving.http.answers.settings import Settings
from dymoe_runtime.serving.service.errors import Closing, Full

# What a browser itself writes into its console about a response that is none of success.
STATUS = "Failed to load resource"


def opened(driver: Any, url: str) -> Any:
    from page.browser import Page

    return Page(driver, url).open()


def test_a_full_server_is_tried_again_when_it_has_said(driver: Any, address: str, service: Playback) -> None:
    page = opened(driver, address)
    service.play(Script(refusal=Full(1.0)), Script(["Now"]))
    page.send("Hi")
    until(lambda: "The server is busy." in page.text(".fault"))
    assert "(1 s)" in page.text(".fault .primary") and "busy" in page.text("#announcer")
    until(lambda: page.texts(".answer .text") == ["Now"])
    assert not page.find(".fault")
    page.check(STATUS)


def test_what_goes_wrong_has_its_own_words(driver: Any, address: str, service: Playback) -> None:
    page = opened(driver, address)
    full = DymoeError("the prompt has 5000 tokens, but the context holds 4096; shorten the prompt")
    for refusal, words, again in (
        (Closing(), "The server is ending", True),
        (full, "5,000 tokens, and the model holds 4,096. Begin a new conversation", False),
        (DymoeError("that is not possible"), "That is not possible.", False),
    ):
        service.play(Script(refusal=refusal))
        page.send("Hi")
        until(lambda words=words: words in page.text(".fault"))
        assert bool(page.find(".fault .primary")) is again
    page.press("Dismiss")
    service.play(Script(["Late"]))
    page.press("Answer this")
    page.finish()
    assert page.texts(".question .text") == ["Hi"] * 3 and page.texts(".answer .text") == ["Late"]
    page.check(STATUS)


def test_an_answer_that_breaks_keeps_what_has_come(page: Any, service: Playback) -> None:
    service.play(Script(["Half", " of"], error=DymoeError("the disk failed")), Script([" it"]), Script(["Whole"]))
    page.send("Hi")
    until(lambda: "The disk failed." in page.text(".fault"))
    assert page.text(".answer .text") == "Half of" and page.text(".answer .end") == "Cut off."
    page.press("Continue")
    page.finish()
    assert page.text(".answer .text") == "Half of it"
    page.press("Answer again")
    page.finish()
    assert page.text(".answer .text") == "Whole"


def test_an_answer_at_a_limit_says_so(page: Any, service: Playback) -> None:
    service.play(Script(["Long"], finish="length"))
    page.ask("Hi")
    assert page.text(".answer .end") == "Ended at the limit of tokens." and "Continue" in page.text(".answer .actions")


def test_a_server_that_is_gone_is_missed_and_found_again(driver: Any, service: Playback) -> None:
    service.play(Script(["Back"]))
    with served(service) as url:
        page = opened(driver, url)
        page.press("Live figures of the engine")
    page.send("Hi")
    until(lambda: "does not answer" in page.text(".fault"))
    assert url.removeprefix("http://") in page.text(".fault") and page.texts(".question .text") == ["Hi"]
    with served(service, port=int(url.rpartition(":")[2])):
        page.press("Try again")
        until(lambda: page.texts(".answer .text") == ["Back"])
        page.finish()
    page.check(STATUS)


def test_a_server_with_keys_is_asked_with_one(driver: Any, service: Playback) -> None:
    service.play(Script(["Open"]))
    with served(service, Settings(keys=("first-key", "second-key"))) as url:
        from page.browser import Page

        page = Page(driver, url)
        page.open(known=False)
        for key in ("wrong-key", "second-key"):
            field = page.one("dialog[open] input[type=password]")
            assert page.run("return document.activeElement === arguments[0]", field)
            field.send_keys(key)
            page.press("Use it")
        until(lambda: page.text("#model") == service.name)
        assert page.ask("Hi") == "Open" and "second-key" not in page.run("return JSON.stringify(localStorage)")
        page.open(empty=False)  # the tab has the key
        page.press("Settings")
        page.one("dialog input[type=checkbox]").click()
        page.press("Done")
        kept = "return [localStorage, sessionStorage].map((place) => place.getItem('api-key'))"
        until(lambda: page.run(kept) == ["second-key", None])
        page.check(STATUS)
