"""Talking to the model on the page: ask, stop, answer again, edit, copy, think; and conversations that are kept."""

from __future__ import annotations

from typing import Any

from page.kit import Playback, Script, until
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select


def prompts(service: Playback) -> list[str]:
    return [request.prompt or "" for request in service.requests]


def test_an_answer_streams_and_the_conversation_goes_on(page: Any, service: Playback) -> None:
    service.play(Script(["Hello", " **there**", "."]), Script(["And", " again."]))
    page.one("#message").send_keys("Hi", Keys.SHIFT, Keys.ENTER, Keys.NULL)
    assert page.ask("you") == "Hello there."
    assert page.texts(".question .text") == ["Hi\nyou"]
    assert page.text("#title") == "Hi" and page.driver.title == "Hi – DyMoE"
    assert page.text("#announcer") == "The answer is complete: 2 words."
    assert page.ask("More") == "And again."
    assert prompts(service)[1] == "user: Hi\nyou\nassistant: Hello **there**.\nuser: More\nassistant:"
    assert page.run("return document.activeElement.id") == "message"
    assert "4 tokens" in page.text(".answer .usage") and not page.find(".dots")


def test_an_answer_is_seen_while_it_comes_and_stops_at_once(page: Any, service: Playback) -> None:
    service.play(Script(["word "], endless=True), Script([" and so on."]))
    page.send("Talk")
    until(lambda: page.text(".answer .text").count("word") > 3)
    assert page.one(".answer").get_attribute("aria-busy") == "true" and not page.one("#send").is_displayed()
    page.send("not now")  # is not lost, and not sent
    assert page.one("#message").get_attribute("value") == "not now" and len(service.answers) == 1
    page.press("Stop the answer")
    page.finish()
    until(lambda: service.answers[0].cancelled)
    said = page.texts(".answer .text")[0]
    assert page.text(".answer .end") == "Stopped." and page.text("#announcer") == "Stopped."
    page.press("Continue")
    page.finish()
    assert page.text(".answer .text") == f"{said} and so on." and prompts(service)[1].endswith(f"assistant:{said} ")
    page.one("#message").clear()
    service.play(Script(["word "], endless=True))
    page.send("Once more")
    until(lambda: len(page.find(".answer")) == 2)
    page.one("#message").send_keys(Keys.ESCAPE)
    page.finish()


def test_another_answer_and_an_edited_question_stand_beside_the_first_ones(page: Any, service: Playback) -> None:
    service.play(Script(["First"]), Script(["Second"]), Script(["Third"]))
    page.ask("Question")
    page.press("Answer again")
    page.finish()
    assert page.texts(".answer .text") == ["Second"] and page.text(".answer .versions") == "2/2"
    assert prompts(service)[0] == prompts(service)[1]
    page.press("Earlier version")
    assert page.texts(".answer .text") == ["First"]
    page.press("Edit the message")
    field = page.one(".editor textarea")
    assert field.get_attribute("value") == "Question"
    field.send_keys(" two", Keys.ENTER)
    page.finish()
    assert page.texts(".question .text, .answer .text") == ["Question two", "Third"]
    assert prompts(service)[2] == "user: Question two\nassistant:"
    page.press("Earlier version")
    assert page.texts(".question .text, .answer .text") == ["Question", "Second"]
    page.one("#message").send_keys(Keys.ARROW_UP)
    page.one(".editor textarea").send_keys("x", Keys.ESCAPE)
    assert page.texts(".question .text") == ["Question"] and not page.find(".editor")


def test_reasoning_stands_apart(page: Any, service: Playback) -> None:
    service.play(Script(["42"], ["First", " *this*"], wait_s=0.05))
    assert page.ask("Why?") == "42"
    assert not page.one(".reasoning .markdown").is_displayed() and page.text(".reasoning summary").startswith("Thought")
    page.one(".reasoning summary").click()
    assert page.text(".reasoning .markdown") == "First this"


