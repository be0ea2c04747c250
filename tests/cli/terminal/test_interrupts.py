"""Ctrl-C, other signals, and what is typed while a conversation on a terminal answers."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.terminal.terminal_kit import (
    COUNTING,
    CTRL_C,
    CTRL_D,
    CTRL_Z,
    ENTER,
    UP,
    TerminalProgram,
    scripted_command,
)

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.session import Session
from dymoe_runtime.text.tokenizer import Tokenizer

# A model that takes its time in the layers of a prompt and in each token.
SLOW_MODEL = """
import time
from dymoe_runtime.engine import model
from dymoe_runtime.engine.arena_sizing import LimitedExperts
decode, prefill = model.Model.decode, LimitedExperts.prefill
def slow_decode(self, token_id):
    time.sleep({decode_s})
    return decode(self, token_id)
def slow_prefill(self, *args):
    y = prefill(self, *args)
    time.sleep({prefill_s})
    return y
model.Model.decode, LimitedExperts.prefill = slow_decode, slow_prefill
from dymoe_runtime.cli.__main__ import run
run()
"""
STEPS = 100


def slow_command(bundle: Path, *args: object, decode_s: float = 0.002, prefill_s: float = 0.01) -> list[object]:
    script = SLOW_MODEL.format(decode_s=decode_s, prefill_s=prefill_s)
    return [sys.executable, "-c", script, bundle, "--chat", "--temperature", 0, *args]


def messages(chat: TerminalProgram, file: Path) -> list[dict[str, str]]:
    chat.ask(f"/save --replace {file}")
    return list(json.loads(file.read_text())["messages"])


@pytest.fixture
def counting(tiny_chat_path: Path, tmp_path: Path) -> Iterator[TerminalProgram]:
    """A conversation that answers "count" with the numbers up to 100, in two seconds."""
    with TerminalProgram(scripted_command(tiny_chat_path, script=COUNTING), tmp_path) as program:
        program.until_prompt()
        yield program


def test_ctrl_c_stops_an_answer_whose_beginning_is_kept(shipped_path: Path, tmp_path: Path) -> None:
    options = ("--ignore-eos", "--max-tokens", 400)
    with TerminalProgram(slow_command(shipped_path, *options, decode_s=0.02), tmp_path) as chat:
        chat.enter("Tell me")
        chat.until(lambda: len(chat.line) > 20)
        chat.send(CTRL_C)
        chat.until_shown("(stopped)")
        question, answer = messages(chat, tmp_path / "chat.json")
        assert question["content"] == "Tell me" and 10 < len(answer["content"]) < 1000
        assert answer["content"].split() == " ".join(chat.lines()).partition("Tell me")[2].split("(stop")[0].split()
        chat.send(CTRL_D)
        chat.ends(0)


def test_ctrl_c_stops_in_the_middle_of_a_long_prompt(shipped_path: Path, tmp_path: Path) -> None:
    """After the layer that runs, of which each takes three seconds."""
    with TerminalProgram(slow_command(shipped_path, prefill_s=3), tmp_path) as chat:
        chat.enter("Tell me")
        chat.read_for(0.5)
        chat.send(CTRL_C)
        chat.until(lambda: "(stopped)" in chat.text(), patience_s=8)
        chat.until_prompt()
        assert messages(chat, tmp_path / "chat.json")[0] == {"role": "user", "content": "Tell me"}


STUCK = """
from dymoe_runtime.engine import model
def decode(self, token_id):
    import time
    time.sleep(3600)
