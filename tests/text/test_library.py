"""What programs use: asynchronous streams, several ways to stop, probabilities."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from text_kit import CONFIG, byte_level_backend, make_tokenizer

from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.generate import Token, generate, generate_async
from dymoe_runtime.text.sampling import SamplingParams, log_probabilities
from dymoe_runtime.text.tokenizer import Tokenizer

TOKENIZER = make_tokenizer()
GREEDY = SamplingParams()


class Counter:
    """A model that says token 40, then 41, and so on; it notes the threads that it runs in."""

    def __init__(self) -> None:
        self.max_context, self.position, self.changes, self.threads = 100, 0, 0, set[str]()
        self.computing = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        self.position += len(ids)
        return self._next()

    def decode(self, token_id: int) -> np.ndarray:
        self.position += 1
        return self._next()

    def _next(self) -> np.ndarray:
        self.changes += 1
        self.threads.add(threading.current_thread().name)
        self.computing.set()
        assert self.may_end.wait(10)
        logits = np.zeros(TOKENIZER.vocab_size, np.float32)
        logits[39 + self.position] = 5.0
        return logits


def test_an_asynchronous_stream_yields_the_same_from_a_thread_of_its_own() -> None:
    async def collect(model: Counter) -> list[Token]:
        return [token async for token in generate_async(model, TOKENIZER, [5], GREEDY, max_tokens=7)]

    model = Counter()
    assert asyncio.run(collect(model)) == list(generate(Counter(), TOKENIZER, [5], GREEDY, max_tokens=7))
    assert len(model.threads) == 1 and model.threads != {threading.current_thread().name}


def test_two_streams_run_at_the_same_time() -> None:
    async def both() -> list[list[int]]:
        async def one() -> list[int]:
            return [token.id async for token in generate_async(Counter(), TOKENIZER, [5], GREEDY, max_tokens=9)]

        return list(await asyncio.gather(one(), one()))

    assert asyncio.run(both()) == [list(range(40, 49))] * 2


@pytest.mark.parametrize("times", [1, 3])
def test_a_cancelled_stream_leaves_the_model_when_its_token_is_computed(times: int) -> None:
    model = Counter()
    model.may_end.clear()

    async def cancel() -> None:
        async def first() -> None:
            async for _ in generate_async(model, TOKENIZER, [5], GREEDY):
                pass

        task = asyncio.create_task(first())
        await asyncio.to_thread(model.computing.wait, 10)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        model.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert model.position == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("generate")]


def test_an_error_reaches_whoever_awaits() -> None:
    async def fail() -> None:
        async for _ in generate_async(Counter(), TOKENIZER, [5] * 101, GREEDY):
            pass

    with pytest.raises(DymoeError, match="the context holds 100"):
        asyncio.run(fail())


def test_any_of_several_conditions_ends_an_answer() -> None:
    ids = [token.id for token in generate(Counter(), TOKENIZER, [5], GREEDY, stop_ids=[50, 45])]
    assert ids == list(range(40, 46))
    text = "".join(token.text for token in generate(Counter(), TOKENIZER, [5], GREEDY, max_tokens=20))
    tokens = list(generate(Counter(), TOKENIZER, [5], GREEDY, 20, [text[15:17], text[9:11]], stop_ids=[60]))
    assert "".join(token.text for token in tokens) == text[:9] and tokens[-1].finish == "stop"


def test_tokens_have_their_log_probabilities() -> None:
    tokens = list(generate(Counter(), TOKENIZER, [5], SamplingParams(temperature=0.5), 3, logprobs=2))
    vocabulary = TOKENIZER.vocab_size
    expected = 5 - math.log(math.exp(5) + vocabulary - 1)
    for token in tokens:
        assert token.top_logprobs[0][1] == pytest.approx(expected) and len(token.top_logprobs) == 2
        own = expected if token.id == token.top_logprobs[0][0] else expected - 5
        assert token.logprob == pytest.approx(own)
    logs = log_probabilities(np.array([1.0, 3.0, 2.0], np.float32), 0, 9)["top_logprobs"]
    with pytest.raises(DymoeError, match="logprobs -1: must be at least 0"):
        log_probabilities(np.zeros(3, np.float32), 0, -1)
    assert [i for i, _ in logs] == [1, 2, 0] and sum(math.exp(x) for _, x in logs) == pytest.approx(1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams()),
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.95}, SamplingParams(0.8, top_p=0.95)),
        ({"do_sample": True}, SamplingParams(1.0)),
        ({"do_sample": False, "temperature": 0.8, "repetition_penalty": 1.1}, SamplingParams(repetition_penalty=1.1)),
        ({"temperature": 0.6, "top_k": 20, "min_p": 0}, SamplingParams(0.6, 20)),
        ({"repetition_penalty": 1.05}, SamplingParams(repetition_penalty=1.05)),
        ({"do_sample": True, "temperature": None, "top_k": None, "top_p": 0.8}, SamplingParams(1.0, top_p=0.8)),
        ({"do_sample": True, "temperature": 0.7, "top_k": -1}, SamplingParams(0.7)),
    ],
)
def test_a_model_is_sampled_as_its_file_says(config: dict[str, object], expected: SamplingParams) -> None:
    assert Tokenizer(byte_level_backend(), CONFIG, {}, generation=config).sampling == expected


@pytest.mark.parametrize("value", ["false", 0])
def test_whether_to_sample_is_true_or_false(value: object) -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {}, generation={"do_sample": value, "temperature": 0.7})
    with pytest.raises(DymoeError, match=r"generation_config.json: do_sample .*true or false; give --greedy"):
        assert tokenizer.sampling


@pytest.mark.parametrize("value", ["hot", -1, True, [1], float("nan")])
def test_a_value_that_is_not_possible_names_the_file(value: object) -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {}, generation={"do_sample": True, "temperature": value})
    with pytest.raises(DymoeError, match=r"generation_config.json: .*temperature .*give --greedy"):
        assert tokenizer.sampling


def test_settings_read_as_a_line() -> None:
    assert str(SamplingParams(0.8, top_p=0.95, seed=3)) == "temperature 0.8, top-p 0.95, seed 3"
    assert str(SamplingParams(repetition_penalty=1.1)) == "greedy, repetition-penalty 1.1"
    assert str(SamplingParams(top_k=3, presence_penalty=0.5)) == "greedy, presence-penalty 0.5"
    assert str(SamplingParams(1.0, logit_bias={7: 1, 3: -5})) == "temperature 1, logit-bias of 2 tokens, seed 0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": [1]}, "stop string is 1"),
        ({"stop": 1}, "stop string is 1"),
        ({"stop": [None]}, "stop string is None"),
        ({"stop": b"x"}, "no text"),
        ({"max_tokens": "3"}, "whole number"),
        ({"max_tokens": 2.5}, "whole number"),
        ({"max_tokens": True}, "whole number"),
        ({"stop_ids": ["x"]}, "ids of tokens"),
        ({"stop_ids": 5}, "ids of tokens"),
        ({"params": {"temperature": 1}}, "expected SamplingParams"),
        ({"params": 0.5}, "expected SamplingParams"),
        ({"logprobs": "2"}, "logprobs '2'"),
        ({"logprobs": -1}, "at least 0"),
        ({"prompt": 5}, "type int"),
        ({"prompt": None}, "type NoneType"),
        ({"prompt": ["a"]}, "give a text, or the ids"),
        ({"prompt": [1.5]}, "give a text, or the ids"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_before_the_model_runs(options: dict[str, Any], words: str) -> None:
    model = Counter()
    with pytest.raises(DymoeError, match=words):
        generate(model, TOKENIZER, **{"prompt": [5], **options})
    assert model.position == 0


def test_ids_may_be_those_of_numpy() -> None:
    tokens = list(generate(Counter(), TOKENIZER, np.array([5, 6]), GREEDY, 3, stop_ids=np.array([1])))
    assert tokens == list(generate(Counter(), TOKENIZER, [5, 6], GREEDY, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"decay": "2"},
        {"decay": float("nan")},
        {"quality": float("nan")},
        {"quality": "low"},
        {"quality": float("inf")},
        {"point": 3},
        {"threads": "2"},
        {"context": 1.5},
        {"trace": 3},
        {"warm_set": b"x"},
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DymoeError, match=next(iter(options))):
        RunOptions(**options)
