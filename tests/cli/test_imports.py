"""What a command imports, and what it says where that cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MODEL, PROMPT, Outcome, assert_one_sentence

HEAVY = """
import contextlib, importlib, sys
module, name, *args = sys.argv[1:]
with contextlib.suppress(SystemExit):
    getattr(importlib.import_module(module), name)(args)
print([name for name in ("torch", "tokenizers", "jinja2") if name in sys.modules])
"""


RUN, COMPILE = ("dymoe_runtime.cli.run", "run"), ("dymoe_compile.cli", "main")


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (RUN, ("--help",)),
        (RUN, ("--version",)),
        (RUN, ("x", "--bench", "--probe")),
        (RUN, ("x", "--no-such-flag")),
        (COMPILE, ("--help",)),
        (COMPILE, ("x", "-o", "y", "--tiers", "4,3")),
    ],
)
def test_neither_help_nor_a_wrong_flag_waits_for_heavy_imports(command: tuple[str, str], args: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", HEAVY, *command, *args], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("isa", ["", "numpy"])
@pytest.mark.parametrize("point", ["3", "auto"])
def test_a_run_does_without_torch(shipped_path: Path, point: str, isa: str) -> None:
    """Importing it takes seconds, and 200 MB that are the experts' otherwise."""
    args = ["--prompt", PROMPT, "--max-tokens", "4", "--temperature", "0.5", "--point", point, "--stats"]
    command = [sys.executable, "-c", HEAVY, *RUN, str(shipped_path), *args]
    environment = os.environ | {"DYMOE_ISA": isa}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "['tokenizers']" and "tokens/s" in done.stderr


NOT_WHOLE = """
import sys
class Broken:
    def find_spec(self, name, *rest):
        if name == "{library}":
            raise {problem}
sys.meta_path.insert(0, Broken())
from dymoe_{package}.__main__ import {name}
{name}()
"""


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        ('OSError("libc.so: cannot open shared object file")', 1, ("libc.so", "install dymoe")),
        ('ImportError("No module named tokenizers")', 1, ("No module named tokenizers", "install dymoe")),
        ("KeyboardInterrupt", 130, ("interrupted",)),
    ],
)
def test_an_import_that_fails_is_one_sentence(problem: str, code: int, words: tuple[str, ...], tiny_path: Path) -> None:
    script = NOT_WHOLE.format(problem=problem, library="tokenizers", package="runtime.cli", name="run")
    assert_one_sentence(outcome_of(script, tiny_path, "--prompt", "y"), *words, code=code)


def test_serving_needs_an_extra(tiny_path: Path) -> None:
    for library in ("starlette", "uvicorn", "prometheus_client"):
        parts = {"problem": f'ImportError("No module named {library}")', "library": library}
        script = NOT_WHOLE.format(**parts, package="runtime.cli", name="run")
        outcome = outcome_of(script, "serve", tiny_path)
        assert_one_sentence(outcome, library, "serving needs the extra 'serve'", "pip install 'dymoe[serve]'")


@pytest.mark.parametrize("isa", ["", "numpy", "torch"])  # the last is what the reference was called once
def test_without_torch_all_but_reading_checkpoints_works(
    isa: str, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYMOE_ISA", isa)
    parts = {"problem": 'ImportError("No module named torch")', "library": "torch"}
    running = NOT_WHOLE.format(**parts, package="runtime.cli", name="run")
    text = tmp_path / "text.txt"
    text.write_text("Some text to score. " * 5)
    bench = ("--bench", "--prompt-tokens", 8, "--new-tokens", 2)
    for args in (("--prompt", "a", "--max-tokens", 2), bench, ("--eval", text)):
        outcome = outcome_of(running, tiny_path, *args)
        assert outcome.code == 0, outcome.err
    remedy = "pip install 'dymoe[compile]'"
    compiling = NOT_WHOLE.format(**parts, package="compile", name="main")
    assert_one_sentence(outcome_of(compiling, MODEL, "-o", tmp_path / "x.dymoe"), "torch", remedy)
    outcome = outcome_of(running, tiny_path, "--eval", __file__, "--reference", MODEL)
    assert_one_sentence(outcome, "torch", "reading checkpoints", remedy)


def outcome_of(script: str, *args: object) -> Outcome:
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)