model.Model.decode = decode
from dymoe_runtime.cli.__main__ import run
run()
"""


def test_where_nothing_stops_the_answer_the_third_ctrl_c_ends_the_program(shipped_path: Path, tmp_path: Path) -> None:
    with TerminalProgram([sys.executable, "-c", STUCK, shipped_path, "--chat"], tmp_path) as chat:
        chat.enter("Tell me")
        chat.until(lambda: len(chat.line) > 0)
        chat.read_for(1.0)  # the second token is being computed now
        chat.send(CTRL_C)
        chat.read_for(0.2)
        chat.send(CTRL_C)
        chat.until_shown("once more ends the program")
        chat.send(CTRL_C)
        chat.ends(130)
        assert "interrupted" in chat.text()


def test_ctrl_c_at_random_moments_a_hundred_times(shipped: Bundle, tmp_path: Path) -> None:
    """The program lives, its memory stays, and each next answer is that of a fresh conversation."""
    arena = shipped.expert_bytes() // 3
    like_it = RunOptions(tier=4, context=512, arena_bytes=arena)
    options = ("--tiers", 4, "--arena", arena, "--context", 512, "--ignore-eos", "--max-tokens", 60)
    chance, sizes = random.Random(0), []
    tokenizer = Tokenizer.load(shipped.path, shipped.spec.eos_ids)
    command = slow_command(shipped.path, *options)
    with load_model(shipped, like_it) as model, TerminalProgram(command, tmp_path) as chat:
        for step in range(STEPS):
            chat.enter("Tell me more of it " * chance.randint(1, 5))
            chat.read_for(chance.uniform(0, 0.35))
            chat.send(CTRL_C)
            chat.until_prompt()
            if step % 4 == 3:
                chat.ask("And then?")
                said = messages(chat, tmp_path / "chat.json")
                assert said[-1]["content"] == fresh_answer(model, tokenizer, said[:-1]), (step, said)
                chat.ask("/clear")
                sizes.append(chat.resident_bytes())
        chat.send(CTRL_D)
        chat.ends(0)
        assert chat.output.count("(stopped)") > STEPS // 2
    assert max(sizes) - sizes[2] < 4 << 20, sizes


def fresh_answer(model: Model, tokenizer: Tokenizer, said: list[dict[str, str]]) -> str:
    """The answer to the last message in a conversation of the same turns that nothing interrupts.

    The tokens of an answer are decoded, as in the conversation, because a prompt of them is rounded differently.
    """
    model.reset()
    turns: list[dict[str, str]] = []
    for question, answer in zip(said[::2], [*said[1::2], {"content": "not said"}], strict=True):
        text, session = "", Session(model, tokenizer, history=turns, params=SamplingParams())
        if answer["content"]:
            for token in session.reply(question["content"], max_tokens=60, ignore_eos=True):
                text += token.text
                if text == answer["content"]:
                    break
        turns += [question, {"role": "assistant", "content": text}]
    return text


def test_what_is_typed_while_it_answers_waits_for_the_prompt(counting: TerminalProgram) -> None:
    counting.enter("count")
    counting.until_shown(" 9 ")
    counting.send("typed ahead" + ENTER + "and half a line")
    counting.until_shown("and half a line")
    assert " ".join(map(str, range(100))) in "".join(line.ljust(120) for line in counting.lines())
    assert "> typed ahead\n'typed ahead'\n> and half a line" in counting.text()
    counting.send(ENTER)
    counting.until_shown("'and half a line'")


def test_what_is_typed_ahead_outlasts_a_ctrl_c(counting: TerminalProgram) -> None:
    counting.enter("count")
    counting.until_shown(" 9 ")
    counting.send("kept" + CTRL_C)
    counting.until(lambda: counting.line == "> kept")
    assert "(stopped)" in counting.text()


def test_a_ctrl_c_right_after_the_message_stops_its_answer(counting: TerminalProgram) -> None:
    counting.send("count" + ENTER + CTRL_C)
    counting.until_shown("(stopped)")
    counting.until_prompt()
    assert " 50 " not in counting.text()


def test_what_is_typed_on_a_plain_terminal_waits_for_the_prompt(tiny_chat_path: Path, tmp_path: Path) -> None:
    with TerminalProgram(scripted_command(tiny_chat_path, script=COUNTING), tmp_path, TERM="dumb") as chat:
        chat.enter("count")
        chat.until_shown(" 9 ")
        chat.send("typed ahead" + ENTER + CTRL_C)
        chat.until_shown("'typed ahead'")
        chat.until_prompt()
        assert chat.lines()[-4:-1] == ["(stopped)", "> typed ahead", "'typed ahead'"]
        assert chat.output.count("typed ahead") == 2 and "^C" not in chat.output


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("keys", ["", "half a line", "count" + ENTER])
def test_termination_restores_the_terminal(keys: str, term: str, tiny_chat_path: Path, tmp_path: Path) -> None:
    command = scripted_command(tiny_chat_path, script=COUNTING)
    with TerminalProgram(command, tmp_path, TERM=term) as chat:
        chat.until_prompt()
        chat.send(keys)
        chat.until_shown(" 9 " if keys.startswith("count") else keys)
        chat.signal(signal.SIGTERM)
        chat.ends(143)
        assert "terminated" in chat.text()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("keys", ["half a line", "count" + ENTER])
def test_other_signals_restore_the_terminal_too(keys: str, number: signal.Signals, counting: TerminalProgram) -> None:
    counting.send(keys)
    counting.until_shown(" 9 " if keys.startswith("count") else keys)
    counting.signal(number)
    counting.ends(-number)


# A shell with job control: it starts the conversation, and says how the terminal is while that is stopped.
SHELL = 'set -m; "$@"; stty -a | grep -o -w -e "-\\?echo" -e "-\\?icanon"; echo stopped; read go; fg; echo ended'


@pytest.mark.parametrize("keys", ["half a line", "count" + ENTER])
def test_a_stopped_conversation_gives_the_terminal_back_and_goes_on(
    keys: str, tiny_chat_path: Path, tmp_path: Path
) -> None:
    command = ["bash", "--norc", "-c", SHELL, "bash", *scripted_command(tiny_chat_path, script=COUNTING)]
    with TerminalProgram(command, tmp_path) as chat:
        chat.until_prompt()
        chat.send(keys)
        chat.until_shown(" 9 " if keys.startswith("count") else keys)
        chat.send(CTRL_Z)
        chat.until_shown("\nstopped")
        assert {"icanon", "echo"} <= set(chat.lines())
        assert chat.echoes()
        chat.send("\n")
        chat.until(lambda: not chat.echoes())
        if not keys.startswith("count"):
            chat.until(lambda: chat.line == "> half a line")
            chat.send(ENTER)
            chat.until_shown("'half a line'")
        chat.until_prompt()
        chat.send(UP)
        chat.until(lambda: not chat.at_prompt())
        chat.send(CTRL_C + CTRL_D)
        chat.until_shown("ended")
