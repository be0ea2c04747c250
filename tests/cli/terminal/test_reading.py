"""How a conversation on a terminal reads messages: editing, history, several lines, ways to leave."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.terminal.terminal_kit import (
    ALT_ENTER,
    CTRL_A,
    CTRL_C,
    CTRL_D,
    CTRL_R,
    ENTER,
    LEFT,
    PASTE,
    TAB,
    UP,
    TerminalProgram,
    chat_command,
    scripted_command,
)


@pytest.fixture
def chat(tiny_chat_path: Path, tmp_path: Path) -> Iterator[TerminalProgram]:
    """A conversation whose answers are the messages as Python writes them."""
    with TerminalProgram(scripted_command(tiny_chat_path), tmp_path) as program:
        program.until_prompt()
        yield program


def answered(chat: TerminalProgram, keys: str) -> str:
    """The answer to what these keys and Enter send."""
    chat.until_prompt()
    before = len(chat.lines())
    chat.send(keys + ENTER)
    chat.until(lambda: chat.at_prompt() and len(chat.lines()) > before + 1)
    return chat.lines()[-2]


def test_a_line_can_be_edited(chat: TerminalProgram) -> None:
    assert answered(chat, "helo" + LEFT + "l" + CTRL_A + "Oh, ") == "'Oh, hello'"


def test_the_history_lasts_longer_than_the_program(chat: TerminalProgram, tiny_chat_path: Path, tmp_path: Path) -> None:
    answered(chat, "first")
    answered(chat, "a" + ALT_ENTER + "b")
    assert answered(chat, UP + UP + UP) == "'first'"  # the one of two lines takes two
    file = tmp_path / ".local/state/dymoe/history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    chat.send(CTRL_D)
    chat.ends(0)
    with TerminalProgram(scripted_command(tiny_chat_path), tmp_path) as later:
        assert answered(later, UP + UP) == "'a\\nb'"
        assert answered(later, CTRL_R + "fir" + ENTER) == "'first'"


def test_the_history_lies_where_the_environment_says(tiny_chat_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(scripted_command(tiny_chat_path), tmp_path, XDG_STATE_HOME=str(tmp_path / "state")) as chat:
        answered(chat, "hello")
        assert "hello" in (tmp_path / "state/dymoe/history").read_text()


def test_a_history_that_cannot_be_written_is_no_error(tiny_chat_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with TerminalProgram(scripted_command(tiny_chat_path), tmp_path, XDG_STATE_HOME=str(tmp_path / "file")) as chat:
        answered(chat, "hello")
        assert answered(chat, UP) == "'hello'"
        assert "rror" not in chat.output


def test_a_message_may_have_several_lines(chat: TerminalProgram) -> None:
    assert answered(chat, "one" + ALT_ENTER + "two") == "'one\\ntwo'"
    assert answered(chat, "one\\" + ENTER + "two") == "'one\\ntwo'"
    assert answered(chat, PASTE.format("one\rtwo\n\n three")) == "'one\\ntwo\\n\\n three'"


def test_commands_are_completed(chat: TerminalProgram) -> None:
    chat.send("/he" + TAB)
    chat.until(lambda: chat.line == "> /help")
    chat.send(CTRL_C + "/s" + TAB)
    chat.until_shown("/save")
    assert "/stats" in chat.text() and "/system" in chat.text()


def test_a_message_that_begins_with_a_slash_doubles_it(chat: TerminalProgram) -> None:
    assert answered(chat, "//etc/passwd") == "'/etc/passwd'"


def test_a_blank_line_asks_nothing(chat: TerminalProgram) -> None:
    chat.send("  " + ENTER)
    assert answered(chat, "hello") == "'hello'"
    assert "'  '" not in chat.text()


def test_ctrl_c_clears_the_line(chat: TerminalProgram) -> None:
    chat.send("never said" + CTRL_C)
    assert answered(chat, "said") == "'said'"
    assert "Ctrl-C again" not in chat.text()


def test_ctrl_c_at_an_empty_prompt_says_how_to_leave_and_twice_leaves(chat: TerminalProgram) -> None:
    chat.send(CTRL_C)
    chat.until_shown("Ctrl-C again")
    answered(chat, "stay")
    chat.send(CTRL_C)
    chat.until(lambda: chat.text().count("Ctrl-C again") == 2 and chat.at_prompt())
    chat.send(CTRL_C)
    chat.ends(0)


@pytest.mark.parametrize("keys", [CTRL_D, "/exit" + ENTER])
def test_there_are_two_more_ways_to_leave(keys: str, chat: TerminalProgram) -> None:
    chat.send("some text" + CTRL_D)  # deletes the character behind the cursor, of which there is none
    chat.send(CTRL_C + keys)
    chat.ends(0)


def test_an_interrupt_of_another_program_is_like_the_key(chat: TerminalProgram) -> None:
    chat.process.send_signal(2)
    chat.until_shown("Ctrl-C again")
    chat.until_prompt()
    chat.process.send_signal(2)
    chat.ends(0)


def test_text_that_is_not_unicode_is_one_sentence(shipped_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dymoe_runtime", shipped_path, "--chat", "--max-tokens", 2]
    with TerminalProgram(command, tmp_path) as chat:
        chat.until_prompt()
        os.write(chat.master, b"\xff\xfe\r")
        chat.until_shown("not valid Unicode")
        chat.ask("hello")


def test_what_is_printed_elsewhere_needs_no_line_editing(tiny_chat_path: Path, tmp_path: Path) -> None:
    """With a pipe on either side, a line is a turn."""
    command = ["sh", "-c", 'exec "$@" | cat', "sh", *scripted_command(tiny_chat_path)]
    with TerminalProgram(command, tmp_path) as chat:
        chat.until_shown(">")
        chat.send("hello\n" + CTRL_D)
        chat.until_shown("'hello'")
        assert "\x1b" not in chat.output


IMPORTS = """
import atexit, sys
atexit.register(lambda: print("prompt_toolkit" in sys.modules, flush=True))
"""


def test_only_a_terminal_with_escape_codes_imports_line_editing(tiny_chat_path: Path, tmp_path: Path) -> None:
    """It takes memory that is the experts' otherwise."""
    command = scripted_command(tiny_chat_path, script=IMPORTS)
    for term, expected in {"xterm": "True", "dumb": "False"}.items():
        with TerminalProgram(command, tmp_path, TERM=term) as chat:
            chat.until_prompt()
            chat.send(CTRL_D)
            chat.ends(0)
            assert chat.lines()[-2] == expected
    done = subprocess.run(list(map(str, command)), input="hello\n", capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["'hello'", "False"], done.stderr


def test_the_least_memory_is_enough_for_a_terminal_too(shipped_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(chat_command(shipped_path, "--memory", "1MiB", "--context", 512), tmp_path) as chat:
        chat.ends(1)
        (least,) = re.findall(r"--memory (\d+)MiB", chat.text())
    with TerminalProgram(chat_command(shipped_path, "--memory", f"{least}MiB", "--context", 512), tmp_path) as chat:
        assert f"least that works {least}.0 MiB" in chat.ask("/memory")
        chat.ask("Hello")
        assert chat.resident_bytes() <= int(least) << 20
