"""--session keeps a conversation, or the state after a prompt, for other runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PROMPT, assert_one_sentence, run_cli

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.kernels import load_kernels

CHAT = ("--chat", "--max-tokens", 12, "--json")


@pytest.mark.parametrize("sampling", [(), ("--greedy",), ("--temperature", 1.2, "--seed", 4)])
def test_a_conversation_goes_on_in_another_run(shipped: Bundle, tmp_path: Path, sampling: tuple[object, ...]) -> None:
    """At another budget and with another number of threads, and random numbers go on, too."""
    whole = run_cli(shipped.path, *CHAT, *sampling, "--system", "Be brief.", stdin="Hello\nGo on\nAnd then?\n").json
    file = ("--session", tmp_path / "talk")
    first = run_cli(shipped.path, *CHAT, *sampling, *file, "--system", "Be brief.", stdin="Hello\n").json
    memory = plan_budget(shipped, load_kernels(), 4096).floor_bytes + (64 << 20)
    second = run_cli(shipped.path, *CHAT, *sampling, *file, "--memory", memory, "--threads", 1, stdin="Go on\n").json
    third = run_cli(shipped.path, *CHAT, *sampling, *file, stdin="And then?\n").json
    assert third["messages"] == whole["messages"]
    assert [run["turns"][0] for run in (first, second, third)] == whole["turns"]
    assert third["turns"][0]["reused_tokens"] > second["turns"][0]["reused_tokens"] > 0


def test_a_prompt_starts_where_a_kept_one_ends(shipped_path: Path, tmp_path: Path) -> None:
    args = (shipped_path, "--tiers", 4, "--max-tokens", 8, "--greedy", "--ignore-eos", "--json")
    whole = run_cli(*args, "--prompt", f"{PROMPT} the old king").json
    kept = run_cli(*args, "--session", tmp_path / "state", "--prompt", PROMPT).json
    assert kept["prompt_tokens"] > 4
    again = run_cli(*args, "--session", tmp_path / "state", "--prompt", f"{PROMPT} the old king").json
    assert again["text"] == whole["text"]
    assert 0 < again["prompt_tokens"] <= whole["prompt_tokens"] - kept["prompt_tokens"]


def test_a_session_keeps_what_was_said_when_a_turn_fails(shipped_path: Path, tmp_path: Path) -> None:
    args = (shipped_path, *CHAT, "--context", 40, "--session", tmp_path / "talk")
    outcome = run_cli(*args, stdin="Hello\n" + "far too long " * 30 + "\n")
    assert outcome.code == 1 and (tmp_path / "talk").exists()
    assert [m["content"] for m in run_cli(*args, stdin="More\n").json["messages"]][::2] == ["Hello", "More"]


def test_a_session_that_cannot_go_on_is_refused(shipped_path: Path, tiny_path: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk"
    assert run_cli(shipped_path, *CHAT, "--session", talk, stdin="Hello\n").code == 0
    kept = talk.read_bytes()
    args = ("--prompt", "a", "--max-tokens", 2, "--session", talk)
    assert_one_sentence(run_cli(tiny_path, *args), "another bundle")
    assert_one_sentence(run_cli(shipped_path, *args, "--kv-bits", 8), "--kv-bits 16")
    assert_one_sentence(run_cli(shipped_path, *args, "--tiers", 2), "point 3.75", "--point 3.75")
    talk.write_bytes(kept[:-5])
    assert_one_sentence(run_cli(shipped_path, "--chat", *args), str(talk), "damaged")
    talk.write_bytes(b"something else")
    assert_one_sentence(run_cli(shipped_path, "--chat", *args), "not a saved session")
    assert talk.read_bytes() == b"something else"
    assert_one_sentence(run_cli(shipped_path, *args[:-1], tmp_path / "no" / "where"), "cannot be saved there")
    assert run_cli(shipped_path, *args, "--bench").code == 2


def test_the_state_of_a_prompt_begins_a_conversation(shipped_path: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk"
    assert run_cli(shipped_path, "--prompt", "a", "--max-tokens", 2, "--session", talk).code == 0
    outcome = run_cli(shipped_path, *CHAT, "--session", talk, stdin="Hello\n")
    assert outcome.code == 0, outcome.err
    assert [message["role"] for message in outcome.json["messages"]] == ["user", "assistant"]


def test_a_session_brings_its_context(shipped_path: Path, tmp_path: Path) -> None:
    talk = ("--session", tmp_path / "talk")
    assert run_cli(shipped_path, "--prompt", PROMPT, "--max-tokens", 40, *talk).code == 0
    outcome = run_cli(shipped_path, "--prompt", PROMPT, "--max-tokens", 4, *talk)
    assert outcome.code == 0, outcome.err
    assert_one_sentence(run_cli(shipped_path, "--prompt", "a", "--context", 8, *talk), "--context")


def test_what_cannot_be_shown_is_kept(shipped_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dymoe_runtime", shipped_path, "--chat", "--session", tmp_path / "talk"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--max-tokens", "9"], input=b"hi\n", stdout=full, timeout=60)
    assert done.returncode == 1
    kept = run_cli(shipped_path, *CHAT, "--session", tmp_path / "talk", stdin="").json
    assert kept["messages"][0] == {"role": "user", "content": "hi"} and len(kept["messages"]) == 2
