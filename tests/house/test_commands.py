"""Every command in README.md, CONTRIBUTING.md and docs/ is run, with real files for the names that it uses."""

from __future__ import annotations

import glob
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from helpers import EXAMPLES

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
OURS = ("dymoe-compile", "dymoe-run", "dymoe-bundle")
# What stands in documents for a name of the reader's own.
NAMES = {
    "BUNDLE": "build/demo.dymoe",
    "my.dymoe": "build/demo.dymoe",
    "qwen3.dymoe": "build/demo.dymoe",
    "MODEL": "examples/model",
    "CHECKPOINT": "examples/model",
    "https://host/packed.dymoe": "packed.dymoe",
    "/media/stick/my.dymoe": "build/demo.dymoe",
    "Qwen/Qwen3-30B-A3B": "examples/model",
    "TEXT": "Hello",
    "FILE": "text.txt",
    "FILE...": "text.txt",
    "TRACE": "trace.jsonl",
    "…": "--max-tokens=4",
}
# They change the system, or are what runs the tests; that what they name exists is checked.
OTHERS = ("make", "pip", "pytest", "pre-commit", "apt")
CHAT = "Hello\n"


def commands(document: str) -> Iterator[str]:
    """Yield the commands of a document: lines of its shell blocks, and our own in its text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        if "dymoe-lm-eval" in block:  # tests/tools/test_lm_eval.py runs these, as whole scripts
            continue
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s+#.*", "", line).strip()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (" ".join(found.split()) for found in re.findall(r"`(dymoe-(?:compile|run|bundle)\b[^`]*)`", text))


@pytest.fixture
def folder(shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `make demo` has run, with short texts and a trace."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "demo.dymoe").symlink_to(shipped_path)
    (tmp_path / "examples" / "heldout").mkdir(parents=True)
    (tmp_path / "examples" / "model").symlink_to(EXAMPLES / "model")
    text = (EXAMPLES / "heldout" / "wiki.txt").read_text(encoding="utf-8")[:1500]
    for name in ("text.txt", "examples/heldout/code.txt", "examples/heldout/math.txt", "examples/heldout/wiki.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "answer.gbnf").write_text('root ::= "yes" | "no"\n')
    save_keys(tmp_path / "key.pem", tmp_path / "key.pub")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.jsonl").write_text(trace())
    return tmp_path


def save_keys(private: Path, public: Path) -> None:
    """Make a key to sign with, and its public half."""
    key = Ed25519PrivateKey.generate()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@cache
def trace() -> str:
    """A trace of a few tokens, made in the current directory."""
    traced = execute("dymoe-run build/demo.dymoe --prompt Hello --max-tokens 4 --trace trace.jsonl")
    assert traced.returncode == 0, traced.stderr
    return Path("trace.jsonl").read_text(encoding="utf-8")


def execute(command: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands, if no document before had it; one that only names a subcommand is asked for its help."""
    program, *words = shlex.split(command)
    digest = json.loads(Path("build/demo.dymoe/manifest.json").read_text(encoding="utf-8"))["sha256"]
    words = [(NAMES | {"DIGEST": digest}).get(word, word) for word in words]
    words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
    if not any(word in words for word in ("build/demo.dymoe", "examples/model", "packed.dymoe", "--supported")):
        words = [*(word for word in words if not word.startswith("-")), "--help"]
    if "serve" in words or "--serve" in words:
        return outcome_of_server(program, *words)
    # A command that writes something is run for each document, in the folder of which it is.
    return outcome_of.__wrapped__(program, *words) if {"-o", "--write"} & set(words) else outcome_of(program, *words)


@cache
def outcome_of(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, because a budget counts what the process of the tests holds."""
    installed = Path(sys.executable).with_name(program)
    return subprocess.run([installed, *words], input=CHAT, capture_output=True, text=True, timeout=300)


@cache
def outcome_of_server(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Start a server at a free port, and end it once clients can connect."""
    command = [Path(sys.executable).with_name(program), *words, "--port", "0"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    said = ""
    while process.stderr is not None and " is served at " not in said and (line := process.stderr.readline()):
        said += line
    process.terminate()
    _, rest = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, "", said + rest)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_run(document: str) -> None:
    for command in dict.fromkeys(commands(document)):
        program = command.removeprefix(".venv/bin/").split()[0]
        if program in OURS:
            outcome = execute(command.removeprefix(".venv/bin/"))
            assert outcome.returncode == 0, f"{document}: {command}: {outcome.stderr}"
        else:
            assert program in OTHERS, f"{document}: no test runs '{command}'"
            check_names(command)


def check_names(command: str) -> None:
    """Assert that what a command of another program names is there."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(command)
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= set(targets), command
    for word in words:
        if "/" in word and not word.startswith((".venv", "-")) and "=" not in word:
            assert (ROOT / word).exists(), command


def test_the_commands_of_readme_are_found() -> None:
    found = list(commands("README.md"))
    assert {'dymoe-run qwen3.dymoe --prompt "Hello" --memory 4GiB', "dymoe-bundle verify BUNDLE"} <= set(found)
    assert len(found) > 10
