"""The commands of a conversation on a terminal."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.terminal.terminal_kit import TerminalProgram, chat_command

from dymoe_runtime.cli.chat.commands import COMMANDS

ROLES = ["user", "assistant"]


@pytest.fixture
def chat(shipped_path: Path, tmp_path: Path) -> Iterator[TerminalProgram]:
    options = ("--max-tokens", 6, "--ignore-eos", "--temperature", 0)
    with TerminalProgram(chat_command(shipped_path, *options), tmp_path) as program:
        program.until_prompt()
        yield program
        assert program.process.poll() is None and "Traceback" not in program.output


def saved(chat: TerminalProgram, file: Path) -> list[dict[str, str]]:
    chat.ask(f"/save --replace {file}")
    return list(json.loads(file.read_text())["messages"])


def test_help_lists_all_commands(chat: TerminalProgram) -> None:
    text = chat.ask("/help")
    for name in ["help", "stats", "memory", "point", "set", "system", "retry", "clear", "save", "load", "exit"]:
        assert f"/{name}" in text


def test_an_unknown_command_names_the_nearest(chat: TerminalProgram) -> None:
    assert "did you mean /stats?" in chat.ask("/stat")
    assert "/help lists them" in chat.ask("/zzz")
    assert "takes nothing" in chat.ask("/clear everything")


def test_statistics_and_memory(chat: TerminalProgram) -> None:
    chat.ask("/stats")  # before anything was computed
    chat.ask("Hello")
    text = chat.ask("/stats")
    assert "tokens/s" in text and "new tokens of" in text and "6 answered" in text
    text = chat.ask("/memory")
    for word in ("budget", "arena", "resident", "KV cache", "now"):
        assert word in text


def test_the_point_can_be_seen_and_changed(chat: TerminalProgram) -> None:
    assert "* 3.75" in chat.ask("/point")
    assert "point 3 from" in chat.ask("/point 3")
    assert "* 3 " in chat.ask("/point")
    assert "no such point" in chat.ask("/point nothing")
    assert "points of 2 to 4 bits" in chat.ask("/point 17")
    assert "point 3:" in chat.ask("/stats")


def test_the_flags_may_leave_no_choice_of_the_point(shipped_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(chat_command(shipped_path, "--tpot", "1s"), tmp_path) as chat:
        assert "--tpot chooses" in chat.ask("/point 3")
    with TerminalProgram(chat_command(shipped_path, "--tiers", 4), tmp_path) as chat:
        assert "* tier 4" in chat.ask("/point")


def test_a_conversation_is_saved_and_loaded(chat: TerminalProgram, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    chat.ask("/system Be brief.")
    chat.ask("Hello")
    assert "3 messages saved" in chat.ask(f"/save {file}")
    whole = file.read_text()
    messages = json.loads(whole)["messages"]
    assert [message["role"] for message in messages] == ["system", *ROLES]
    assert "exists" in chat.ask(f"/save {file}") and file.read_text() == whole
    chat.ask("/clear")
    assert "1 messages" in chat.ask(f"/save --replace {file}")
    file.write_text(whole)
    assert "3 messages loaded" in chat.ask(f"/load {file}")
    assert chat.ask("/system") == "Be brief."
    answer = chat.ask("And then?")
    assert saved(chat, file)[:3] == messages
    assert saved(chat, file)[4]["content"] == "\n".join(answer.splitlines()[:-1])  # but for the note that it was cut


def test_a_file_that_is_no_conversation_changes_nothing(chat: TerminalProgram, tmp_path: Path) -> None:
    chat.ask("Hello")
    for text in (
        "",
        "[]",
        "{}",
        '{"messages": {}}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 1}]}',
        '{"messages": [{"role": "pope", "content": ""}]}',
        '{"messages": [{"role": "user", "content": "", "tool": ""}]}',
        '{"messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]}',
    ):
        (tmp_path / "file").write_text(text)
        assert chat.ask(f"/load {tmp_path / 'file'}").startswith("error: "), text
    assert [message["role"] for message in saved(chat, tmp_path / "chat.json")] == ROLES


def test_files_that_cannot_be_had_are_one_sentence_each(chat: TerminalProgram, tmp_path: Path) -> None:
    for command in ("/save", "/save --replace", "/load"):
        assert "needs a file" in chat.ask(command)
    assert "no such file" in chat.ask(f"/load {tmp_path}/none")
    assert "No such file" in chat.ask(f"/save {tmp_path}/none/x")
    assert "irectory" in chat.ask(f"/save --replace {tmp_path}")
    assert "irectory" in chat.ask(f"/load {tmp_path}")
    assert "exists" in chat.ask(f"/save {tmp_path}")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == []


def test_a_saved_conversation_has_the_rights_that_other_files_have(chat: TerminalProgram, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    chat.ask(f"/save {tmp_path / 'chat.json'}")
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "chat.json")]
    assert rights[0] == rights[1]


def test_the_last_question_can_be_answered_again(chat: TerminalProgram, tmp_path: Path) -> None:
    assert "error: " in chat.ask("/retry")
    chat.ask("/point uniform-4")  # at a mixed point the tiers depend on how much of the prompt is read again
    first = chat.ask("Hello")
    assert chat.ask("/retry") == first  # greedy
    assert [message["role"] for message in saved(chat, tmp_path / "file")] == ROLES


def test_the_system_message_can_be_set_and_removed(chat: TerminalProgram, tmp_path: Path) -> None:
    assert "no system message" in chat.ask("/system")
    plain = chat.ask("Hello")
    chat.ask("/system You are a poet.")
    chat.ask("/clear")
    assert chat.ask("Hello") != plain
    assert saved(chat, tmp_path / "file")[0] == {"role": "system", "content": "You are a poet."}
    chat.ask("/system -")
    assert saved(chat, tmp_path / "file")[0]["role"] == "user"


def test_sampling_can_be_seen_and_changed(chat: TerminalProgram, tmp_path: Path) -> None:
    assert "temperature         0" in chat.ask("/set")
    first = chat.ask("Hello")
    assert "temperature         2" in chat.ask("/set temperature 2")
    assert "seed                7" in chat.ask("/set seed=7")
    chat.ask("/clear")
    assert chat.ask("Hello") != first
    assert len(saved(chat, tmp_path / "file")) == 2
    assert "/set top-p 3.0" in chat.ask("/set top-p 3") and "/set temperature -1" in chat.ask("/set temperature -1")
    assert "expected a number" in chat.ask("/set temperature hot")
    assert "takes a name" in chat.ask("/set heat 3") and "takes a name" in chat.ask("/set temperature")


def test_a_turn_that_fails_is_one_sentence_and_loses_nothing(chat: TerminalProgram, tmp_path: Path) -> None:
    chat.ask("Hello")
    for line in ("And again" * 300, "/retry"):
        assert chat.ask(line).rpartition("error: ")[2].count("\n") <= 1
        assert [message["role"] for message in saved(chat, tmp_path / "file")] == ROLES
    chat.ask("And then?")
    assert [message["role"] for message in saved(chat, tmp_path / "again")] == [*ROLES, *ROLES]


def test_the_documentation_has_all_commands() -> None:
    text = (Path(__file__).parents[3] / "docs" / "chat.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"| `{name}" not in text] == []
