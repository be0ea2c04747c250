"""Kills of a compilation, and disks that fail under one: nothing is lost, and the next run makes the same bytes.

    PYTHONPATH=tests python -m faults.campaign kills 100    # make faults runs both
    PYTHONPATH=tests python -m faults.campaign disks 10

Prints each failure. The exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import errno
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from faults.kit import Compile, Place, build_shim, contents, is_one_sentence
from fuzz.campaign import Run, server
from fuzz.inputs import Inputs
from fuzz.server import SIGNAL

KILLED = SIGNAL + 9
# A kill in every tenth compilation is in the last rename.
IN_RENAME = 10


class Kills:
    """Kills compilations at random moments."""

    def __init__(self, compile_: Compile, folder: Path) -> None:
        """Compile undisturbed, to know the bytes, the number of changes to files, and the time."""
        self._compile, self._folder = compile_, folder
        self.failures: list[str] = []
        self.kinds: Counter[str] = Counter()
        self._before, self._whole = folder / "before.dymoe", folder / "whole.dymoe"
        for path, seed in ((self._before, 3), (self._whole, 0)):
            run = compile_(path, "--seed", seed)
            assert run.code == 0, run.err
        self._calls, self._renames, self._seconds = 0, 0, 0.0
        for kind in ("rename", "change"):
            place = Place(folder / kind)
            run = compile_(place.output, faults=f"{kind} 0 0 /{kind}/")
            assert run.code == 0 and contents(place.output) == contents(self._whole), run.err
            self._renames, self._calls, self._seconds = self._calls, run.calls, run.seconds

    def one(self, number: int, seed: int) -> None:
        """Kill one compilation, or several in a row, and let the next one end."""
        rng = random.Random(f"kill-{seed}-{number}")
        replaces = rng.random() < 0.5
        place = Place(self._folder / f"kill-{number}", self._before if replaces else None)
        more: dict[str, Any] = {"without_renameat2": rng.random() < 0.3}
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            kind, how = self._moment(number, rng, place, replaces and not more["without_renameat2"])
            run = self._compile(place.output, **more, **how)
            self.kinds[f"{kind}, killed" if run.code == KILLED else f"{kind}, at its end"] += 1
            problem = self._problem(run, place, replaces)
            if problem is not None:
                self.failures.append(f"kill {number}: {how}: {problem}")
        run = self._compile(place.output, **more)
        problem = self._after(run, place)
        if problem is not None:
            self.failures.append(f"kill {number}: afterwards: {problem}: {run.err[-300:]}")

    def _moment(self, number: int, rng: random.Random, place: Place, exchanges: bool) -> tuple[str, dict[str, Any]]:
        """Return what a moment is called, and how to kill then."""
        action = rng.choice(("kill", "killed"))
        if number % IN_RENAME == 0:
            last = self._renames - 1 + (rng.randrange(2) if exchanges else 0)
            return "in the last rename", {"faults": f"rename {action} {last} /{place.folder.name}/"}
        if number % 2:
            return "in a call", {"faults": f"change {action} {rng.randrange(self._calls)} /{place.folder.name}/"}
        return "at a time", {"kill_s": rng.uniform(0, self._seconds)}

    def _problem(self, run: Run, place: Place, replaces: bool) -> str | None:
        if run.code not in (0, KILLED):
            return f"exit code {run.code}: {run.err[-300:]}"
        there = contents(place.output) if place.output.exists() else {}
        if there not in ({}, contents(self._before), contents(self._whole)):
            return "neither the old nor the new bundle is at the output"
        kept = place.output.exists() or (place.partial / "replaced").exists()
        return "the bundle that was there is lost" if replaces and not kept else place.lost()

    def _after(self, run: Run, place: Place) -> str | None:
        if run.code != 0:
            return f"exit code {run.code}"
        if contents(place.output) != contents(self._whole):
            return "other bytes than those of an undisturbed compilation"
        return "work in progress is left" if place.partial.exists() else place.lost()


# What fails, and with which errors.
FAULTS: tuple[tuple[str, int], ...] = (
    *(("write", error) for error in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)),
    *(("sync", error) for error in (errno.EIO, errno.ENOSPC)),
    *(("rename", error) for error in (errno.EIO, errno.EACCES, errno.EROFS, errno.ENOSPC)),
    *(("change", error) for error in (errno.EIO, errno.EROFS, errno.EMFILE)),
)


class Disks:
    """Lets the disk of the output, or that of the checkpoint, fail at random moments."""

    def __init__(self, compile_: Compile, folder: Path) -> None:
        self._compile, self._folder = compile_, folder
        self.failures: list[str] = []
        self.kinds: Counter[str] = Counter()
        self._before, self._whole = folder / "before.dymoe", folder / "whole.dymoe"
        for path, seed in ((self._before, 3), (self._whole, 0)):
            run = compile_(path, "--seed", seed)
            assert run.code == 0, run.err

    def each(self, count: int, seed: int) -> None:
        """Try each fault at `count` moments."""
        for kind, error in FAULTS:
            self._tries(f"{kind} {error}", f"/{kind}-{error}-", count, seed)
        for error in (errno.EIO, errno.EACCES):
            self._tries(f"read {error}", str(self._compile.model), count, seed)
            self._tries(f"read {error}", f"/read-{error}-", count, seed)

    def _tries(self, what: str, path: str, count: int, seed: int) -> None:
        name = what.replace(" ", "-") + ("-model" if path == str(self._compile.model) else "")
        rng = random.Random(f"{name}-{seed}")
        path = path if name.endswith("-model") else f"/{name}-"
        most = self._most(what, path, name)
        for number in range(count):
            place = Place(self._folder / f"{name}-{number}", self._before if rng.random() < 0.5 else None)
            before = contents(place.output) if place.output.exists() else None
            run = self._compile(place.output, faults=f"{what} {rng.randrange(max(1, most))} {path}")
            problem = self._problem(run, place, before)
            self.kinds[f"{what.split()[0]}, exit {run.code}"] += 1
            if problem is None:
                again = self._compile(place.output)
                problem = None if again.code == 0 else f"afterwards exit code {again.code}: {again.err[-300:]}"
                if problem is None and contents(place.output) != contents(self._whole):
                    problem = "afterwards other bytes"
            if problem is not None:
                self.failures.append(f"{name} {number}: {problem}: {run.err[-400:]}")

    def _most(self, what: str, path: str, name: str) -> int:
        """Return how many calls or bytes an undisturbed compilation has."""
        kind, error = what.split()
        counted = "0" if int(error) not in (errno.ENOSPC, errno.EDQUOT) or kind != "write" else error
        after = 0 if counted == "0" else 1 << 40
        place = Place(self._folder / f"{name}-undisturbed")
        run = self._compile(place.output, faults=f"{kind} {counted} {after} {path}")
        assert run.code == 0, run.err
        return run.calls

    def _problem(self, run: Run, place: Place, before: dict[str, bytes] | None) -> str | None:
        """Return what is wrong: no sentence, or something that was there and is not as it was."""
        if run.code != 0 and not is_one_sentence(run):
            return f"exit code {run.code}, and no sentence"
        now = contents(place.output) if place.output.exists() else None
        if now not in (before, contents(self._whole)):
            return "neither the old nor the new bundle is at the output"
        if run.code == 0 and now != contents(self._whole):
            return "exit code 0 without the bundle"
        return place.lost()


def main() -> None:
    """Run a campaign as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("kills", "disks"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, server(build_shim(Path(name))) as made:
        folder = Path(name)
        (folder / "inputs").mkdir()
        (folder / "work").mkdir()
        sound = Inputs(folder / "inputs", made)
        run_compile = Compile(made, sound.checkpoint("plain"), sound.text)
        if options.kind == "kills":
            kills = Kills(run_compile, folder / "work")
            for number in range(options.count):
                kills.one(number, options.seed)
            failures, kinds = kills.failures, kills.kinds
        else:
            disks = Disks(run_compile, folder / "work")
            disks.each(options.count, options.seed)
            failures, kinds = disks.failures, disks.kinds
    for failure in failures:
        print(failure, end="\n\n")
    ends = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{options.kind}, seed {options.seed}: {len(failures)} failures; {ends}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
