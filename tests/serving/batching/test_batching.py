"""Requests that run together have the answers that each has alone, whatever happens to the others."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine import load as load_module
from dymoe_runtime.engine.batch.load import load_batch
from dymoe_runtime.engine.batch.model import BatchModel
from dymoe_runtime.engine.batch.sequence import BatchSequence
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.load import load_model
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.serving.service.batching import scheduler as scheduler_module
from dymoe_runtime.serving.service.batching.answer import QueuedAnswer
from dymoe_runtime.serving.service.batching.fair_queue import FairQueue
from dymoe_runtime.serving.service.batching.prompt_cache import PromptCache
from dymoe_runtime.serving.service.batching.service import BatchingService, Identity
from dymoe_runtime.serving.service.errors import Closing, Full
from dymoe_runtime.serving.service.request import GenerationRequest
from dymoe_runtime.store.arena import min_arena_bytes
from dymoe_runtime.text.ending import Ending
from dymoe_runtime.text.generate import Token, generate
from dymoe_runtime.text.sampling import SamplingParams
from dymoe_runtime.text.tokenizer import Tokenizer

CHUNK = 16
OPTIONS = RunOptions(context=200, point="2.5")
G = np.random.default_rng(8)


def ids_of(count: int) -> tuple[int, ...]:
    return tuple(G.integers(1, 256, count).tolist())


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*args: object, **kwargs: object) -> Budget:
        return replace(plan_budget(*args, **kwargs), chunk_tokens=CHUNK, chunk_bytes=1)  # type: ignore[arg-type]

    monkeypatch.setattr(load_module, "plan_budget", plan)


@dataclass
class Ask:
    """A request, in the words of a test."""

    ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    tokens: int = 8
    client: str = ""


class Bench:
    """A service, and the means to ask it."""

    def __init__(self, path: Path, model: BatchModel, tokenizer: Tokenizer, **options: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.service = BatchingService(model, tokenizer, Identity.of(path, "", 0), **options)

    def submit(self, ask: Ask) -> QueuedAnswer:
        ending = Ending.of(self.tokenizer, ask.tokens, (), (), True)
        return self.service.submit(GenerationRequest(None, ask.ids, ask.params, ending, client=ask.client))


@contextmanager
def serving(
    path: Path, slots: int, cache: Path | None = None, run: RunOptions = OPTIONS, **options: Any
) -> Iterator[Bench]:
    """A service on a bundle, which ends well."""
    tokenizer = Tokenizer.load(path, (0,))
    with load_batch(path, slots, run) as model:
        if cache is not None:
            options["cache"] = PromptCache(cache, 1 << 30, model)
        bench = Bench(path, model, tokenizer, **options)
        try:
            yield bench
        finally:
            asyncio.run(bench.service.close(30))
        model.store.check()
        assert not model.store.leased()


async def read(answer: QueuedAnswer) -> list[Token]:
    return [token async for token in answer]


def together(bench: Bench, asks: Sequence[Ask]) -> list[list[int]]:
    """The ids of all answers, asked for at once."""

    async def all_of_them() -> list[list[Token]]:
        return await asyncio.gather(*(read(bench.submit(ask)) for ask in asks))

    return [[token.id for token in tokens] for tokens in asyncio.run(all_of_them())]


def alone(path: Path, asks: Sequence[Ask]) -> list[list[int]]:
    """The ids of all answers, each by a model that computes nothing else."""
    tokenizer, found = Tokenizer.load(path, (0,)), []
    with load_model(path, OPTIONS) as model:
        for ask in asks:
            model.reset()
            tokens = generate(model, tokenizer, ask.ids, ask.params, ask.tokens, ignore_eos=True)
            found.append([token.id for token in tokens])
    return found


def test_answers_are_those_of_each_alone(tiny_path: Path) -> None:
    """Some prompts are the same, some begin alike, and there are more than slots."""
    base = ids_of(50)
    prompts = [ids_of(1), base, base, base[:33], (*base[:20], 7), ids_of(17), ids_of(120), ids_of(3), base, ids_of(64)]
    settings = [SamplingParams(), SamplingParams(temperature=0.9, seed=3), SamplingParams(repetition_penalty=1.3)]
    asks = [Ask(ids, settings[n % 3], 4 + n) for n, ids in enumerate(prompts)]
    with serving(tiny_path, 4) as bench:
        assert together(bench, asks) == together(bench, asks) == alone(tiny_path, asks)
        assert bench.service.state().busy == 0 == bench.service.state().queued
        statistics = bench.service.statistics()
        assert statistics["answers"] == 20 and statistics["new_tokens"] > 0


def test_equal_prompts_are_computed_once(tiny_path: Path) -> None:
    """The others wait for the first, and begin where its prompt ends."""
    with serving(tiny_path, 4) as bench:
        asks = [Ask(ids_of(70), SamplingParams(temperature=1.0, seed=0))]
        asks += [replace(asks[0], params=replace(asks[0].params, seed=n)) for n in (1, 2, 3)]
        answers = [bench.submit(ask) for ask in asks]
        asyncio.run(all_read(answers))
        assert [answer.reused_tokens for answer in answers] == [0, 70, 70, 70]
        assert bench.service.statistics()["prompt_tokens"] == 70


async def all_read(answers: Sequence[QueuedAnswer]) -> list[list[Token]]:
    return list(await asyncio.gather(*map(read, answers)))


def test_the_next_turn_goes_on_where_the_last_one_was(tiny_path: Path) -> None:
    with serving(tiny_path, 2) as bench:
        first = Ask(ids_of(40))
        (said,) = together(bench, [first])
        answer = bench.submit(Ask((*first.ids, *said, 5, 6)))
        asyncio.run(all_read([answer]))
        assert answer.reused_tokens == 40 + len(said) - 1  # the last token of an answer is not computed


def test_tokens_go_on_while_a_prompt_runs(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock, all takes equally long, so each pause has a step."""
    ticks = itertools.count()
    monkeypatch.setattr(scheduler_module.time, "perf_counter", lambda: float(next(ticks)))
    with serving(tiny_path, 2) as bench:
        quick, long = Ask(ids_of(3), tokens=150), Ask(ids_of(150), tokens=1)

        async def run() -> tuple[list[int], int]:
            one = bench.submit(quick).__aiter__()
            said, meanwhile = [(await anext(one)).id], 0
            other = asyncio.ensure_future(read(bench.submit(long)))
            async for token in one:
                said.append(token.id)
                meanwhile += not other.done()
            await other
            return said, meanwhile

        said, meanwhile = asyncio.run(run())
        assert [said] == alone(tiny_path, [quick])
        assert meanwhile > 20


