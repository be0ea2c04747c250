"""What may be in a wheel, and what must be."""

from __future__ import annotations

import ast
import re
import zipfile
from pathlib import Path

MAX_BYTES = 5_000_000
PACKAGES = ("dymoe_runtime", "dymoe_compile")
# In the runtime, only what runs on request may need these.
HEAVY = ("torch", "transformers")
EXTENSION = "dymoe_runtime/kernels/_native.abi3.so"
REQUIRED = (
    EXTENSION,
    "dymoe_runtime/py.typed",
    "dymoe_runtime/cli/__main__.py",
    "dymoe_compile/py.typed",
    "dymoe_compile/profiles/laptop-8gb.toml",
    "dymoe_runtime/serving/page/index.html",
    "dymoe_runtime/serving/page/app/main.js",
    "dymoe_runtime/serving/page/style/base.css",
    "dymoe_runtime/serving/page/vendor/purify.js",
)
SCRIPTS = ("dymoe-compile", "dymoe-run", "dymoe-bundle", "dymoe-lm-eval")
LICENCES = (
    "LICENSE",
    "dymoe_runtime/kernels/licenses/nanobind.txt",
    "dymoe_runtime/serving/page/vendor/licenses/dompurify.txt",
    "dymoe_runtime/serving/page/vendor/licenses/marked.txt",
)
SUFFIXES = (".py", ".pyi", ".typed", ".toml", ".txt", ".md", ".so", ".html", ".js", ".css", ".svg")
TAG = re.compile(r"dymoe-[^-]+-cp310-abi3-manylinux_2_\d+_(x86_64|aarch64)\.whl")


def problems(wheel: Path) -> list[str]:
    """Return a sentence for each thing that is wrong with a wheel."""
    found = []
    if wheel.stat().st_size >= MAX_BYTES:
        found.append(f"has {wheel.stat().st_size} bytes, but must have less than {MAX_BYTES}")
    if not TAG.fullmatch(wheel.name):
        found.append("its name must end with cp310-abi3-manylinux_2_<glibc>_<processor>.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        (info,) = {name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info")} or {"?"}
        required = (*REQUIRED, *(f"{info}/licenses/{name}" for name in LICENCES))
        found += [f"{name} is missing" for name in required if name not in names]
        found += [f"{name} does not belong into a wheel" for name in names if not _belongs(name, info)]
        for name in names:
            if name.startswith("dymoe_runtime/") and name.endswith(".py"):
                found += _heavy_imports(name, archive.read(name))
        for name, expected in ((f"{info}/entry_points.txt", SCRIPTS), (f"{info}/METADATA", ("License-Expression:",))):
            text = archive.read(name).decode() if name in names else ""
            found += [f"{name} does not name {word}" for word in expected if word not in text]
    return found


def _belongs(name: str, info: str) -> bool:
    top, *inner = name.split("/")
    if top == info:
        return True
    return top in PACKAGES and name.endswith(SUFFIXES) and not {"tests", "src", "__pycache__"} & set(inner)


def _heavy_imports(name: str, source: bytes) -> list[str]:
    """Return a sentence for each import of PyTorch and the like in a module of the runtime."""
    found = []
    for node in ast.walk(ast.parse(source)):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported = [node.module]
        found += [f"{name} imports {full}" for full in imported if full.split(".")[0] in HEAVY]
    return found
