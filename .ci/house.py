"""Check the architecture by figures: how far imports reach, how long their chains are, and who changes whom.

    python .ci/house.py

Prints each figure beside its limit; the exit code is 1 where one is exceeded. The direction of imports between
folders is checked by import-linter, whose contracts are in pyproject.toml.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGES = ("dymoe_runtime", "dymoe_compile")
# Folders whose objects nobody completes from outside.
CLOSED = ("engine", "store", "model")
MAX_OPENING, MAX_SENSITIVITY, MAX_FOLDER, MAX_CHAIN = 9, 26, 14, 15
SOURCES = (".py", ".pyi", ".cpp", ".h")


def main() -> None:
    """Print all figures; exit with 1 where one is too large."""
    sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    folder, files = max(folder_sizes(), key=lambda item: item[1])
    chain = longest_chain(graph)
    figures = [
        ("circles between folders", len(circles(graph)), 0, "; ".join(circles(graph))),
        ("modules that opening a bundle reaches", len(reached(graph, "dymoe_runtime.bundle.bundle")), MAX_OPENING, ""),
        (
            "modules that measuring sensitivity reaches",
            len(reached(graph, "dymoe_compile.policy.sensitivity")),
            MAX_SENSITIVITY,
            "",
        ),
        ("files in the largest folder", files, MAX_FOLDER, folder),
        ("modules in the longest chain of imports", len(chain), MAX_CHAIN, " > ".join(chain)),
    ]
    for what, found in findings().items():
        figures.append((what, len(found), 0, "; ".join(found)))
    for what, found, limit, detail in figures:
        print(f"{found:>4} of at most {limit:<3} {what}{f': {detail}' if detail else ''}")
    sys.exit(any(found > limit for _, found, limit, _ in figures))


def reached(graph: grimp.ImportGraph, module: str) -> set[str]:
    """Return the modules that importing a module runs: itself, what it imports, and the packages of all these."""
    modules = {module, *graph.find_upstream_modules(module)}
    while True:
        packages = {name.rpartition(".")[0] for name in modules} - modules - {""}
        if not packages:
            return modules
        for package in packages:
            modules |= {package, *graph.find_upstream_modules(package)}


def circles(graph: grimp.ImportGraph) -> list[str]:
    """Return pairs of folders that import each other, by whatever way."""
    arrows: dict[str, set[str]] = {}
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            if folder_of(importer) != folder_of(imported):
                arrows.setdefault(folder_of(importer), set()).add(folder_of(imported))

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for folder in arrows.get(left.pop(), ()):
                if folder not in seen:
                    seen.add(folder)
                    left.append(folder)
        return seen

    ways = {folder: reachable(folder) for folder in arrows}
    return sorted(f"{a} and {b}" for a in ways for b in ways[a] if a < b and a in ways.get(b, ()))


def folder_of(module: str) -> str:
    """Return the folder of a module: that of a package is itself, and the top of a package is a folder, too."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 or (ROOT / Path(*parts)).is_dir() else parts[0]


def longest_chain(graph: grimp.ImportGraph) -> list[str]:
    """Return the longest chain of modules each of which imports the next."""

    @cache
    def below(module: str) -> tuple[str, ...]:
        # A package is there before its modules; what they import from it by its name is the compiled extension.
        imports = graph.find_modules_directly_imported_by(module)
        chains = [below(name) for name in sorted(imports) if not module.startswith(f"{name}.")]
        return (module, *max(chains, key=len, default=()))

    return list(max(map(below, sorted(graph.modules)), key=len))


def folder_sizes() -> Iterator[tuple[str, int]]:
    """Yield each folder of sources, and how many it has."""
    for top in (*PACKAGES, "tests", "benchmarks"):
        for folder in (ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())):
            files = [path for path in folder.iterdir() if path.suffix in SOURCES]
            yield str(folder.relative_to(ROOT)), len(files)


def findings() -> dict[str, list[str]]:
    """Return lines of the runtime that complete another object, or reach into it."""
    assigned, reaches = [], []
    for path in sorted((ROOT / "dymoe_runtime").rglob("*.py")):
        where = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _is_private_of_private(node):
                reaches.append(f"{where}:{node.lineno}")
            if path.parent.name in CLOSED and isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                assigned += [f"{where}:{node.lineno}" for target in targets if _is_of_another(target)]
    return {"attributes of other objects that are assigned": assigned, "reaches of the kind ._x._y": reaches}


def _is_private_of_private(node: ast.Attribute) -> bool:
    inner = node.value
    return isinstance(inner, ast.Attribute) and _is_private(node.attr) and _is_private(inner.attr)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_of_another(target: ast.expr) -> bool:
    """Return whether an assignment changes an attribute of something other than `self`."""
    if isinstance(target, (ast.Tuple, ast.List)):
        return any(map(_is_of_another, target.elts))
    return isinstance(target, ast.Attribute) and not (isinstance(target.value, ast.Name) and target.value.id == "self")


if __name__ == "__main__":
    main()
