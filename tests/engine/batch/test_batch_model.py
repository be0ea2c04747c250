"""Sequences that run together give the bits of each alone, and a prompt may begin with what another one left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families.cases_recurrent import CASES
from families.harness import random_model
from helpers import compiled, save_byte_tokenizer
from kernel_kit import ALL, kernels_of

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine import load as load_module
from dymoe_runtime.engine.batch.load import load_batch
from dymoe_runtime.engine.batch.model import BatchModel, BatchPrompt
from dymoe_runtime.engine.batch.sequence import Known
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.memory_plan import plan_budget, sequence_bytes, sequences_that_fit
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.store.arena import min_arena_bytes

# Tokens of a chunk, few enough for several in the context.
CHUNK = 16
G = np.random.default_rng(5)
PROMPTS = [G.integers(1, 97, count).tolist() for count in (40, 3, 17, 1, 64, 33)]
ANSWER = [5, 6, 7]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations take so little that a pass has many chunks where experts must be read."""

    def plan(*args: object, **kwargs: object) -> Budget:
        return replace(plan_budget(*args, **kwargs), chunk_tokens=CHUNK, chunk_bytes=1)  # type: ignore[arg-type]

    monkeypatch.setattr(load_module, "plan_budget", plan)


@pytest.fixture(scope="module")
def recurrent_path(calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose layers keep a state that cannot be cut."""
    directory = tmp_path_factory.mktemp("recurrent")
    case = next(case for case in CASES if case.name == "hybrid")
    random_model(case, vocab_size=256).save_pretrained(directory / "model")
    save_byte_tokenizer(directory / "model")
    return compiled(directory / "model", directory / "it.dymoe", calibration_text)


@pytest.fixture(params=["attention", "recurrent"])
def path(request: pytest.FixtureRequest, tiny_path: Path) -> Path:
    return tiny_path if request.param == "attention" else request.getfixturevalue("recurrent_path")


def alone(path: Path, options: RunOptions, prompts: Sequence[Sequence[int]], kernels: str) -> list[list[np.ndarray]]:
    """The logits after each prompt and after each token of an answer, in a model of one sequence."""
    found = []
    with load_model(path, options, kernels_of(kernels)) as model:
        for ids in prompts:
            model.reset()
            found.append([model.prefill(ids), *(model.decode(token) for token in ANSWER)])
    return found


def run_prompts(model: BatchModel, prompts: Sequence[BatchPrompt], pause: Callable[[], None] = lambda: None) -> None:
    """Run prompts to their ends, as many together as a pass takes."""
    while left := [prompt for prompt in prompts if prompt.left and not model.is_token(prompt)]:
        model.prefill(left, model.pass_tokens(sum(len(prompt.left) for prompt in left)), pause)
    if tokens := [prompt for prompt in prompts if prompt.left]:
        logits = model.decode([prompt.sequence for prompt in tokens], [prompt.left[0] for prompt in tokens])
        for prompt, row in zip(tokens, logits, strict=True):
            prompt.logits, prompt.left = row.copy(), []
            prompt.sequence.note_prompt(prompt.logits)


def answered(model: BatchModel, ids: Sequence[int], sequence: int = 0) -> list[np.ndarray]:
    """The logits of one prompt, from what its sequence has, and of an answer."""
    prompt = model.prompt(model.sequences[sequence], ids)
    run_prompts(model, [prompt])
    assert prompt.logits is not None
    return [prompt.logits, *(model.decode([prompt.sequence], [token])[0].copy() for token in ANSWER)]


def assert_same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> None:
    assert len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("point", [None, "2.5"])
def test_sequences_together_give_the_bits_of_each_alone(name: str, point: str | None, path: Path) -> None:
    """Some run while others' prompts pause; experts are read in turn, because few are in memory."""
    bundle = Bundle.open(path)
    arena = min_arena_bytes(bundle.layout) + bundle.expert_bytes() // 3
    options = RunOptions(context=128, arena_bytes=arena, point=point)
    expected = alone(path, options, PROMPTS, name)
    with load_batch(bundle, len(PROMPTS), options, kernels_of(name)) as model, model.running():
        prompts = [model.prompt(s, ids) for s, ids in zip(model.sequences, PROMPTS, strict=True)]
        run_prompts(model, prompts[:2])
        early, late = prompts[:2], prompts[2:]
        found = [[prompt.logits] for prompt in prompts]

        def pause() -> None:
            """Tokens of the two that have run, one at each pause."""
            step = len(found[0]) - 1
            if step < len(ANSWER):
                for logits, row in zip(
                    found, model.decode([p.sequence for p in early], [ANSWER[step]] * 2), strict=False
                ):
                    logits.append(row.copy())

        run_prompts(model, late, pause)
        assert len(found[0]) == 1 + len(ANSWER)
        for n in range(2, len(prompts)):
            found[n] = [prompts[n].logits]
        for token in ANSWER:
            for logits, row in zip(found[2:], model.decode([p.sequence for p in late], [token] * 4), strict=True):
                logits.append(row.copy())
        model.store.check()
    for a, b in zip(found, expected, strict=True):
        assert_same([logits for logits in a if logits is not None], b)


def test_a_prompt_begins_with_whole_chunks_of_another(path: Path) -> None:
    options, first = RunOptions(context=128, point="2.5"), PROMPTS[4][:40]
    others = [[*first[:35], 1, 2, 3], [*first, 4], first, first[:9]]
    expected = alone(path, options, others, ALL[0])
    for n, ids in enumerate(others):
        count = [32, 32, 40, 0][n]  # an equal prompt needs nothing to be computed, unless its end cannot be cut
        with load_batch(path, 2, options, kernels_of(ALL[0])) as model, model.running():
            one, other = model.sequences
            answered(model, first)
            count = min(count, 32) if model.is_recurrent else count
            assert [one.reusable(ids), other.reusable(ids)] == [count, 0]
            if count:
                other.begin_with(one, count)
                assert other.tokens == first[:count] and other.reusable(ids) == count
            assert_same(answered(model, ids, 1), expected[n])
            assert one.cut(count) == count
            assert_same(answered(model, ids, 0), expected[n])


def test_a_conversation_goes_on_where_it_was(path: Path) -> None:
    options, more = RunOptions(context=128, point="2.5"), [9, 8, 7, 6]
    whole = [*PROMPTS[0], *ANSWER, *more]
    with load_model(path, options, kernels_of(ALL[0])) as model:
        model.prefill(PROMPTS[0])
        for token in ANSWER:
            model.decode(token)
        expected = [model.prefill(more), *(model.decode(token) for token in ANSWER)]
    with load_batch(path, 2, options, kernels_of(ALL[0])) as model, model.running():
        answered(model, PROMPTS[0])
        one, other = model.sequences
        assert one.reusable(whole) == len(whole) - len(more)
        assert one.reusable(whole[:41]) == 32  # all but the last token of a prompt may be had, and it is no whole chunk
        other.begin_with(one, one.length)
        assert_same(answered(model, whole, 1), expected)
        assert_same(answered(model, whole, 0), expected)


def test_a_pass_that_fails_leaves_the_passes_before(path: Path) -> None:
    options = RunOptions(context=128, point="2.5")
    expected = alone(path, options, [PROMPTS[4]], ALL[0])[0]
    with load_batch(path, 1, options, kernels_of(ALL[0])) as model, model.running():
        (sequence,) = model.sequences
        prompt = model.prompt(sequence, PROMPTS[4])
        model.prefill([prompt], CHUNK, lambda: None)
        assert sequence.length == CHUNK and len(prompt.left) == 48

        def fail() -> None:
            raise DymoeError("enough")

        with pytest.raises(DymoeError, match="enough"):
            model.prefill([prompt], CHUNK, fail)
        assert sequence.length == (0 if model.is_recurrent else CHUNK)
        assert_same(answered(model, PROMPTS[4]), expected)
        model.store.check()
        assert not model.store.leased()


def test_a_sequence_is_saved_and_restored(path: Path, tmp_path: Path) -> None:
    options, ids = RunOptions(context=128, point="2.5"), PROMPTS[0]
    more = [[*ids, *ANSWER, 8, 9], [*ids[:32], 1, 2]]
    expected = alone(path, options, more[1:], ALL[0])[0]
    with load_batch(path, 2, options, kernels_of(ALL[0])) as model, model.running():
        first = answered(model, ids)
        model.save_state(model.sequences[0], tmp_path / "one")
        on = answered(model, more[0])
        assert model.saved_tokens(tmp_path / "one") == Known([*ids, *ANSWER], 32, 40)
        model.load_state(model.sequences[1], tmp_path / "one")
        assert model.sequences[1].reusable(more[0]) == 43
        assert_same(answered(model, more[0], 1), on)
        assert len(first) == len(on)
        model.load_state(model.sequences[0], tmp_path / "one")
        count = model.sequences[0].reusable(more[1])
        assert count == (0 if model.is_recurrent else 32) == model.sequences[0].cut(count)
        assert_same(answered(model, more[1]), expected)
        (tmp_path / "one").write_bytes((tmp_path / "one").read_bytes()[:-1])
        with pytest.raises(DymoeError, match="damaged"):
            model.load_state(model.sequences[0], tmp_path / "one")


def test_the_budget_has_room_for_all_sequences(path: Path) -> None:
    bundle, kernels = Bundle.open(path), kernels_of(ALL[0])
    spec = bundle.spec
    one, more = (plan_budget(bundle, kernels, 128, 1 << 30, process_bytes=0, sequences=n) for n in (1, 5))
    assert more.state_bytes == 5 * one.state_bytes == 5 * sequence_bytes(spec, 128, 16)
    assert more.workspace_bytes > one.workspace_bytes
    each, long = sequence_bytes(spec, 1 << 19, 16), 1 << 19
    memories = (0, 8 * each, 24 * each, 999 * each)
    assert [sequences_that_fit(bundle, kernels, long, 16, memory) for memory in memories] == [1, 1, 3, 4]
    floors = [plan_budget(bundle, kernels, long, 0, sequences=n).floor_bytes for n in (1, 2)]
    assert floors[0] < floors[1] and sequences_that_fit(bundle, kernels, long, 16, floors[0]) == 1


def test_tokens_together_wait_as_little_as_one_token_with_latency(tiny_path: Path) -> None:
    """While nothing is in memory, all but the highest tier run at the lowest; those are read for the next time."""
    bundle = Bundle.open(tiny_path)
    shares = []
    for latency in (False, True):
        options = RunOptions(context=64, point="3", latency=latency, prefetch=False, preload=False)
        with load_batch(bundle, 3, options) as model, model.running():
            model.decode(model.sequences, [1, 2, 3])
            shares.append(model.statistics()["tier_shares"])
    lowest = str(bundle.manifest.ladder[0])
    assert shares[1][lowest] > shares[0].get(lowest, 0) and sum(shares[1].values()) == pytest.approx(1)
