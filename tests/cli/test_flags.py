"""Flags: help in groups, subcommands and the short form, JSON alone, and nothing that is silently changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    MODEL,
    PROMPT,
    Outcome,
    answer,
    assert_one_sentence,
    bundle_cli,
    compile_cli,
    invoke,
    reader_threads,
    run_cli,
)

from dymoe_compile.cli import CompileFlags
from dymoe_runtime.cli import load as load_module
from dymoe_runtime.cli.run import run as run_command
from dymoe_runtime.cli.run_flags import EXCLUSIVE, NOT_WITH, REQUIRES, RunFlags

SUBCOMMANDS = ("chat", "eval", "bench", "probe")
TEXT = "def __init__(self, name):\n    self.name = name\n"


def help_of(*args: str) -> str:
    outcome = run_cli(*args, "--help")
    assert outcome.code == 0, outcome.err
    return outcome.out


@pytest.mark.parametrize("flags", [RunFlags, CompileFlags])
def test_every_flag_is_typed_grouped_and_explained(flags: type) -> None:
    for field in fields(flags):
        assert field.type not in ("Any", Any) and field.metadata["group"]
        assert field.metadata["attributes"].get("help"), field.name


def test_help_shows_each_option_once_in_its_group_with_examples_and_exit_codes() -> None:
    lines = help_of().splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    groups = list(dict.fromkeys(f"{field.metadata['group']}:" for field in fields(RunFlags)))
    assert {*groups, "Commands:", "Examples:", "Exit codes:"} <= set(headings)
    assert len(headings) == len(set(headings))
    for field in fields(RunFlags):
        name = field.metadata["names"][0].partition("/")[0]
        assert sum(line.startswith(f"  {name}") and line[2 + len(name) :][:1] in ("", " ", ",") for line in lines) == 1
    compile_help = compile_cli("--help").out
    for code in ("0", "1", "2", "3", "4", "130", "143"):
        assert f"\n  {code} " in compile_help
    assert "--help" in help_of() and "--version" in help_of()


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_the_help_of_a_subcommand_has_only_what_goes_with_it(command: str) -> None:
    text = help_of(command)
    mode = {"eval": "eval_files"}.get(command, command)
    for name, others, _ in NOT_WITH:
        if mode in others:
            assert f"--{name.replace('_', '-')} " not in text, name
    assert "--memory" in text and "Examples:" in text and "Exit codes:" in text
    assert f"  --{command} " not in text


def test_the_tables_of_what_goes_together_name_flags() -> None:
    known = {field.name for field in fields(RunFlags)}
    assert {name for conflict in EXCLUSIVE for name in conflict.flags} <= known
    assert {name for name, others, _ in NOT_WITH for name in (name, *others)} <= known
    assert {*REQUIRES, *(name for needed in REQUIRES.values() for name in needed)} <= known


def test_subcommands_do_what_the_short_form_does(shipped_path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 4)
    pairs = (
        (("eval", shipped_path, tmp_path / "text.txt"), (shipped_path, "--eval", tmp_path / "text.txt"), ("files",)),
        (("bench", shipped_path, "--new-tokens", 3), (shipped_path, "--bench", "--new-tokens", 3), ("prompt_tokens",)),
        (
            ("chat", shipped_path, "--prompt", "Hi", "--max-tokens", 4),
            (shipped_path, "--chat", "--prompt", "Hi", "--max-tokens", 4),
            ("text", "finish"),
        ),
        (("probe", shipped_path), (shipped_path, "--probe"), ("kernels", "threads")),
    )
    for named, short, keys in pairs:
        first, second = run_cli(*named, "--json"), run_cli(*short, "--json")
        assert first.code == second.code == 0, first.err + second.err
        assert set(first.json) == set(second.json)
        assert [first.json[key] for key in keys] == [second.json[key] for key in keys]


FEW = ("--prompt", PROMPT, "--max-tokens", 12, "--greedy")


def test_flags_may_come_before_the_bundle(shipped_path: Path) -> None:
    outcome = run_cli("--prompt", PROMPT, "--max-tokens", 24, "--ignore-eos", shipped_path, "--json")
    assert outcome.json["text"] == answer(shipped_path)["text"]


@pytest.mark.parametrize(
    "args",
    [
        ("BUNDLE", *FEW, "--stop", "a", "b"),
        (*FEW, "--stop", "a", "b", "BUNDLE"),
        ("--stop", "a", "b", "BUNDLE", *FEW),
        ("--stop", "a", "--stop", "b", "BUNDLE", *FEW),
        ("--stop=a", "--stop=b", *FEW, "BUNDLE"),
        ("--stop", "a", "b", *FEW, "BUNDLE"),
        ("--stop", "a", "b", *FEW, "--", "BUNDLE"),
    ],
)
def test_several_values_of_a_flag_do_not_take_the_bundle(args: tuple[object, ...], shipped_path: Path) -> None:
    given = [shipped_path if arg == "BUNDLE" else arg for arg in args]
    expected = run_cli(shipped_path, *FEW, "--stop", "a", "--stop", "b")
    assert expected.code == 0 and run_cli(*given) == expected


def test_a_bundle_may_have_the_name_of_a_subcommand(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_path, tmp_path / "bench")
    monkeypatch.chdir(tmp_path)
    assert run_cli("./bench", "--prompt", "a", "--max-tokens", 2).code == 0


def test_old_spellings_still_work(shipped_path: Path) -> None:
    arena = ("--arena", "4MB")
    new = answer(shipped_path, *arena, "--no-prefetch", "--decay", 1.5)
    assert new["look_ahead"]["reads"] == 0
    assert answer(shipped_path, *arena, "--no-look-ahead", "--fade", 1.5)["text"] == new["text"]


def alone(outcome: Outcome) -> dict[str, Any]:
    """Return the one JSON object that stdout is."""
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert isinstance(found, dict) and outcome.out.endswith("}\n") and outcome.out.count("\n") == 1
    return found


def test_json_is_alone_on_stdout(shipped_path: Path, tiny_path: Path, tmp_path: Path) -> None:
    text, trace = tmp_path / "text.txt", tmp_path / "trace.jsonl"
    text.write_text(TEXT)
    few = ("--prompt", TEXT, "--max-tokens", 8, "--ignore-eos")
    found = alone(run_cli(shipped_path, *few, "--stats", "--trace", trace, "--json"))
    assert found["text"] and found["finish"] == "length"
    alone(run_cli("chat", shipped_path, "--max-tokens", 4, "--json", "--stats"))  # a conversation without a turn
    turns = invoke(run_command, ["chat", shipped_path, "--max-tokens", 4, "--json"], stdin="Hello\nGo on\n")
    assert len(alone(turns)["messages"]) == 4
    alone(run_cli("eval", shipped_path, text, "--reference", MODEL, "--json"))
    alone(run_cli("bench", shipped_path, "--new-tokens", 2, "--json"))
    alone(run_cli("probe", tiny_path, "--json"))
    alone(bundle_cli("inspect", tiny_path, "--json"))
    alone(bundle_cli("verify", tiny_path, "--json"))
    alone(bundle_cli("replay", shipped_path, trace, "--json"))


def test_json_is_alone_where_something_is_noted(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--prompt", "a", "--max-tokens", 2, "--point", "3.1", "--json")
    assert alone(outcome)["point"] == "3.25"
    assert outcome.err.startswith("note: --point: there is no point 3.1")


@pytest.mark.parametrize("point", ["1", "5", "0.5", "40", "uniform-9"])
def test_a_point_that_does_not_exist_is_refused(shipped_path: Path, point: str) -> None:
    outcome = run_cli(shipped_path, "--prompt", "a", "--point", point)
    assert_one_sentence(outcome, "--point", point, "uniform-2", "3.25")
    assert not outcome.out and not reader_threads()


@pytest.mark.parametrize("command", [("--prompt", "a"), ("--bench",), ("--probe",)])
def test_a_context_that_the_model_does_not_have_is_refused(shipped_path: Path, command: tuple[str, ...]) -> None:
    outcome = run_cli(shipped_path, *command, "--context", 513)
    assert_one_sentence(outcome, "--context 513", "512")


def test_memory_beyond_that_of_the_machine_is_refused(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--prompt", "a", "--memory", "900TiB")
    assert_one_sentence(outcome, "--memory", "more than", "GiB")
    assert not outcome.out


def test_memory_beyond_what_is_available_is_said(shipped_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "memory_limit", lambda: 1 << 30)
    outcome = run_cli(shipped_path, "--prompt", "a", "--max-tokens", 2, "--memory", "2GiB")
    assert outcome.code == 0 and outcome.err.startswith("note: of --memory 2.0 GiB only 1.0 GiB are available")
    assert outcome.err.count("\n") == 2  # with that of the cut


@pytest.mark.parametrize("args", [("--new-tokens", 3), ("--prompt-tokens", 5), ("--eval-phase", "prefill")])
def test_a_flag_that_would_do_nothing_is_refused(args: tuple[object, ...], tiny_path: Path) -> None:
    outcome = run_cli(tiny_path, "--prompt", "a", *args)
    assert outcome.code == 2 and "goes with --" in outcome.err and not outcome.out


def test_the_short_form_has_no_name(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(tiny_path)
    assert run_cli("run", "--prompt", "a", "--max-tokens", 2).code == 0
    refused = run_cli("run", "--prompt", "a", "--threads", 0)
    assert refused.code == 2 and "[OPTIONS] BUNDLE" in refused.err and "run run" not in refused.err


def test_the_version_is_told_with_a_bundle_and_without(tiny_path: Path) -> None:
    versions = [run_cli(*args).out for args in (("--version",), (tiny_path, "--version"), ("--version", tiny_path))]
    assert len(set(versions)) == 1 and versions[0].endswith("\n") and "version 0." in versions[0]


@pytest.mark.parametrize(
    "args",
    [
        ("chat", "--bench"),
        ("eval", "--prompt", "a"),
        ("bench", "--eval", "x"),
        ("probe", "--point", "3"),
        ("bench", "--reference", "x"),
    ],
)
def test_a_subcommand_knows_no_flags_of_others(args: tuple[str, ...], tiny_path: Path) -> None:
    outcome = run_cli(args[0], tiny_path, *args[1:])
    assert outcome.code == 2 and "Traceback" not in outcome.err and not outcome.out
