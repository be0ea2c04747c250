"""Numbers that are none, or that no machine holds, at every flag of every command: one sentence, or what is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from helpers import Outcome, invoke

from dymoe_compile.cli import main as compile_command
from dymoe_runtime.cli.bundle import bundle as bundle_command
from dymoe_runtime.cli.run import SUBCOMMANDS, make_command
from dymoe_runtime.cli.run import run as run_command

# Flags whose texts are numbers, beside those with a type of number.
TEXTS = ("--tiers", "--dense-bits", "--point", "--kv-bits")
NUMBERS = ("nan", "inf", "-inf", "-1", "1e400", "9" * 30, "9" * 5000, "", "x", "0x10", "\ud800")
OUTPUT = ("-o", "never-written")
# What has a meaning, though it is more than anything can be.
MOST = {"--max-tokens", "--calibration-tokens", "--quality", "--max-kl"}
# What may be below zero.
SIGNED = {"--presence-penalty", "--frequency-penalty"}


def numeric_flags(name: str, command: click.Command) -> list[tuple[str, str]]:
    """Return (name of the command, flag) of the options that take a number."""
    found = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.is_flag:
            is_text = isinstance(parameter.type, (click.types.StringParamType, click.Path, click.Choice))
            if not is_text or set(parameter.opts) & set(TEXTS):
                found.append((name, parameter.opts[0]))
    return found


COMMANDS: dict[str, Any] = {
    "compile": compile_command,
    **{f"bundle {n}": c for n, c in bundle_command.commands.items()},
}
COMMANDS |= {f"run {name}": make_command(name) for name in SUBCOMMANDS}
FLAGS = [pair for name, command in COMMANDS.items() for pair in numeric_flags(name, command)]


def outcome_of(name: str, flag: str, number: str, tiny: Path, checkpoint: Path, tmp_path: Path) -> Outcome:
    program, _, subcommand = name.partition(" ")
    given = (f"{flag}={number}",)
    if program == "compile":
        # A text that is too short comes after all flags are checked, and before the work.
        (tmp_path / "text.txt").write_text("short")
        args = (checkpoint, "-o", tmp_path / "o.dymoe", "--calibration", tmp_path / "text.txt", *given)
        return invoke(compile_command, args)
    if program == "bundle":
        (tmp_path / "trace.jsonl").write_text("")
        needs = {"replay": (tmp_path / "trace.jsonl",), "slim": OUTPUT, "export": (*OUTPUT, "--format", "onnx")}
        if subcommand == "check" and not flag.startswith(("--max", "--min")):
            given = ("--max-bytes", "1GiB", *given)
        return invoke(bundle_command, (subcommand, tiny, *needs.get(subcommand, ()), *given))
    (tmp_path / "text.txt").write_text("a text")
    rest: dict[str, tuple[object, ...]] = {
        "chat": ("--prompt", "a"),
        "eval": (tmp_path / "text.txt",),
        "bench": () if "tokens" in flag else ("--new-tokens", 1, "--prompt-tokens", 1),
        "serve": ("--host", "192.0.2.1"),  # not an address of this machine: what is sound otherwise ends there
        "run": ("--bench",) if flag in ("--prompt-tokens", "--new-tokens") else ("--prompt", "a"),
    }
    end = ("--max-tokens", 1) if flag != "--max-tokens" and subcommand in ("run", "chat") else ()
    end = end if flag not in ("--prompt-tokens", "--new-tokens") else ()
    return invoke(run_command, (subcommand, tiny, *rest.get(subcommand, ()), *end, *given)[subcommand == "run" :])


def test_every_command_has_flags_that_take_numbers() -> None:
    assert {"compile", "bundle replay", "run run", "run bench"} <= {name for name, _ in FLAGS} and len(FLAGS) > 60


@pytest.mark.parametrize(("name", "flag"), FLAGS, ids=[f"{name} {flag}" for name, flag in FLAGS])
def test_what_is_no_number_gets_one_sentence(
    name: str, flag: str, tiny_path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for number in NUMBERS:
        outcome = outcome_of(name, flag, number, tiny_path, tiny_checkpoint, tmp_path)
        lines = outcome.err.strip().splitlines()
        what = f"{flag}={number[:40]!r}: {outcome.code}: {outcome.err[-300:]}"
        if outcome.code == 3:  # a gate that asks for more than anything can be
            assert flag == "--min-tokens-per-s" and number == "9" * 30, what
            continue
        if outcome.code == 0:
            assert (flag in MOST and number == "9" * 30) or (flag in SIGNED and number == "-1"), what
            continue
        assert outcome.code in (1, 2) and "Traceback" not in outcome.err, what
        errors = [line for line in lines if line.startswith("Error: ")]
        assert len(errors) == 1 if outcome.code == 2 else len(lines) == 1, what
        assert len(outcome.err) < 12_000, what
        if name == "run serve" and "--host 192.0.2.1" in outcome.err:
            continue
        if name == "run chat" or (name == "compile" and number == "9" * 30):
            continue  # the missing template and the short text have sentences of their own
        assert flag in outcome.err or flag.lstrip("-") in outcome.err, what