def test_an_answer_and_its_code_are_copied(page: Any, service: Playback) -> None:
    allowed = {"origin": page.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", allowed)
    text = "Do **this**:\n\n```sh\nmake <test>\n```\n"
    service.play(Script([text]))
    page.ask("How?")
    read = "return navigator.clipboard.readText()"
    page.press("Copy the answer")
    until(lambda: page.run(read) == text)
    page.press("Copy")
    until(lambda: page.run(read) == "make <test>")
    assert page.text(".code-bar").splitlines()[0] == "sh" and page.text("#announcer") == "Copied."


def test_settings_are_part_of_requests(page: Any, service: Playback) -> None:
    service.play(Script())
    page.press("Settings")
    values = {"system": "Be brief.", "temperature": "0.5", "top_p": "0.9", "max_tokens": "7", "seed": "3"}
    for name, value in values.items():
        page.one(f"dialog [name={name}]").send_keys(value)
    Select(page.one("dialog [name=thinking]")).select_by_visible_text("Off")
    page.press("Done")
    page.ask("Hi")
    (request,) = service.requests
    params = request.params
    assert request.prompt == "system: Be brief.\nuser: Hi\nquick assistant:"
    assert (params.temperature, params.top_p, params.seed, request.ending.max_tokens) == (0.5, 0.9, 3, 7)
    page.open(empty=False)
    page.press("Settings")
    assert page.one("dialog [name=system]").get_attribute("value") == "Be brief."
    page.press("Reset")
    page.press("Done")
    page.press("New conversation")
    page.ask("Hi")
    assert service.requests[-1].prompt == "user: Hi\nassistant:" and service.requests[-1].params.temperature == 0


def test_conversations_are_kept_renamed_and_deleted(page: Any, service: Playback) -> None:
    service.play(Script(["One"]), Script(["Two"]), Script(["Three"]))
    page.ask("First talk")
    page.press("Answer again")
    page.finish()
    page.press("New conversation")
    page.ask("Second talk")
    assert page.texts("#conversations .open") == ["Second talk", "First talk"]
    page.open(empty=False)
    assert (
        page.texts("#conversations .open") == ["Second talk", "First talk"] and page.text("#welcome h2") == service.name
    )
    page.one("#conversations li:last-child .open").click()
    assert page.texts(".answer .text, .versions") == ["Two", "2/2"]
    page.press("Rename “First talk”")
    page.one("#conversations input").send_keys(Keys.CONTROL, "a", Keys.NULL, "Old <b>talk</b>", Keys.ENTER)
    assert page.text("#title") == "Old <b>talk</b>"
    page.press("Delete “Second talk”")
    page.press("Cancel")
    page.press("Delete “Second talk”")
    page.press("Delete")
    until(lambda: page.texts("#conversations .open") == ["Old <b>talk</b>"])
    page.open(empty=False)
    assert page.texts("#conversations .open") == ["Old <b>talk</b>"]
    page.press("Settings")
    page.press("Delete all conversations")
    page.press("Delete all")
    page.press("Done")
    until(lambda: not page.find("#conversations .open") and not page.find(".message"))
    page.open(empty=False)
    assert not page.find("#conversations .open")


def test_a_browser_without_room_says_so_and_the_talk_goes_on(page: Any, service: Playback) -> None:
    service.play(Script(["One"]))
    fail = "IDBObjectStore.prototype.put = () => { throw new DOMException('full', 'QuotaExceededError'); }"
    page.run(fail)
    assert page.ask("Hi") == "One" and "no room" in page.text("#notice")
    page.press("Dismiss")
    script = "Object.defineProperty(window, 'indexedDB', {get() { throw new DOMException('no', 'SecurityError'); }});"
    script += "Storage.prototype.getItem = Storage.prototype.setItem = () => { throw new Error('blocked'); };"
    added = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        page.open()
        assert page.ask("Hi") == "One" and "keeps nothing" in page.text("#notice")
        assert page.texts("#conversations .open") == ["Hi"]
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_two_tabs_show_the_same_conversations(page: Any, service: Playback) -> None:
    service.play(Script(["One"]))
    page.ask("Here")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:
        page.open(empty=False)
        page.ask("There")
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)
    until(lambda: sorted(page.texts("#conversations .open")) == ["Here", "There"])
