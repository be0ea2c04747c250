"""What documents show works: examples in docstrings, and the Python of README.md and docs/."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dymoe_compile
import dymoe_runtime

ROOT = Path(__file__).parent.parent.parent
# Whoever reads of these may expect an example.
WITH_EXAMPLES = {
    "dymoe_runtime",
    "dymoe_runtime.bundle.bundle.Bundle.open",
    "dymoe_runtime.engine.load.load_model",
    "dymoe_runtime.engine.load.load_scorer",
    "dymoe_runtime.kernels.load_kernels",
    "dymoe_runtime.text.generate.generate",
    "dymoe_runtime.text.sampling.SamplingParams",
    "dymoe_runtime.text.session.Session",
    "dymoe_runtime.text.tokenizer.Tokenizer.load",
    "dymoe_runtime.tools.likelihood.log_likelihoods",
}


def modules() -> Iterator[str]:
    for package in (dymoe_runtime, dymoe_compile):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(("__main__", "_native", "descent_native", "kernels.native")):
                yield module.name


@pytest.fixture
def beside_the_demo(shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which `make demo` has run."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "demo.dymoe").symlink_to(shipped_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


# Prints the names of all examples in the docstrings of the modules in argv; exits with 1 if one is not true.
RUN_EXAMPLES = """
import doctest, importlib, sys
runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
failed = 0
for name in sys.argv[1:]:
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        if example.examples:
            failed += runner.run(example).failed
            print("ran", example.name)
sys.exit(failed > 0)
"""


def run_python(*arguments: str) -> str:
    """Run Python in a process of its own, because memory budgets count the process; return what it prints."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.usefixtures("beside_the_demo")
def test_examples_in_docstrings_are_true() -> None:
    shown = set(re.findall("^ran (.*)$", run_python("-c", RUN_EXAMPLES, *modules()), re.MULTILINE))
    assert shown >= WITH_EXAMPLES, WITH_EXAMPLES - shown


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]


@pytest.mark.usefixtures("beside_the_demo")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_documents_runs(document: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks or document != "README.md"
    for block in blocks:
        assert run_python("-c", block).strip()


def test_public_names_are_those_of_the_stub() -> None:
    stub = (ROOT / "dymoe_runtime" / "__init__.pyi").read_text(encoding="utf-8")
    named = set(re.findall(r" as (\w+)$", stub, re.MULTILINE)) | {"__version__"}
    assert named == set(dymoe_runtime.__all__) == set(dir(dymoe_runtime))
    for name in dymoe_runtime.__all__:
        assert getattr(dymoe_runtime, name)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = dymoe_runtime.nothing_of_the_kind


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"])
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for page in [path] if path.is_file() else sorted(path.glob("*.md")):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs"])
def test_paths_in_documents_exist(document: str) -> None:
    path = ROOT / document
    for page in [path] if path.is_file() else sorted(path.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for named in re.findall(r"`((?:dymoe_runtime|dymoe_compile|benchmarks|tests|profiles|docs)/[\w./-]+)`", text):
            assert (ROOT / named).exists(), f"{page.name}: {named}"
