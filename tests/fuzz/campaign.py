"""Campaigns of mutations: each damaged input gets one sentence, or what is right, within bounded time and memory.

    PYTHONPATH=tests python -m fuzz.campaign bundle 5000    # make fuzz runs all three
    PYTHONPATH=tests python -m fuzz.campaign checkpoint 1000 --seed 1
    PYTHONPATH=tests python -m fuzz.campaign other 500

Prints each failure, and keeps its input in build/fuzz. The exit code is 1 if there was one.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fuzz.mutate import make_digests_right, mutate_file, mutate_json, mutate_text
from fuzz.server import CRASH, HANG, SIGNAL

# Memory of a damaged input's run beyond that of a sound one.
SPARE_BYTES = 256 << 20
# Lines on stderr beside the one of an error.
BESIDE = re.compile(r"note: .*|Warning: .*|[a-z ]+: \d+ (done in|of \d+ after) .*")
GENERATE = ("--prompt", "The river", "--max-tokens", "6", "--ignore-eos", "--threads", "1", "--context", "64")
SMALL = ("--arena", "50000")
CHAT = ("--chat", *GENERATE)


class Run(NamedTuple):
    """A command and how it ended."""

    code: int
    out: str
    err: str
    peak: int
    seconds: float = 0.0
    calls: int = 0  # that the library of tests/faults counted


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
    if run.code not in (0, 1, 3, 4) or (run.code and len(lines) != 1):
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


class Campaign:
    """Damages inputs, runs commands on them, and keeps those that fail."""

    def __init__(self, made: Server, keep: Path | None = None) -> None:
        self._server, self._keep = made, keep
        self.failures: list[str] = []
        self.ends: Counter[str] = Counter()

    def judge(self, name: str, what: str, run: Run, sound: Run | None, may_differ: bool, place: Path) -> None:
        """Count how a run ended, and keep its input if that is wrong."""
        self.ends[f"exit {run.code}" if run.code < SIGNAL else "killed"] += 1
        problem = problem_of(run, sound, may_differ)
        if problem is None:
            return
        self.failures.append(f"{name}: {what}: {problem}: {run.err[-600:]}")
        if self._keep is not None:
            kept = self._keep / name
            shutil.rmtree(kept, ignore_errors=True)
            subprocess.run(["cp", "-a", "--sparse=always", str(place), str(kept)], check=False)

    def bundles(self, sound: Path, count: int, seed: int) -> None:
        """Damage a bundle `count` times: raw, or with digests made right again, or checksums of weights, too."""
        from dymoe_runtime.bundle.bundle import Bundle

        spans = Bundle.open(sound).layout.segment_spans
        commands = (("dymoe-run", *GENERATE), ("dymoe-bundle", "verify"), ("dymoe-bundle", "inspect", "--json"))
        commands = (*commands, ("dymoe-run", *CHAT), ("dymoe-run", *GENERATE, *SMALL))

        def run(command: Sequence[str], bundle: Path) -> Run:
            name, *args = command
            first, rest = (args[:1], args[1:]) if name == "dymoe-bundle" else ([], args)
            ended = self._server.run(name, *first, bundle, *rest)
            return ended._replace(out=ended.out.replace(str(bundle), "BUNDLE"))

        names = [path.name for path in sorted(sound.iterdir())]
        weights = [
            5 if name in ("manifest.json", "policy.json") else 2 if name.endswith(".json") else 1 for name in names
        ]
        for number, (rng, place) in enumerate(places(count, seed, "bundle")):
            bundle = link_copy(sound, place / "b")
            if number == 0:
                expected = [run(command, bundle) for command in commands]
                assert all(known.code == 0 for known in (*expected[:3], expected[4])), expected
            chosen = rng.choices(names, weights, k=rng.choice((1, 1, 1, 2)))
            done = [mutate_file(bundle / name, rng) for name in dict.fromkeys(chosen)]
            how = rng.choice(("raw", "digests", "digests", "checksums"))
            right = how != "raw" and make_digests_right(bundle, spans if how == "checksums" else None)
            which = rng.randrange(len(commands))
            ended = run(commands[which], bundle)
            label = f"bundle-{seed}-{number}"
            self.judge(label, f"{done}, {how}, {commands[which]}", ended, expected[which], right, bundle)

    def checkpoints(self, sound: Path, text: Path, count: int, seed: int) -> None:
        """Damage a checkpoint `count` times and compile it."""
        expected = None
        names = [path.name for path in sorted(sound.iterdir())]
        weights = [5 if name == "config.json" else 2 if name.endswith("safetensors") else 1 for name in names]
        args = ("--calibration", text, "--calibration-tokens", 512, "--jobs", 1)
        for number, (rng, place) in enumerate(places(count, seed, "checkpoint")):
            model = link_copy(sound, place / "m")
            if expected is None:
                expected = self._server.run("dymoe-compile", model, "-o", place / "sound.dymoe", *args)
                assert expected.code == 0, expected.err
            chosen = rng.choices(names, weights, k=rng.choice((1, 1, 1, 2)))
            done = [mutate_file(model / name, rng) for name in dict.fromkeys(chosen)]
            ended = self._server.run("dymoe-compile", model, "-o", place / "o.dymoe", *args)
            self.judge(f"checkpoint-{seed}-{number}", str(done), ended, expected, True, model)

    def others(self, bundle: Path, inputs: dict[str, Path], count: int, seed: int) -> None:
        """Damage traces, warm sets and profiles `count` times, and use them."""
        commands: dict[str, Callable[[Path], Run]] = {
            "trace.jsonl": lambda path: self._server.run("dymoe-bundle", "replay", bundle, path, *SMALL),
            "decisions.jsonl": lambda path: self._server.run("dymoe-run", bundle, *GENERATE, "--decisions", path),
            "warm.json": lambda path: self._server.run("dymoe-run", bundle, *GENERATE, *SMALL, "--warm-set", path),
            "profile.toml": lambda path: self._server.run(
                "dymoe-compile", bundle, "-o", path.parent / "o", "--profile", path
            ),
        }
        for number, (rng, place) in enumerate(places(count, seed, "other")):
            name = rng.choice(sorted(commands))
            path = place / name
            lines = inputs[name].read_bytes().split(b"\n")
            if name.endswith(".jsonl") and rng.random() < 0.8:
                at = rng.randrange(len(lines) - 1)
                lines[at] = rng.choice((mutate_json, mutate_json, mutate_text))(lines[at], rng)
                path.write_bytes(b"\n".join(lines))
                done = f"{name}: line {at}"
            else:
                path.write_bytes(inputs[name].read_bytes())
                done = mutate_file(path, rng)
            self.judge(f"other-{seed}-{number}", done, commands[name](path), None, True, place)


def places(count: int, seed: int, name: str) -> Iterator[tuple[random.Random, Path]]:
    """Yield `count` generators of random numbers, and an empty directory for each."""
    for number in range(count):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            yield random.Random(f"{name}-{seed}-{number}"), Path(folder)


def make_inputs(folder: Path, made: Server) -> tuple[Path, Path, Path, dict[str, Path]]:
    """Make a tiny checkpoint, a text to calibrate with, the compiled bundle, and a trace, a warm set and a profile."""
    from helpers import EXAMPLES, save_tiny

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "moe_intermediate_size": 32, "num_experts": 4, "head_dim": 8}
    model = save_tiny(folder / "model", "qwen3_moe", vocab_size=256, **sizes)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    text = folder / "text.txt"
    text.write_text((EXAMPLES / "calibration" / "wiki.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    bundle = folder / "sound.dymoe"
    args = ("--calibration", text, "--calibration-tokens", 512, "--jobs", 1)
    run = made.run("dymoe-compile", model, "-o", bundle, *args)
    assert run.code == 0, run.err
    inputs = {name: folder / name for name in ("trace.jsonl", "decisions.jsonl", "warm.json", "profile.toml")}
    run = made.run(
        "dymoe-run", bundle, *GENERATE, *SMALL, "--trace", inputs["trace.jsonl"], "--warm-set", inputs["warm.json"]
    )
    assert run.code == 0, run.err
    shutil.copy(inputs["trace.jsonl"], inputs["decisions.jsonl"])
    shutil.copy(Path(__file__).parents[2] / "profiles" / "laptop-8gb.toml", inputs["profile.toml"])
    return model, text, bundle, inputs


def main() -> None:
    """Run a campaign as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("bundle", "checkpoint", "other"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args()
    keep = Path("build") / "fuzz"
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, server() as made:
        model, text, bundle, inputs = make_inputs(Path(folder), made)
        campaign = Campaign(made, keep)
        if options.kind == "bundle":
            campaign.bundles(bundle, options.count, options.seed)
        elif options.kind == "checkpoint":
            campaign.checkpoints(model, text, options.count, options.seed)
        else:
            campaign.others(bundle, inputs, options.count, options.seed)
    for failure in campaign.failures:
        print(failure, end="\n\n")
    ends = ", ".join(f"{count} {end}" for end, count in sorted(campaign.ends.items()))
    print(f"{options.kind}, seed {options.seed}: {options.count} mutations, {len(campaign.failures)} failures; {ends}")
    sys.exit(bool(campaign.failures))


if __name__ == "__main__":
    main()
