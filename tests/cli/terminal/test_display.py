"""What a conversation shows, on terminals of all kinds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli.terminal.terminal_kit import CTRL_C, CTRL_D, ENTER, TerminalProgram, scripted_command

from dymoe_runtime.cli.chat.display import Display
from dymoe_runtime.text.generate import Token

THINKS = """
def tokens(text):
    yield Token(1, "", reasoning="\\nhm")
    yield Token(1, "", reasoning=", so")
    yield Token(1, "\\n\\nIt ")
    yield Token(1, "is.", "stop")
"""


def shown(tokens: Sequence[Token], **options: bool) -> str:
    out = io.StringIO()
    display = Display(out, **options)
    for token in tokens:
        display.show(token)
    display.end_answer()
    return out.getvalue()


THOUGHTS = [Token(1, "", reasoning="\nhm"), Token(1, "", reasoning=" so\n"), Token(1, "\n\nIt"), Token(1, " is.")]


def test_reasoning_is_dimmed() -> None:
    assert shown(THOUGHTS) == "\x1b[2mhm so\n\x1b[0mIt is.\n"


def test_reasoning_is_marked_where_it_cannot_be_dimmed() -> None:
    expected = "(thinking...)\nhm so\n(end of thinking)\nIt is.\n"
    assert shown(THOUGHTS, styles=False) == shown(THOUGHTS, plain=True) == expected


def test_hidden_reasoning_leaves_nothing() -> None:
    assert shown(THOUGHTS, show_reasoning=False) == "(thinking...)\r\x1b[KIt is.\n"
    assert shown(THOUGHTS, show_reasoning=False, plain=True) == "(thinking...)\nIt is.\n"


def test_an_answer_that_is_nothing_but_reasoning_ends_as_it_should() -> None:
    assert shown(THOUGHTS[:1]) == "\x1b[2mhm\x1b[0m\n"
    assert shown(THOUGHTS[:1], show_reasoning=False) == "(thinking...)\r\x1b[K"


def test_control_characters_are_spelled_out() -> None:
    tokens = [Token(1, "a\x1b[2J\x9b\r\x07"), Token(1, "\tb\nc\x7f")]
    assert shown(tokens) == "a\\x1b[2J\\x9b\\x0d\\x07\tb\nc\\x7f\n"
    assert shown([Token(1, "", reasoning="\x1b")], styles=False, show_reasoning=True).count("\x1b") == 0


def test_reasoning_is_dim_on_a_terminal_and_then_replaced_by_the_answer(tiny_chat_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(scripted_command(tiny_chat_path, script=THINKS), tmp_path) as chat:
        assert chat.ask("why?") == "hm, so\nIt is."
        assert "\x1b[2mhm" in chat.output


@pytest.mark.parametrize("value", ["1", ""])
def test_no_color_means_no_styles(value: str, tiny_chat_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(scripted_command(tiny_chat_path, script=THINKS), tmp_path, NO_COLOR=value) as chat:
        chat.ask("why?")
        assert ("\x1b[2m" in chat.output) == (value == "")


FORGETS = """
def reply(self, text, *rest, **options):
    self.dropped_turns += 1
    yield Token(1, "yes", "stop")
"""


def test_that_old_turns_leave_the_context_is_said_once(tiny_chat_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(scripted_command(tiny_chat_path, script=FORGETS), tmp_path) as chat:
        assert "forgets the oldest turns" in chat.ask("one")
        assert chat.ask("two") == "yes"


def test_a_terminal_without_escape_codes_gets_none(tiny_chat_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(scripted_command(tiny_chat_path, script=THINKS), tmp_path, TERM="dumb") as chat:
        assert chat.ask("why?").splitlines()[-3:] == ["hm, so", "(end of thinking)", "It is."]
        assert "forgotten" in chat.ask("/clear")
        chat.send("hello" + CTRL_C)
        chat.until_shown("Ctrl-C again")
        chat.until_prompt()
        chat.send("/help" + ENTER)
        chat.until_shown("Ctrl-R")
        chat.until_prompt()
        chat.send(CTRL_C)
        chat.until(lambda: chat.text().count("Ctrl-C again") == 2 and chat.at_prompt())
        chat.send(CTRL_C)
        chat.ends(0)
        assert "\x1b" not in chat.output


def test_a_plain_terminal_has_lines_of_several_parts_and_an_end(tiny_chat_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(scripted_command(tiny_chat_path), tmp_path, TERM="dumb") as chat:
        chat.until_prompt()
        chat.send("one\\" + ENTER + "two" + ENTER)
        chat.until_shown("'one\\ntwo'")
        chat.until_prompt()
        chat.send(CTRL_D)
        chat.ends(0)


def test_a_narrow_window_that_grows_and_shrinks_shows_all(tiny_chat_path: Path, tmp_path: Path) -> None:
    message = "a message that is longer than the window is wide"
    with TerminalProgram(scripted_command(tiny_chat_path), tmp_path, columns=20, rows=12) as chat:
        chat.until_prompt()
        chat.send(message)
        chat.until(lambda: chat.line.endswith("wide"))
        chat.send(ENTER)
        chat.until_prompt()
        assert f"{message!r}" in "".join(line.ljust(20) for line in chat.lines())
        chat.resize(60, 12)
        chat.send("wider")
        chat.until(lambda: chat.line == "> wider")
        chat.resize(20, 12)
        chat.send(" and narrower" + ENTER)
        chat.until_shown("'wider and narrower'")
        chat.until_prompt()
