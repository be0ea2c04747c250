"""Faults of the system for commands: a library that is preloaded, and what must be as it was whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compile_kit import STAGE_DONE, STAGE_UNDER_WAY
from fuzz.campaign import Run, Server

SHIM = Path(__file__).parent / "shim.cpp"
COMPILER = shutil.which("c++")
NO_COMPILER = "the library that lets calls fail needs a C++ compiler"


def build_shim(folder: Path) -> Path:
    """Compile the library for LD_PRELOAD."""
    library = folder / "faults.so"
    assert COMPILER is not None, NO_COMPILER
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True)
    return library


class Place:
    """A folder to compile in, with files of others at every name that the compiler could mistake for its own."""

    def __init__(self, folder: Path, before: Path | None = None) -> None:
        """Make the folder, with a copy of the bundle `before` at the output."""
        self.folder = folder
        self.output = folder / "out.dymoe"
        self.partial = folder / ".out.dymoe.partial"
        folder.mkdir()
        (folder / "elsewhere").mkdir()
        for name in ("out.dymoe.partial", ".out.dymoe.partial.tmp", "manifest.json", "elsewhere/policy.json"):
            (folder / name).write_text("mine")
        (folder / "link.dymoe").symlink_to("elsewhere")
        if before is not None:
            shutil.copytree(before, self.output)
        self._foreign = self._look()

    def _look(self) -> dict[str, str]:
        """Return name -> content of all but the output and the work in progress."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if not name.startswith((f"{self.output.name}/", f"{self.partial.name}/")) and path not in (
                self.output,
                self.partial,
            ):
                found[name] = (
                    os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else "a folder"
                )
        return found

    def lost(self) -> str | None:
        """Return what is wrong with the files of others, or None."""
        now = self._look()
        return None if now == self._foreign else f"files of others changed: {sorted(set(now) ^ set(self._foreign))}"


def contents(directory: Path) -> dict[str, bytes]:
    """Return name -> bytes of the files in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def lines_of(run: Run) -> list[str]:
    """Return the lines on stderr without those about stages and notes."""
    return [
        line
        for line in run.err.splitlines()
        if not STAGE_DONE.fullmatch(line) and not STAGE_UNDER_WAY.fullmatch(line) and not line.startswith("note: ")
    ]


def is_one_sentence(run: Run, *words: str) -> bool:
    """Return whether a command ended with exit code 1 and one line, which has one of the words, if there are any."""
    lines = lines_of(run)
    good = run.code == 1 and len(lines) == 1 and "Traceback" not in run.err and ": " in lines[0]
    return good and (not words or any(word in lines[0] for word in words))


class Compile:
    """Compilations of one tiny checkpoint by a server."""

    def __init__(self, server: Server, model: Path, text: Path) -> None:
        self.server, self.model, self.text = server, model, text

    def __call__(self, output: Path, *flags: object, **more: object) -> Run:
        args: Sequence[object] = ("--calibration", self.text, "--calibration-tokens", 512, "--jobs", 1, *flags)
        return self.server.run("dymoe-compile", self.model, "-o", output, *args, **more)


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[bool]:
    """Mount a tmpfs with these options on a new folder, and yield whether that is permitted here."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", *(part for option in options for part in ("-o", option)), "tmpfs", str(place)]
    allowed = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "-l", str(place)], check=True)