def test_an_answer_that_nobody_wants_frees_its_slot(tiny_path: Path) -> None:
    with serving(tiny_path, 1) as bench:

        async def leave(ask: Ask, tokens: int) -> None:
            answer = bench.submit(ask)
            async for _ in answer:
                tokens -= 1
                if tokens <= 0:
                    break
            answer.cancel()
            assert [token async for token in answer if token.finish] == []

        asyncio.run(leave(Ask(ids_of(5), tokens=150), 2))
        unread = bench.submit(Ask(ids_of(150), tokens=40))
        waiting = bench.submit(Ask(ids_of(9)))
        unread.cancel()
        waiting.cancel()
        ask = Ask(ids_of(20))
        assert together(bench, [ask]) == alone(tiny_path, [ask])
        assert bench.service.state().busy == 0


def test_a_slot_whose_pass_runs_is_not_given_to_others(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short prompt runs in a pause of two long ones, of which one is left; another one waits for its slot."""
    bundle = Bundle.open(tiny_path)
    few = replace(OPTIONS, arena_bytes=min_arena_bytes(bundle.layout) + bundle.expert_bytes() // 3)
    asks = {name: Ask(ids_of(count)) for name, count in zip("ablsc", (20, 100, 90, 12, 14), strict=True)}
    expected = dict(zip("absc", alone(tiny_path, [asks[name] for name in "absc"]), strict=True))
    prefill, answers, order = BatchModel.prefill, dict[str, QueuedAnswer](), list[list[int]]()
    with serving(tiny_path, 3, run=few) as bench:

        def submit(*names: str) -> None:
            for name in names:
                if name not in answers:
                    answers[name] = bench.submit(asks[name])

        def prefill_and_more(model: BatchModel, prompts: Sequence[Any], tokens: int, pause: Callable[[], None]) -> None:
            left = [len(prompt.left) for prompt in prompts]

            def paused() -> None:
                if left == [20]:
                    submit("b", "l")
                elif left == [100, 90]:
                    submit("s")
                elif left == [12]:
                    submit("c")
                    answers["l"].cancel()
                pause()

            order.append(left)
            prefill(model, prompts, tokens, paused)

        monkeypatch.setattr(BatchModel, "prefill", prefill_and_more)
        submit("a")
        asyncio.run(all_ends([answers["a"]]))
        asyncio.run(all_ends([answers["b"]]))
        ends = {name: asyncio.run(all_ends([answers[name]]))[0] for name in "sc"}
    assert ends == {name: expected[name] for name in "sc"}
    assert order == [[20], [100, 90], [12], [14]]


def test_only_those_answers_fail_that_must(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that cannot be read fails the whole step, which runs once more for each of its sequences."""
    asks = [Ask(ids_of(20 + n)) for n in range(3)]
    expected = alone(tiny_path, asks)
    with serving(tiny_path, 3) as bench:
        bad = bench.model.sequences[1]
        decode, prefill = BatchModel.decode, BatchModel.prefill

        def decode_or_fail(model: BatchModel, sequences: Sequence[BatchSequence], ids: Sequence[int]) -> np.ndarray:
            if bad in sequences and bad.length > 22:
                raise DymoeError("an expert cannot be read")
            return decode(model, sequences, ids)

        monkeypatch.setattr(BatchModel, "decode", decode_or_fail)
        answers = [bench.submit(ask) for ask in asks]
        found = asyncio.run(all_ends(answers))
        assert [n for n, end in enumerate(found) if isinstance(end, DymoeError)] == [1]
        assert [ends for n, ends in enumerate(found) if n != 1] == [expected[0], expected[2]]

        def prefill_or_fail(model: BatchModel, prompts: Sequence[Any], *rest: Any) -> None:
            if any(prompt.sequence is bad for prompt in prompts):
                raise DymoeError("an expert cannot be read")
            prefill(model, prompts, *rest)

        monkeypatch.setattr(BatchModel, "decode", decode)
        monkeypatch.setattr(BatchModel, "prefill", prefill_or_fail)
        found = asyncio.run(all_ends([bench.submit(Ask(ids_of(30))) for _ in range(3)]))
        assert sum(isinstance(end, DymoeError) for end in found) == 1
        monkeypatch.setattr(BatchModel, "prefill", prefill)
        assert together(bench, asks) == expected


async def all_ends(answers: Sequence[QueuedAnswer]) -> list[list[int] | DymoeError]:
    """The ids of each answer, or the error that ended it."""

    async def end_of(answer: QueuedAnswer) -> list[int] | DymoeError:
        try:
            return [token.id async for token in answer]
        except DymoeError as error:
            return error

    return list(await asyncio.gather(*map(end_of, answers)))


def test_a_fault_of_the_program_fails_answers_but_not_the_service(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_path, 2) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(BatchModel, "decode", lambda *args: 1 / 0)
            found = asyncio.run(all_ends([bench.submit(Ask(ids_of(3))) for _ in range(3)]))
            assert all(isinstance(end, DymoeError) and "fault of the server" in str(end) for end in found)
        ask = Ask(ids_of(4))
        assert together(bench, [ask]) == alone(tiny_path, [ask])


def test_clients_take_turns() -> None:
    queue = FairQueue[Ask]()
    asks = [Ask((n,), client=client) for n, client in enumerate("aaabac")]
    for ask in asks:
        queue.add(ask)
    assert len(queue) == 6
    order = [queue.take() for _ in range(4)]
    queue.add_first(asks[3])
    assert [ask.ids[0] for ask in order if ask] == [0, 3, 5, 1]
    assert [ask.ids[0] for ask in iter(queue.take, None)] == [3, 2, 4]
    assert queue.take() is None


def test_a_full_queue_and_an_end_refuse_requests(tiny_path: Path) -> None:
    async def run(bench: Bench) -> None:
        running = [bench.submit(Ask(ids_of(4), tokens=190))]
        await anext(aiter(running[0]))
        running += [bench.submit(Ask(ids_of(4))) for _ in range(2)]
        with pytest.raises(Full) as full:
            bench.submit(Ask(ids_of(4)))
        assert full.value.retry_after_s >= 1
        running[1].cancel()
        running.append(bench.submit(Ask(ids_of(4))))
        await bench.service.close(0)
        ends = await all_ends(running[2:])
        assert all(isinstance(end, Closing) for end in ends)
        with pytest.raises(Closing):
            bench.submit(Ask(ids_of(4)))

    with serving(tiny_path, 1, queue_limit=2) as bench:
        asyncio.run(run(bench))


def test_states_outlive_the_server(tiny_path: Path, tmp_path: Path) -> None:
    ask = Ask(ids_of(100), tokens=6)
    with serving(tiny_path, 2, cache=tmp_path / "cache") as bench:
        (said,) = together(bench, [ask])
    others = [Ask((*ask.ids, *said, 9)), Ask((*ask.ids[:97], 1, 2))]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for ids, reused in zip(others, (105, 96), strict=True):
        with serving(tiny_path, 2, cache=tmp_path / "cache") as bench:
            answer = bench.submit(ids)
            (tokens,) = asyncio.run(all_read([answer]))
            assert answer.reused_tokens == reused
            if reused == 96:
                assert [[token.id for token in tokens]] == alone(tiny_path, [ids])
    for path in (tmp_path / "cache").iterdir():
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
    with serving(tiny_path, 2, cache=tmp_path / "cache") as bench:
        assert together(bench, others[1:]) == alone(tiny_path, others[1:])


def test_a_saved_prompt_without_an_answer_is_no_conversation(tiny_path: Path, tmp_path: Path) -> None:
    """Another prompt that goes on from its end begins with its whole chunks only, as it would without a restart."""
    ids = ids_of(70)
    on = Ask((*ids, 9, 8))
    with serving(tiny_path, 1, cache=tmp_path) as bench:
        together(bench, [Ask(ids, tokens=1)])
    with serving(tiny_path, 1, cache=tmp_path) as bench:
        answer = bench.submit(on)
        (tokens,) = asyncio.run(all_read([answer]))
    assert answer.reused_tokens == 64 and [[token.id for token in tokens]] == alone(tiny_path, [on])


def test_a_cache_keeps_to_its_size(tiny_path: Path, tmp_path: Path) -> None:
    with serving(tiny_path, 2, cache=tmp_path) as bench:
        together(bench, [Ask(ids_of(100)), Ask(ids_of(100))])
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    with load_batch(tiny_path, 1, OPTIONS) as model, model.running():
        cache = PromptCache(tmp_path, sum(sizes) + 100, model)
        model.decode(model.sequences, [1])
        model.sequences[0].cut(0)
        prompt = model.prompt(model.sequences[0], ids_of(100))
        while prompt.left:
            model.prefill([prompt], model.pass_tokens(len(prompt.left)), lambda: None)
        slots = scheduler_module.Slots(model.sequences, CHUNK)
        cache.save_all(slots.all)
    assert len(list(tmp_path.iterdir())) == 2
