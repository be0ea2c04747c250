"""A bundle is loaded by options that fit it; what contradicts it is a DymoeError, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reader_threads

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine import load as load_module
from dymoe_runtime.engine.load import load_model, load_scorer
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.process import machine_limit

MIB = 1 << 20

# Of the tiny bundle: points of 2 to 4 bits, a context of 256, and tiers 2, 3 and 4.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a point above all": ({"point": "9"}, ("--point 9", "2 to 4 bits", "uniform-4")),
    "a point below all": ({"point": "0.5"}, ("--point 0.5", "2 to 4 bits")),
    "a name of no point": ({"point": "uniform-9"}, ("--point uniform-9", "uniform-4")),
    "no number": ({"point": "fast"}, ("--point fast", "uniform-4")),
    "not a number": ({"point": "nan"}, ("--point nan", "2 to 4 bits")),
    "a tier that is not there": ({"tier": 5}, ("--tiers 5", "2, 3, 4")),
    "a quality that no point has": ({"quality": 1e-9}, ("--quality 1e-09", "the best point", "allow as much")),
    "a context beyond the model's": ({"context": 257}, ("--context 257", "256", "at most")),
    "too little memory": ({"memory_bytes": MIB}, ("1.0 MiB", "least that works is --memory")),
    "too small an arena": ({"arena_bytes": 5}, ("arena of 5 bytes", "the least that works")),
    "more memory than there is": ({"memory_bytes": machine_limit() + 1}, ("--memory", "give less")),
}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_options_that_contradict_the_bundle_are_refused(case: str, tiny_path: Path) -> None:
    options, words = CONTRADICTIONS[case]
    bundle = Bundle.open(tiny_path)
    files = open_files()
    for load in (
        lambda: load_model(bundle, RunOptions(**options)),
        lambda: load_model(tiny_path, RunOptions(**options)),
    ):
        with pytest.raises(DymoeError) as refused:
            load()
        assert "\n" not in str(refused.value)
        for word in words:
            assert word in str(refused.value), (word, str(refused.value))
    assert reader_threads() == set() and open_files() == files


@pytest.mark.parametrize("case", [name for name in CONTRADICTIONS if "arena" not in name])
def test_a_scorer_refuses_the_same(case: str, tiny_path: Path) -> None:
    options, words = CONTRADICTIONS[case]
    with pytest.raises(DymoeError) as refused:
        load_scorer(Bundle.open(tiny_path), RunOptions(**options), 16)
    assert all(word in str(refused.value) for word in words)


def test_a_failure_halfway_leaves_no_threads_and_no_files(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise DymoeError("the weights are damaged")

    monkeypatch.setattr(load_module, "BundleDense", fail)
    bundle, files = Bundle.open(tiny_path), open_files()
    for load in (lambda: load_model(bundle), lambda: load_scorer(bundle, RunOptions(), 16)):
        with pytest.raises(DymoeError, match="damaged"):
            load()
        assert reader_threads() == set() and open_files() == files


def test_a_model_ends_its_threads_and_files_when_it_is_closed(tiny_path: Path) -> None:
    files = open_files()
    with load_model(tiny_path) as model:
        assert reader_threads(2) != set() and open_files() >= files
        model.prefill([1, 2, 3])
    assert reader_threads() == set() and open_files() == files


def test_a_bundle_or_its_path_gives_the_same_model(tiny_path: Path) -> None:
    logits = []
    for bundle in (tiny_path, str(tiny_path), Bundle.open(tiny_path)):
        with load_model(bundle, RunOptions(), load_kernels()) as model:
            assert model.max_context == model.spec.max_context == 256
            assert model.point == model.bundle.policy.default_point
            logits.append(model.prefill([1, 2, 3]))
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


def test_a_point_is_found_by_its_name_or_the_nearest_bits_with_a_note(tiny_path: Path) -> None:
    policy = Bundle.open(tiny_path).policy
    for wanted in [point.name for point in policy.points]:
        with load_model(tiny_path, RunOptions(point=wanted)) as model:
            assert (model.point, model.note) == (wanted, "")
    lowest = min(policy.points, key=lambda point: point.bits_mean)
    with load_model(tiny_path, RunOptions(point="1.6")) as model:
        assert model.point == lowest.name and f"running {lowest.name}" in model.note


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a context as text": ({"context": "100"}, "context '100'"),
    "a fraction of a byte": ({"arena_bytes": 3e6}, "arena_bytes 3000000.0"),
    "a tier that is no whole number": ({"tier": 4.0}, "tier 4.0"),
    "a truth value": ({"threads": True}, "threads True"),
    "no thread": ({"threads": 0}, "--threads 0"),
    "a million threads": ({"threads": 10**6}, "--threads 1000000"),
    "bits of no cache": ({"kv_bits": 7}, "--kv-bits 7"),
    "a context of one": ({"context": 1}, "--context 1"),
    "a decay below one": ({"decay": 0.5}, "--decay 0.5"),
    "a decay that is no number": ({"decay": float("nan")}, "--decay nan"),
    "an eviction that nobody knows": ({"eviction": "random"}, "--eviction random"),
    "two ways to choose": ({"tier": 2, "point": "3"}, "exclude each other"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_no_bundle_takes_are_refused(case: str) -> None:
    options, words = BAD_OPTIONS[case]
    with pytest.raises(DymoeError, match=re.escape(words)):
        RunOptions(**options)


def test_paths_may_be_text(tiny_path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with load_model(str(tiny_path), RunOptions(trace=str(trace), context=16)) as model:  # type: ignore[arg-type]
        model.prefill([1, 2, 3])
    assert trace.read_text().endswith("\n")
    for options in ({"trace": str(tmp_path)}, {"decisions": str(tmp_path / "nothing")}):
        with pytest.raises(DymoeError, match=re.escape(next(iter(options.values())))):
            load_model(tiny_path, RunOptions(**options))  # type: ignore[arg-type]


def test_a_closed_model_says_so(tiny_path: Path) -> None:
    with load_model(tiny_path, RunOptions(context=16)) as model:
        model.prefill([1, 2, 3])
    for use in (lambda: model.decode(1), lambda: model.prefill([1]), model.preload):
        with pytest.raises(DymoeError, match="closed"):
            use()


def test_a_prompt_is_any_sequence_of_whole_numbers(tiny_path: Path) -> None:
    with load_model(tiny_path, RunOptions(context=16, prefetch=False)) as model:
        logits = model.prefill([1, 2, 3])
        assert model.tokens == [1, 2, 3] and model.reset(1) == 1 and model.tokens == [1]
        model.reset()
        np.testing.assert_array_equal(model.prefill(np.array([1, 2, 3])), logits)  # type: ignore[arg-type]
        with pytest.raises(DymoeError, match="empty"):
            model.prefill([])
        with pytest.raises(TypeError):
            model.reset(1.5)  # type: ignore[arg-type]
        assert model.position == 3


@pytest.mark.parametrize("kept", [True, False])
def test_a_decoder_beside_the_model_leaves_its_sequence_alone(kept: bool, tiny_path: Path) -> None:
    found = []
    for others in (False, True):
        with load_model(tiny_path, RunOptions(context=32)) as model:
            model.prefill([1, 2, 3])
            model.decode(4)
            if others:
                state = SequenceState(model.spec, 32)
                beside = model.decoder_without_experts()
                for token in (9, 8, 7):
                    beside.forward(np.array([token]), state)
                if not kept:
                    del state, beside
                    gc.collect()
            found.append(np.stack([model.decode(token) for token in (5, 6)]))
    np.testing.assert_array_equal(*found)


def test_a_program_chooses_whether_its_own_memory_counts(tiny_path: Path) -> None:
    own = np.ones(300 * MIB, np.uint8)  # resident
    bundle = Bundle.open(tiny_path)
    alone = RunOptions(memory_bytes=200 * MIB, context=64, count_program=False)
    with load_model(bundle, alone) as model:
        assert model.budget.floor_bytes < 200 * MIB
        assert len(model.prefill([1, 2, 3])) == bundle.spec.vocab_size
    with pytest.raises(DymoeError, match="least that works"):
        load_model(bundle, RunOptions(memory_bytes=200 * MIB, context=64))
    assert own.nbytes == 300 * MIB
