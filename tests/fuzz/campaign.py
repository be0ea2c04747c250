"""Campaigns of mutations: each damaged input gets one sentence, or what is right, within bounded time and memory.

    PYTHONPATH=tests python -m fuzz.campaign bundle 5000    # make fuzz runs all three
    PYTHONPATH=tests python -m fuzz.campaign checkpoint 1000 --seed 1
    PYTHONPATH=tests python -m fuzz.campaign other --seed 1 --only 17

Prints each failure with the command that repeats it, and keeps its input in build/fuzz. The exit code is 1 if there was
one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fuzz.inputs import BUNDLES, CHAT, CHECKPOINTS, GENERATE, SMALL, Inputs
from fuzz.mutate import make_digests_right, make_session_right, mutate_file, mutate_json, mutate_text
from fuzz.server import CRASH, HANG, SIGNAL

# Memory of a damaged input's run beyond that of a sound one.
SPARE_BYTES = 256 << 20
# Lines on stderr beside the one of an error.
BESIDE = re.compile(r"note: .*|Warning: .*|[a-z ]+: \d+ (done in|of \d+ after) .*")
VERIFY = ("dymoe-bundle", "verify")


class Run(NamedTuple):
    """A command and how it ended."""

    code: int
    out: str
    err: str
    peak: int
    seconds: float = 0.0
    calls: int = 0  # that the library of tests/faults counted
    lists: bool = False  # whether it may list several problems, a line each


class Server:
    """Runs commands in forks of one process that has loaded all modules, and a library that is preloaded, if any."""

    def __init__(self, preload: Path | None = None) -> None:
        command = [sys.executable, "-m", "fuzz.server"]
        env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **env}
        env |= {} if preload is None else {"LD_PRELOAD": str(preload)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(self, command: str, *args: object, **more: object) -> Run:
        """Run a command, with `more` of what fuzz.server takes; return how it ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"command": command, "args": [str(arg) for arg in args], **more}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Run(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@contextmanager
def server(preload: Path | None = None) -> Iterator[Server]:
    """Yield a server that is closed at the end."""
    made = Server(preload)
    try:
        yield made
    finally:
        made.close()


def problem_of(run: Run, sound: Run | None, may_differ: bool) -> str | None:
    """Return what is wrong with how a command ended, or None; `sound` is how it ended with the sound input."""
    if run.code == HANG or run.code == SIGNAL + 24:  # SIGXCPU
        return "hangs"
    if run.code >= SIGNAL:
        return f"ends by signal {run.code - SIGNAL}"
    if run.code == CRASH or "Traceback" in run.err:
        return "a traceback"
    lines = [line for line in run.err.splitlines() if line and not BESIDE.fullmatch(line)]
    if sound is not None and run.peak > sound.peak + SPARE_BYTES:
        return f"takes {run.peak >> 20} MiB, a sound input {sound.peak >> 20} MiB"
    if run.code == 0 and not may_differ and sound is not None and run.out != sound.out:
        return "other text at exit 0"
    if run.code not in (0, 1, 3, 4) or (run.code and len(set(lines)) != 1 and not run.lists):
        return f"exit code {run.code} and {len(lines)} lines"
    if not run.err.replace("\n", "").replace("\t", "").isprintable():
        return "control characters in a message"
    return None


def link_copy(source: Path, target: Path) -> Path:
    """Copy a directory by hard links."""
    target.mkdir()
    for path in source.iterdir():
        os.link(path.resolve(), target / path.name)
    return target


def chosen(files: Iterable[Path], rng: random.Random) -> list[Path]:
    """Choose one file, or sometimes two; those that say the most are likelier."""
    paths = sorted(files)
    likely = {"manifest.json": 5, "policy.json": 5, "config.json": 5, "tokenizer.json": 3}
    weights = [likely.get(path.name, 2 if path.suffix in (".json", ".safetensors") else 1) for path in paths]
    return list(dict.fromkeys(rng.choices(paths, weights, k=rng.choice((1, 1, 1, 2)))))


class Campaign:
    """Damages inputs, runs commands on them, and keeps those that fail."""

    def __init__(self, made: Server, inputs: Inputs, seed: int, keep: Path | None = None) -> None:
        self._server, self._inputs, self._seed, self._keep = made, inputs, seed, keep
        self._sound: dict[Any, Run] = {}
        self.failures: list[str] = []
        self.ends: Counter[str] = Counter()

    def run(self, kind: str, numbers: Iterable[int]) -> None:
        """Damage inputs of a kind, with the mutations of these numbers."""
        try_one = {"bundle": self.bundle, "checkpoint": self.checkpoint, "other": self.other}[kind]
        for number in numbers:
            with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
                label = f"{kind} --seed {self._seed} --only {number}"
                try_one(label, random.Random(label), Path(folder))

    def judge(self, label: str, what: str, run: Run, sound: Run, may_differ: bool, place: Path) -> None:
        """Count how a run ended, and keep its input if that is wrong."""
        self.ends[f"exit {run.code}" if run.code < SIGNAL else "killed"] += 1
        problem = problem_of(run, sound, may_differ)
        if problem is None:
            return
        self.fail(f"{what}: {problem}: {run.err[-600:]}", label)
        if self._keep is not None:
            kept = self._keep / label.replace(" --", "-").replace(" ", "-")
            shutil.rmtree(kept, ignore_errors=True)
            subprocess.run(["cp", "-a", "--sparse=always", str(place), str(kept)], check=False)

    def fail(self, what: str, label: str) -> None:
        """Print a failure with the command that repeats it."""
        self.failures.append(f"{what}\nagain: PYTHONPATH=tests .venv/bin/python -m fuzz.campaign {label}")
        print(self.failures[-1], end="\n\n", flush=True)

    def bundle(self, label: str, rng: random.Random, place: Path) -> None:
        """Damage a bundle: raw, or with digests made right again, or checksums of weights, too."""
        name = rng.choice(BUNDLES)
        sound = self._inputs.bundle(name)
        bundle = link_copy(sound, place / "b")
        done = [mutate_file(path, rng) for path in chosen(bundle.iterdir(), rng)]
        how = rng.choice(("raw", "digests", "digests", "checksums"))
        right = how != "raw" and make_digests_right(bundle, spans_of(sound) if how == "checksums" else None)
        command = rng.choice(COMMANDS)
        expected = self._expected((name, command), lambda: self._on_bundle(command, sound))
        self.judge(label, f"{name}: {done}, {how}, {command}", self._on_bundle(command, bundle), expected, right, place)

    def checkpoint(self, label: str, rng: random.Random, place: Path) -> None:
        """Damage a checkpoint, compile it, and use the bundle if there is one."""
        name, args = rng.choice(sorted(CHECKPOINTS)), self._inputs.calibration
        model, made = link_copy(self._inputs.checkpoint(name), place / "m"), place / "o.dymoe"
        done = f"{name}: {[mutate_file(path, rng) for path in chosen(model.iterdir(), rng)]}"
        plain = self._inputs.checkpoint("plain")
        sound = self._expected("compiled", lambda: self._server.run("dymoe-compile", plain, "-o", place / "s", *args))
        run = self._server.run("dymoe-compile", model, "-o", made, *args)
        self.judge(label, done, run, sound, True, model)
        if (run.code in (0, 3)) != made.exists():
            self.fail(f"{done}: exit code {run.code}, and a bundle is there: {made.exists()}", label)
        if run.code == 0:
            for command in (VERIFY, COMMANDS[rng.randrange(2)]):
                self.judge(label, f"{done}, {command}", self._on_bundle(command, made), sound, True, place)

    def other(self, label: str, rng: random.Random, place: Path) -> None:
        """Damage a trace, a warm set, a session, a profile or a text, and use it."""
        name = rng.choice(sorted(self._inputs.others))
        sound, path = self._inputs.others[name], place / name
        shutil.copy(sound, place / f"sound-{name}")
        expected = self._expected(name, lambda: self._on_other(name, place / f"sound-{name}"))
        shutil.copy(sound, path)
        lines = sound.read_bytes().split(b"\n")
        if name.endswith(".jsonl") and rng.random() < 0.8:
            at = rng.randrange(len(lines) - 1)
            lines[at] = rng.choice((mutate_json, mutate_json, mutate_text))(lines[at], rng)
            path.write_bytes(b"\n".join(lines))
            done = f"{name}: line {at}"
        else:
            done = mutate_file(path, rng)
        if name == "session" and rng.random() < 0.7:
            make_session_right(path, rng)
        if path.is_fifo() and name in ("text", "calibration.jsonl"):  # a text may be a pipe, for which a run waits
            path.unlink()
        before = (
            path.read_bytes() if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 26 else b""
        )
        run = self._on_other(name, path)
        self.judge(label, done, run, expected, True, place)
        if str(path) in run.err and before and path.read_bytes() != before:
            self.fail(f"{done}: {name} was refused and changed", label)

    def _expected(self, key: Any, run: Callable[[], Run]) -> Run:
        """Return how a command ends with a sound input."""
        if key not in self._sound:
            self._sound[key] = run()
            assert self._sound[key].code == 0, (key, self._sound[key])
        return self._sound[key]

    def _on_bundle(self, command: Sequence[str], bundle: Path) -> Run:
        name, *args = command
        first, rest = (args[:1], args[1:]) if name == "dymoe-bundle" else ([], args)
        ended = self._server.run(name, *first, bundle, *rest)
        return ended._replace(out=ended.out.replace(str(bundle), "BUNDLE"), lists=command == VERIFY)

    def _on_other(self, name: str, path: Path) -> Run:
        bundle, run = self._inputs.bundle("plain"), self._server.run
        commands: dict[str, tuple[object, ...]] = {
            "trace.jsonl": ("dymoe-bundle", "replay", bundle, path, *SMALL),
            "decisions.jsonl": ("dymoe-run", bundle, *GENERATE, "--decisions", path),
            "warm.json": ("dymoe-run", bundle, *GENERATE, *SMALL, "--warm-set", path),
            "session": ("dymoe-run", bundle, *CHAT, "--session", path),
            "text": ("dymoe-run", bundle, "--eval", path, "--context", 64, "--threads", 1),
            "profile.toml": ("dymoe-compile", bundle, "-o", path.parent / "o", "--profile", path),
        }
        if name == "profile.toml" and path.name.startswith("sound"):  # a bundle is no checkpoint, which is said next
            return run("dymoe-bundle", "inspect", bundle)
        if name == "calibration.jsonl":
            model, output = self._inputs.checkpoint("plain"), path.parent / f"{path.name}.dymoe"
            flags = ("--calibration", path, "--calibration-tokens", 512, "--jobs", 1)
            return run("dymoe-compile", model, "-o", output, *flags)
        command, *args = commands[name]
        return run(str(command), *args)


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("dymoe-run", *GENERATE),
    ("dymoe-run", *GENERATE, *SMALL),
    ("dymoe-run", *CHAT),
    VERIFY,
    ("dymoe-bundle", "inspect", "--json"),
)


def spans_of(bundle: Path) -> Sequence[int]:
    """Return the bytes of the segments of a record."""
    from dymoe_runtime.bundle.bundle import Bundle

    return Bundle.open(bundle).layout.segment_spans


def main() -> None:
    """Run a campaign as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("bundle", "checkpoint", "other"))
    parser.add_argument("count", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--only", type=int, help="number of one mutation, to repeat it")
    options: Any = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    keep = Path("build") / "fuzz"
    keep.mkdir(parents=True, exist_ok=True)
    numbers = range(options.start, options.start + options.count) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory() as folder, server() as made:
        campaign = Campaign(made, Inputs(Path(folder), made), options.seed, keep)
        campaign.run(options.kind, numbers)
    ends = ", ".join(f"{count} {end}" for end, count in sorted(campaign.ends.items()))
    print(f"{options.kind}, seed {options.seed}: {len(numbers)} mutations, {len(campaign.failures)} failures; {ends}")
    sys.exit(bool(campaign.failures))


if __name__ == "__main__":
    main()
