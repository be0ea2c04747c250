"""Ollama's own client: chat, generate, models and errors."""

from __future__ import annotations

from typing import Any

import ollama
import pytest
from helpers import PROMPT
from serving.kit import Running

ASKED: Any = [{"role": "user", "content": "Tell me of the sea"}]
SHORT: Any = {"model": "demo", "messages": ASKED, "options": {"num_predict": 8}}


@pytest.fixture(scope="module")
def client(server: Running) -> ollama.Client:
    return ollama.Client(host=server.url)


def test_an_answer_is_that_of_the_other_protocols(client: ollama.Client, server: Running) -> None:
    answer = client.chat(**SHORT)
    other = server.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 8})
    assert answer.message.content == other["choices"][0]["message"]["content"]
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "length", 8)
    assert answer.prompt_eval_count == other["usage"]["prompt_tokens"]
    assert answer.total_duration is not None and answer.eval_duration is not None
    assert answer.total_duration >= answer.eval_duration > 0


def test_a_stream_joins_to_the_answer(client: ollama.Client) -> None:
    parts = list(client.chat(**SHORT, stream=True))
    assert "".join(part.message.content or "" for part in parts) == client.chat(**SHORT).message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == 8


def test_a_text_is_answered_or_continued(client: ollama.Client, server: Running) -> None:
    options = {"num_predict": 6}
    raw = client.generate(model="demo:latest", prompt=PROMPT, raw=True, options=options)
    assert raw.response == server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 6})["choices"][0]["text"]
    parts = client.generate(model="demo", prompt=PROMPT, system="Be brief", stream=True, options=options)
    chat = client.chat(
        "demo", [{"role": "system", "content": "Be brief"}, {"role": "user", "content": PROMPT}], options=options
    )
    assert "".join(part.response for part in parts) == chat.message.content
    assert client.generate(model="demo").done_reason == "load"


def test_models_are_listed_and_described(client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == "demo:latest" and model.size and model.digest
    assert [loaded.model for loaded in client.ps().models] == ["demo:latest"]
    shown = client.show("demo")
    assert shown.capabilities == ["completion", "tools"] and shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "qwen3_moe"


def test_errors_are_one_sentence(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="model 'nothing' not found") as caught:
        client.chat("nothing", ASKED)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=r"options.temperature: expected float"):
        client.chat(**SHORT | {"options": {"temperature": "hot"}})
    with pytest.raises(ollama.ResponseError, match="images: images are not supported"):
        client.chat("demo", [{"role": "user", "content": "a", "images": ["aGk="]}])
