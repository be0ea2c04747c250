"""What clients are told when the service is full, ends or fails; and readers that are slow or go away."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from serving.kit import Scripted, app_of, ask
from text_kit import make_tokenizer

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.serving.http.answers.settings import Settings
from dymoe_runtime.serving.service.errors import Closing, Full

BODY: dict[str, Any] = {"prompt": "abc", "model": "scripted", "raw": True}
PATHS = ["/v1/completions", "/api/generate"]


def service(**options: Any) -> Scripted:
    return Scripted(make_tokenizer(), **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_full_queue_says_when_to_come_back(path: str, stream: bool) -> None:
    answer = ask(app_of(service(error=Full(7.2))), "POST", path, json=BODY | {"stream": stream})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "8" and "queue is full" in answer.text


@pytest.mark.parametrize("path", PATHS)
def test_a_server_that_ends_says_so(path: str) -> None:
    answer = ask(app_of(service(error=Closing())), "POST", path, json=BODY)
    assert answer.status_code == 503 and "retry-after" in answer.headers


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_fails_is_an_error(path: str) -> None:
    made = service(error=DymoeError("the disk is gone; bring it back"))
    answer = ask(app_of(made), "POST", path, json=BODY | {"stream": False})
    assert answer.status_code == 500 and "the disk is gone" in answer.text
    answer = ask(app_of(made), "POST", path, json=BODY | {"stream": True})
    last = answer.text.strip().splitlines()[-1].removeprefix("data: ")
    assert answer.status_code == 200 and "the disk is gone" in json.dumps(json.loads(last)["error"])


@pytest.mark.parametrize("path", PATHS)
def test_the_time_limit_ends_an_answer(path: str) -> None:
    made = service(tokens=1000, wait_s=0.01)
    answer = ask(app_of(made, Settings(time_limit_s=0.1)), "POST", path, json=BODY | {"stream": False}).json()
    finish = answer["done_reason"] if "done_reason" in answer else answer["choices"][0]["finish_reason"]
    assert finish == "length" and 0 < made.taken < 20


def test_one_answer_of_several_that_fails_cancels_the_others() -> None:
    made = service(tokens=1000, error=DymoeError("no; do not"))
    answer = ask(app_of(made), "POST", "/v1/completions", json=BODY | {"n": 3})
    assert answer.status_code == 500 and made.cancelled == 3


def test_more_answers_than_the_server_holds_are_refused() -> None:
    made = service()
    answer = ask(app_of(made), "POST", "/v1/completions", json=BODY | {"prompt": ["a", "b"], "n": 16})
    assert answer.status_code == 400 and "32 answers, but the server holds 4" in answer.text and not made.requests
    assert ask(app_of(made), "POST", "/v1/completions", json=BODY | {"prompt": ["a", "b"], "n": 2}).is_success


def test_readers_that_are_slow_fill_the_server() -> None:
    made = service(tokens=1000)
    app = app_of(made)

    async def read() -> list[int]:
        readers = [Reader(4, goes=False) for _ in range(20)]
        tasks = [asyncio.ensure_future(app(scope(PATHS[0]), reader.receive, reader.send)) for reader in readers]
        await asyncio.gather(*(reader.stuck.wait() for reader in readers))
        statuses = list[int]()

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        await app(scope(PATHS[0]), Reader(4, goes=False).receive, send)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return statuses

    assert asyncio.run(read())[0] == 429
    assert made.cancelled == 20 and len(made.requests) == 20


def test_requests_become_what_they_say() -> None:
    made = service()
    app = app_of(made, Settings(max_tokens=50, seed=3))
    ask(app, "POST", "/v1/completions", json=BODY | {"top_k": 7, "max_tokens": 9, "stop": "x", "n": 2})
    first, second = made.requests
    assert (first.params.top_k, first.params.seed, second.params.seed) == (7, 3, 4)
    assert first.ending.max_tokens == 9 and first.ending.strings == ("x",) and first.prompt is None
    options = {"num_predict": -1, "seed": 11, "repeat_penalty": 1.2, "stop": ["y", ""]}
    ask(app, "POST", "/api/generate", json=BODY | {"options": options})
    last = made.requests[-1]
    assert (last.params.seed, last.params.repetition_penalty) == (11, 1.2)
    assert last.ending.max_tokens == 50 and last.ending.strings == ("y",)


class Reader:
    """A client that takes so many parts of a response, and then waits or goes away."""

    def __init__(self, parts: int, goes: bool) -> None:
        self._left, self._goes, self._has_body = parts, goes, False
        self.stuck = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if not self._has_body:
            self._has_body = True
            return {"type": "http.request", "body": json.dumps(BODY | {"stream": True}).encode(), "more_body": False}
        if self._goes:
            await self.stuck.wait()
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Any) -> None:
        self._left -= 1
        if not self._left:
            self.stuck.set()
            await asyncio.Event().wait()


def scope(path: str) -> dict[str, Any]:
    headers = [(b"host", b"localhost")]
    return {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "root_path": ""}


@pytest.mark.parametrize("path", PATHS)
def test_a_slow_reader_holds_up_its_own_answer_alone(path: str) -> None:
    made = service(tokens=1000)

    async def read() -> None:
        reader = Reader(4, goes=False)
        task = asyncio.ensure_future(app_of(made)(scope(path), reader.receive, reader.send))
        await reader.stuck.wait()
        await asyncio.sleep(0.05)
        assert made.taken <= 4 and not made.cancelled
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(read())
    assert made.cancelled == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_reader_that_goes_away_cancels_its_answer(path: str) -> None:
    made = service(tokens=1000)

    async def read() -> None:
        reader = Reader(4, goes=True)
        await asyncio.wait_for(app_of(made)(scope(path), reader.receive, reader.send), 5)

    asyncio.run(read())
    assert made.cancelled == 1 and made.taken <= 4
