"""What documents show works: examples in docstrings, and the Python of README.md and docs/."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
import sysconfig
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


# What pip installs for the dependencies in pyproject.toml, without extras.
RUNTIME_PACKAGES = {
    *("numpy", "safetensors", "tokenizers", "click", "tqdm", "jinja2", "markupsafe", "isal", "tomli"),
    *("prompt_toolkit", "wcwidth", "msgspec"),
}
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]


@pytest.mark.usefixtures("beside_the_demo")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_documents_runs(document: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks or document != "README.md"
    for block in blocks:
        assert run_python("-c", block).strip()


WITHOUT_TORCH = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
assert not any(importlib.util.find_spec(name) for name in ("torch", "transformers", "lm_eval", "onnx"))
exec(compile(open(sys.argv[2], encoding="utf-8").read(), sys.argv[2], "exec"))
"""


@pytest.mark.usefixtures("beside_the_demo")
@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_python_in_documents_needs_no_torch(document: str, tmp_path: Path) -> None:
    """It runs in an environment that has what the runtime requires, and nothing else."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.partition("-")[0].partition(".")[0] in RUNTIME_PACKAGES or "dymoe" in entry.name:
            (packages / entry.name).symlink_to(entry)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        (tmp_path / "block.py").write_text(block, encoding="utf-8")
        assert run_python("-I", "-S", "-c", WITHOUT_TORCH, str(packages), str(tmp_path / "block.py")).strip()


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
