"""dymoe-compile as a command: what it refuses before it loads PyTorch, what it says meanwhile, and what it prints."""

from __future__ import annotations

import io
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from compile_kit import STAGE_DONE, STAGE_UNDER_WAY
from helpers import Outcome, assert_one_sentence, compile_cli

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.console import LINE_INTERVAL_S, json_progress, stage_progress

# Runs dymoe-compile where importing torch is an error, and prints what was tried all the same.
WITHOUT_TORCH = """
import sys
tried = []

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            tried.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
from dymoe_compile.__main__ import main
try:
    main()
finally:
    print("torch" in sys.modules, *tried)
"""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tiers", "4,2"), ("--tiers", "4,2")),
        (("--tiers", "1,2"), ("--tiers",)),
        (("--tiers", "four"), ("--tiers", "four")),
        (("--dense-bits", 3), ("--dense-bits",)),
        (("--profile", "toaster"), ("toaster", "laptop-8gb")),
        (("--max-kl", "nan"), ("--max-kl",)),
    ],
)
def test_bad_options_get_one_sentence(flags: tuple, words: tuple, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert_one_sentence(compile_cli(tiny_checkpoint, "-o", tmp_path / "o.dymoe", *flags), *words)


def test_an_unknown_flag_and_a_missing_output_are_usage_errors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    unknown, missing = (
        compile_cli(tiny_checkpoint, "-o", tmp_path / "o.dymoe", "--frobnicate"),
        compile_cli(tiny_checkpoint),
    )
    assert (unknown.code, missing.code) == (2, 2)
    assert "--frobnicate" in unknown.err and "Missing option '-o'" in missing.err


# Without PyTorch


def without_torch(*args: object) -> Outcome:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


def nothing(path: Path, bundle: Path) -> Path:
    return path / "nowhere"


def a_file(path: Path, bundle: Path) -> Path:
    (path / "model.safetensors").write_bytes(b"x")
    return path / "model.safetensors"


def an_empty_directory(path: Path, bundle: Path) -> Path:
    return path


def a_bundle(path: Path, bundle: Path) -> Path:
    return bundle


def a_gguf_file(path: Path, bundle: Path) -> Path:
    (path / "olmoe-q4_k_m.gguf").write_bytes(b"GGUF")
    return path


def another_family(path: Path, bundle: Path) -> Path:
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def no_weights(path: Path, bundle: Path) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": "mixtral", **MIXTRAL}))
    return path


MIXTRAL = {
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
NO_CHECKPOINT = "this is no Hugging Face checkpoint"
WRONG: list[tuple[Callable[[Path, Path], Path], tuple[str, ...]]] = [
    (nothing, ("nowhere", "no such directory")),
    (a_file, ("model.safetensors", "not a directory")),
    (an_empty_directory, (NO_CHECKPOINT, "config.json", "give the directory")),
    (a_bundle, (NO_CHECKPOINT, "it is a bundle already", "dymoe-run")),
    (a_gguf_file, (NO_CHECKPOINT, "GGUF files are quantized already")),
    (another_family, ("model_type 'llama' is not supported", "llama4", "dymoe-compile --supported")),
    (no_weights, ("neither model.safetensors nor model.safetensors.index.json",)),
]


@pytest.mark.parametrize(("make", "words"), WRONG, ids=[make.__name__ for make, _ in WRONG])
def test_what_is_wrong_with_a_model_directory_is_said_without_torch(
    make: Callable[[Path, Path], Path], words: tuple[str, ...], tiny_path: Path, tmp_path: Path
) -> None:
    outcome = without_torch(make(tmp_path, tiny_path), "-o", tmp_path / "out.dymoe")
    assert_one_sentence(outcome, "dymoe-compile: ", *words)
    assert outcome.out == "False\n"
    assert not (tmp_path / "out.dymoe").exists()


def test_without_torch_a_good_checkpoint_gets_one_sentence_that_names_the_extra(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    outcome = without_torch(tiny_checkpoint, "-o", tmp_path / "out.dymoe")
    assert_one_sentence(outcome, "pip install 'dymoe[compile]'", "torch")
    assert outcome.out == "False torch\n"
    assert not (tmp_path / "out.dymoe").exists()


def test_help_and_wrong_usage_need_no_torch() -> None:
    shown, wrong = without_torch("--help"), without_torch("model", "-o", "out.dymoe", "--frobnicate")
    assert (shown.code, wrong.code) == (0, 2)
    assert "--calibration" in shown.out and "--frobnicate" in wrong.err
    assert shown.out.splitlines()[-1] == wrong.out.strip() == "False"


# On a pipe


@dataclass(frozen=True)
class Piped:
    """How a compilation of the tiny checkpoint with --json went, stdout and stderr of which were pipes."""

    outcome: Outcome
    seconds: float
    bundle: Path


@pytest.fixture(scope="module")
def piped(tiny_checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Piped:
    path = tmp_path_factory.mktemp("piped") / "out.dymoe"
    args = [str(tiny_checkpoint), "-o", str(path), "--calibration", str(calibration_text), "--json"]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "dymoe_compile", *args], capture_output=True, text=True, timeout=300)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    return Piped(Outcome(done.returncode, done.stdout, done.stderr), seconds, path)


def test_on_a_pipe_each_stage_is_one_line_with_the_time_that_it_took(piped: Piped) -> None:
    lines = piped.outcome.err.splitlines()
    stages = [stage for line in lines if not STAGE_UNDER_WAY.fullmatch(line) for stage in [STAGE_DONE.fullmatch(line)]]
    assert None not in stages, piped.outcome.err
    found = {stage["title"]: (int(stage["total"]), float(stage["seconds"])) for stage in stages if stage}
    titles = ["reading", "dense weights", "experts", "dense bits"]
    titles += ["dense weights", "sensitivity", "operating points", "prompt reading"]
    assert [stage["title"] for stage in stages if stage] == titles
    spec = Bundle.open(piped.bundle).spec
    assert found["experts"][0] == spec.total_experts
    assert found["dense weights"][0] == len(spec.tensor_shapes())
    assert {found[title][0] for title in titles[5:]} == {spec.num_layers}
    # Each is rounded to a tenth.
    assert sum(seconds for _, seconds in found.values()) <= piped.seconds + 0.05 * len(titles)


def test_json_is_one_object_and_all_that_stdout_has(
    piped: Piped, tiny_checkpoint: Path, calibration_text: Path
) -> None:
    """Of a bundle that is compiled, and of one that is up to date."""
    again = compile_cli(tiny_checkpoint, "-o", piped.bundle, "--calibration", calibration_text, "--json")
    assert again.code == 0, again.err
    for text, changed in ((piped.outcome.out, True), (again.out, False)):
        assert text.count("\n") == 1 and text.endswith("}\n")
        values = json.loads(text)
        assert isinstance(values, dict) and values["changed"] is changed
        assert values["provenance"] == dict(Bundle.open(piped.bundle).manifest.provenance)


class SteppedEvent:
    """An event whose waiting ends, as if its time were up, where a test says so."""

    def __init__(self) -> None:
        self.intervals: list[float] = []
        self._is_set: queue.Queue[bool] = queue.Queue()
        self._waiting = threading.Semaphore(0)

    def wait(self, timeout: float) -> bool:
        self.intervals.append(timeout)
        self._waiting.release()
        return self._is_set.get(timeout=60)

    def set(self) -> None:
        self._is_set.put(True)

    def let_time_pass(self) -> None:
        """End one wait, and return once the next has begun."""
        assert self._waiting.acquire(timeout=60)
        self._is_set.put(False)
        assert self._waiting.acquire(timeout=60)
        self._waiting.release()


@dataclass
class Clock:
    """The time that the console sees, and the event that its lines wait for."""

    now: float
    event: SteppedEvent

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(1000.0, SteppedEvent())
    monkeypatch.setattr(
        "dymoe_runtime.console.threading", SimpleNamespace(Event=lambda: made.event, Thread=threading.Thread)
    )
    monkeypatch.setattr("dymoe_runtime.console.time", made)
    return made


def test_a_long_stage_says_at_intervals_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with stage_progress("experts", 3) as advance:
        clock.now += 30.0
        clock.event.let_time_pass()
        advance()
        advance()
        clock.now += 30.4
        clock.event.let_time_pass()
        advance()
        clock.now += 5.25
    expected = ["experts: 0 of 3 after 30 s", "experts: 2 of 3 after 60 s", "experts: 3 done in 65.7 s"]
    said = capsys.readouterr()
    assert said.err.splitlines() == expected and said.out == ""
    assert set(clock.event.intervals) == {LINE_INTERVAL_S} and 1 <= LINE_INTERVAL_S <= 60


def test_progress_as_json_is_one_object_a_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with json_progress("experts", 3) as advance:
        clock.now += 30.0
        advance()
        clock.event.let_time_pass()
        advance()
        advance()
        clock.now += 5.25
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["done"], line["elapsed_s"]) for line in said] == [(0, 0.0), (1, 30.0), (3, 35.25)]
    assert all((line["stage"], line["total"]) == ("experts", 3) for line in said)


def test_progress_as_json_of_a_compilation(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> None:
    args = ("--calibration", calibration_text, "--progress", "json", "--json")
    outcome = compile_cli(tiny_checkpoint, "-o", tmp_path / "out.dymoe", *args)
    assert outcome.code == 0 and outcome.json["changed"]
    lines = [json.loads(line) for line in outcome.err.splitlines()]
    assert {"experts", "operating points"} <= {line["stage"] for line in lines if line["done"] == line["total"]}


def test_a_stage_that_fails_does_not_say_that_it_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), stage_progress("experts", 3) as advance:
        advance()
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""
    assert set(threading.enumerate()) <= before


def test_on_a_terminal_a_stage_is_a_bar_and_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with stage_progress("experts", 2) as advance:
        advance()
        advance()
    shown = terminal.getvalue()
    assert "experts" in shown and "\n" not in shown and "done in" not in shown
