"""What may be in a wheel, and what builds, checks and publishes wheels. `make wheel` itself is run by .ci/run."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NAME = "dymoe-0.1.0-cp310-abi3-manylinux_2_35_aarch64.whl"

_spec = importlib.util.spec_from_file_location("contents", ROOT / ".ci" / "packaging" / "contents.py")
assert _spec and _spec.loader
contents = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(contents)

INFO = "dymoe-0.1.0.dist-info"
ENTRIES = "[console_scripts]\n" + "".join(f"{script}=x:y\n" for script in contents.SCRIPTS)
FILES: dict[str, str | bytes] = {name: "" for name in contents.REQUIRED}
FILES |= {f"{INFO}/licenses/{name}": "terms" for name in contents.LICENCES}
FILES |= {f"{INFO}/entry_points.txt": ENTRIES, f"{INFO}/METADATA": "License-Expression: Apache-2.0\n"}
FILES |= {"dymoe_compile/compile.py": "import torch\n"}


def wheel(folder: Path, changes: Mapping[str, str | bytes | None], name: str = NAME) -> Path:
    """Write a wheel of FILES with other contents for some of them; None leaves a file out."""
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, text in (FILES | dict(changes)).items():
            if text is not None:
                archive.writestr(file, text)
    return folder / name


def test_a_wheel_of_what_belongs_there_has_no_problems(tmp_path: Path) -> None:
    assert contents.problems(wheel(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dymoe_runtime/x.py": "if True:\n    from torch import nn\n"}, "dymoe_runtime/x.py imports torch"),
        ({"dymoe_runtime/x.py": "import transformers.models as m\n"}, "dymoe_runtime/x.py imports transformers.models"),
        ({"tests/test_x.py": ""}, "tests/test_x.py does not belong into a wheel"),
        ({"dymoe_runtime/tests/test_x.py": ""}, "dymoe_runtime/tests/test_x.py does not belong into a wheel"),
        ({"dymoe_runtime/kernels/src/isa/isa.cpp": ""}, "dymoe_runtime/kernels/src/isa/isa.cpp does not belong"),
        ({"dymoe_compile/weights.safetensors": ""}, "dymoe_compile/weights.safetensors does not belong"),
        ({contents.EXTENSION: None}, "dymoe_runtime/kernels/_native.abi3.so is missing"),
        ({f"{INFO}/licenses/LICENSE": None}, f"{INFO}/licenses/LICENSE is missing"),
        ({f"{INFO}/entry_points.txt": "[console_scripts]\ndymoe-run=x:y\n"}, "does not name dymoe-bundle"),
        ({"dymoe_compile/data/code.txt": bytes(5_000_000)}, "but must have less than 5000000"),
    ],
)
def test_what_does_not_belong_there_is_named(tmp_path: Path, changes: dict[str, str], problem: str) -> None:
    assert any(problem in found for found in contents.problems(wheel(tmp_path, changes)))


@pytest.mark.parametrize("tag", ["cp311-cp311-manylinux_2_35_x86_64", "cp310-abi3-linux_x86_64"])
def test_a_wheel_for_one_python_or_of_unknown_glibc_is_refused(tmp_path: Path, tag: str) -> None:
    (problem,) = contents.problems(wheel(tmp_path, {}, f"dymoe-0.1.0-{tag}.whl"))
    assert "cp310-abi3-manylinux" in problem


def test_the_installed_kernels_are_for_all_versions_of_python() -> None:
    native = pytest.importorskip("dymoe_runtime.kernels._native")
    assert sys.implementation.name != "cpython" or Path(native.__file__).name.split(".")[1] == "abi3"


def test_the_tag_of_wheels_is_the_oldest_python_that_the_project_supports() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'^requires-python = ">=3\.(\d+)', text, re.MULTILINE)
    assert oldest and f'wheel.py-api = "cp3{oldest[1]}"' in text


def test_no_named_tuple_is_generic() -> None:
    """Python 3.10 refuses it when the module is imported, which neither ruff nor mypy says."""
    for path in (path for package in contents.PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
                assert not {"NamedTuple", "Generic"} <= bases, f"{path}: {node.name}"


def test_a_release_publishes_only_what_was_built_and_checked_before() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["publish"]["needs"] == "check" and set(jobs["check"]["needs"]) == {"wheel", "sdist"}
    assert jobs["publish"]["permissions"]["id-token"] == "write" and "tag" in jobs["publish"]["if"]
    used = " ".join(step.get("uses", "") for step in jobs["publish"]["steps"])
    assert used.index("attest-build-provenance") < used.index("gh-action-pypi-publish") and "password" not in str(jobs)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z]+)", str(jobs)):
        assert f"\n{target}:" in makefile
