"""Who may use a model: one call at a time, until it is closed, in the process that loaded it."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reader_threads

from dymoe_runtime.engine.load import load_model, load_scorer
from dymoe_runtime.engine.model import Model
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.store.residency import Residency
from dymoe_runtime.text.generate import generate
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.session import Session
from dymoe_runtime.text.tokenizer import Tokenizer

GREEDY = SamplingParams()
PROMPT = list(range(1, 40))
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")


@pytest.fixture
def model(tiny_path: Path) -> Iterator[Model]:
    with load_model(tiny_path, RunOptions(context=128)) as loaded:
        yield loaded


def in_thread(call: Callable[[], object]) -> list[BaseException]:
    """Run a call in another thread; return what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return raised


CALLS: dict[str, Callable[[Model], object]] = {
    "prefill": lambda model: model.prefill([1]),
    "decode": lambda model: model.decode(1),
    "reset": lambda model: model.reset(),
    "preload": lambda model: model.preload(),
    "use": lambda model: model.use("same", model.rule),
    "save_state": lambda model: model.save_state("/nowhere/state"),
    "load_state": lambda model: model.load_state("/nowhere/state"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_while_another_runs_is_refused_and_changes_nothing(name: str, model: Model) -> None:
    whole = model.prefill(PROMPT)
    model.reset()
    raised = []

    def during() -> bool:
        if not raised:
            raised.extend(in_thread(lambda: CALLS[name](model)))
        return False

    model.interrupt_when(during)
    np.testing.assert_array_equal(model.prefill(PROMPT), whole)
    assert [type(error) for error in raised] == [DymoeError] and "in use by another call" in str(raised[0])


@pytest.mark.parametrize("name", CALLS)
def test_a_call_after_closing_is_refused(name: str, model: Model) -> None:
    model.close()
    with pytest.raises(DymoeError, match="the model is closed; load it again"):
        CALLS[name](model)
    model.close()


def test_a_scorer_is_for_one_call_too(tiny_path: Path) -> None:
    with load_scorer(tiny_path, window=16) as scorer:
        scorer.hidden([1, 2, 3])
    with pytest.raises(DymoeError, match="the scorer is closed"):
        scorer.hidden([1, 2, 3])


def test_a_model_that_is_closed_in_mid_pass_ends_it_and_leaves_no_threads(model: Model) -> None:
    closing = threading.Thread(target=model.close)

    def during() -> bool:
        if closing.ident is None:
            closing.start()
            while model._access._closed is False:
                threading.Event().wait(0.001)
        return False

    model.interrupt_when(during)
    with pytest.raises(DymoeError, match="closed while it was in use"):
        model.prefill(PROMPT)
    closing.join(30)
    assert not closing.is_alive() and not reader_threads()


def test_a_model_that_closes_itself_in_mid_pass_is_freed_at_its_end(model: Model) -> None:
    def during() -> bool:
        model.close()
        return False

    model.interrupt_when(during)
    with pytest.raises(DymoeError, match="closed while it was in use"):
        model.prefill(PROMPT)
    assert not reader_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", [0, 3, 11])
def test_a_model_is_refused_once_something_has_ended_a_call_in_the_middle(
    place: int, error: type[BaseException], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, for instance, wherever it strikes."""
    real, calls = Residency.reap, itertools.count()

    def reap(self: Residency[Any]) -> None:
        real(self)
        if next(calls) == place:
            raise error

    monkeypatch.setattr(Residency, "reap", reap)
    with pytest.raises(error):
        for _ in range(20):
            model.reset()
            model.prefill(PROMPT)
    for call in CALLS.values():
        with pytest.raises(DymoeError, match=f"since {error.__name__} ended a call in the middle; load it again"):
            call(model)
    model.close()
    assert not reader_threads()


def test_threads_that_generate_on_one_model_are_right_or_refused(tiny_path: Path) -> None:
    """Never with tokens of the other's sequence."""
    with load_model(tiny_path, RunOptions(context=128, point="3")) as model:
        tokenizer, prompts = Tokenizer.of(model), ("abc", "xyz")

        def answer(prompt: str) -> list[int]:
            tokens = generate(model, tokenizer, prompt, GREEDY, 40, ignore_eos=True)
            return [token.id for token in tokens]

        alone = {}
        for prompt in prompts:
            alone[prompt] = answer(prompt)
            model.reset()
        for _ in range(10):
            found: dict[str, list[int] | str] = {}

            def run(prompt: str, found: dict[str, list[int] | str] = found) -> None:
                try:
                    found[prompt] = answer(prompt)
                except DymoeError as error:
                    found[prompt] = str(error)

            threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            refused = [text for text in found.values() if isinstance(text, str)]
            assert all("another call" in text for text in refused)
            # One that begins when the other has ended goes on where that stopped.
            first = next(iter(found))
            assert len(found) == 2 and (refused or found[first] == alone[first])
            model.reset()


def test_generators_that_run_by_turns_on_one_model_are_refused(model: Model) -> None:
    tokenizer = Tokenizer.of(model)
    first, second = (generate(model, tokenizer, prompt, GREEDY, 20, ignore_eos=True) for prompt in ("abc", "abd"))
    next(first)
    next(second)
    with pytest.raises(DymoeError, match="changed by another call"):
        next(first)
    assert len(list(second)) == 19  # which follows what the first one has left


def test_a_reset_in_mid_answer_is_refused_even_if_the_sequence_is_as_long_again(model: Model) -> None:
    answer = generate(model, Tokenizer.of(model), [1, 2, 3], GREEDY, 20, ignore_eos=True)
    next(answer)
    model.reset()
    model.prefill([4, 5, 6])
    with pytest.raises(DymoeError, match="changed by another call"):
        next(answer)


def test_sessions_that_answer_by_turns_on_one_model_are_refused(shipped_path: Path) -> None:
    with load_model(shipped_path, RunOptions(context=256, point="3")) as model:
        params: dict[str, Any] = {"params": GREEDY, "max_tokens": 8, "ignore_eos": True}
        answers = [Session(model).reply(text, **params) for text in ("Hello", "Hallo")]
        for answer in answers:
            next(answer)
        with pytest.raises(DymoeError, match="changed by another call"):
            next(answers[0])
        session = Session(model)
        alone = [token.id for token in session.reply("Hallo", **params)]
        session = Session(model)
        list(session.reply("Hello", **params))
        session.clear()
        assert [token.id for token in session.reply("Hallo", **params)] == alone


def test_an_abandoned_generator_that_another_thread_collects_harms_nothing(model: Model) -> None:
    tokenizer, prompt = Tokenizer.of(model), "abc"
    alone = [token.id for token in generate(model, tokenizer, prompt, GREEDY, 20, ignore_eos=True)]
    model.reset()
    held: list[object] = [generate(model, tokenizer, "left", GREEDY, 20, ignore_eos=True)]
    next(held[0])  # type: ignore[call-overload]

    def collect() -> None:
        held.clear()
        gc.collect()

    assert not in_thread(collect)
    model.reset()
    assert [token.id for token in generate(model, tokenizer, prompt, GREEDY, 20, ignore_eos=True)] == alone


def told(model: Model, call: Callable[[Model], object]) -> str:
    """What a call raises, as text."""
    try:
        call(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def answer_of_child(report: Callable[[], str]) -> str:
    """What `report` returns in a forked child, which has a minute."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            os.write(writing, report().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        found = pipe.read().decode()
    os.waitpid(child, 0)
    return found


@needs_fork
@pytest.mark.parametrize("name", CALLS)
def test_a_model_in_a_forked_child_is_refused(name: str, model: Model) -> None:
    first = model.prefill(PROMPT)
    assert "was forked; load it again" in answer_of_child(lambda: told(model, CALLS[name]))
    assert answer_of_child(lambda: told(model, lambda model: model.close())) == "nothing"
    model.reset()
    np.testing.assert_array_equal(model.prefill(PROMPT), first)


@needs_fork
@pytest.mark.parametrize("isa", ["", "numpy", "torch"])
def test_a_forked_child_loads_a_model_of_its_own(isa: str, tiny_path: Path) -> None:
    """While a thread of the parent generates, too."""
    script = FORKING.format(path=str(tiny_path))
    environment = {**os.environ, **({"DYMOE_ISA": isa} if isa else {})}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "same\n", "")


FORKING = """
import os, threading
import numpy as np
from dymoe_runtime import RunOptions, load_model
options = RunOptions(context=64, tier=4, threads=2)
def answer(model):
    model.reset()
    return np.stack([model.prefill(list(range(1, 40))), model.decode(1), model.decode(2)])
with load_model("{path}", options) as model:
    first, go_on = answer(model), threading.Event()
    def generate():
        while not go_on.is_set():
            assert np.array_equal(answer(model), first)
    thread = threading.Thread(target=generate)
    thread.start()
    for number in range(4):
        child = os.fork()
        if not child:
            with load_model("{path}", options) as own:
                os._exit(0 if np.array_equal(answer(own), first) else 9)
        assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    thread.join()
    assert np.array_equal(answer(model), first)
print("same")
"""


@needs_fork
def test_a_worker_of_multiprocessing_is_refused_and_one_of_its_own_answers(tiny_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with load_model(tiny_path, RunOptions(context=64, tier=4)) as model:
        expected = model.prefill(PROMPT)
        replies = context.SimpleQueue()

        def work() -> None:
            with model:
                replies.put(told(model, CALLS["prefill"]))
            with load_model(tiny_path, RunOptions(context=64, tier=4)) as own:
                replies.put(own.prefill(PROMPT))

        worker = context.Process(target=work)
        worker.start()
        refusal, logits = replies.get(), replies.get()
        worker.join(30)
        assert worker.exitcode == 0 and "was forked" in refusal
        np.testing.assert_array_equal(logits, expected)


LEAVING = """
import threading
from dymoe_runtime import RunOptions, SamplingParams, Tokenizer, generate, load_model
model = load_model("{path}", RunOptions(context=256, arena_bytes={arena}, point="3"))
tokenizer, begun = Tokenizer.of(model), threading.Event()
def run():
    while True:
        model.reset()
        for token in generate(model, tokenizer, {prompt}, SamplingParams(), 100, ignore_eos=True):
            begun.set()
threading.Thread(target=run, daemon=True).start()
begun.wait()
"""


@pytest.mark.parametrize("prompt", ["'abc'", "[7] * 200"], ids=["tokens", "prompts"])
def test_a_program_ends_while_a_background_thread_generates(prompt: str, tiny_path: Path) -> None:
    """At once, with nothing on stderr, whatever the thread was at."""
    from dymoe_runtime.bundle.bundle import Bundle
    from dymoe_runtime.store.arena import min_arena_bytes

    script = LEAVING.format(path=tiny_path, arena=min_arena_bytes(Bundle.open(tiny_path).layout), prompt=prompt)
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stderr) == (0, "")
