"""Clients that are broken or mean harm others as little as they can: what they ask for costs no more than what fits."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving.kit import Running, Scripted, app_of, ask
from text_kit import CONFIG, byte_level_backend, make_tokenizer

from dymoe_runtime.serving.http import endpoint
from dymoe_runtime.serving.http.answers.prompts import PIECE
from dymoe_runtime.serving.http.exchange.bodies import Bodies
from dymoe_runtime.serving.http.exchange.errors import ApiError, as_api_error
from dymoe_runtime.serving.http.openai.responses.requests import InputItem, ResponseRequest, template_messages
from dymoe_runtime.serving.service.errors import TooLong
from dymoe_runtime.text.tokenizer import Tokenizer


def service() -> Scripted:
    return Scripted(
        Tokenizer(byte_level_backend(), CONFIG, {"default": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate", "/v1/chat/completions", "/v1/messages"])
def test_a_prompt_that_is_far_too_long_is_not_encoded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, encode, seen = service(), Tokenizer.encode, list[int]()

    def counted(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        seen.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    text = "hello " * 500_000
    body: Any = {"prompt": text, "raw": True, "model": "scripted", "max_tokens": 1}
    body |= {"messages": [{"role": "user", "content": text}]}
    answer = ask(app_of(made), "POST", path, json=body)
    assert answer.status_code == 400 and not made.requests
    assert "the prompt has more than" in answer.text and "but the context holds 100" in answer.text
    assert sum(seen) <= PIECE


def test_a_long_prompt_that_may_fit_is_not_refused() -> None:
    made = service()
    made.max_context = 3000
    assert ask(app_of(made), "POST", "/v1/completions", json={"prompt": "hello " * 200}).is_success
    made.max_context = 100  # more characters than are usual, but in as many tokens as fit
    text = "<|end|>" * 130
    ids = made.tokenizer.encode(text)
    made.max_context = len(ids)
    assert ask(app_of(made), "POST", "/v1/completions", json={"prompt": text}).is_success
    assert made.requests[-1].ids == tuple(ids)


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer, ticks, done = make_tokenizer(), list[float](), threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    before = len(ticks)
    ids = tokenizer.encode("hello " * 200_000)
    meanwhile = len(ticks) - before
    done.set()
    thread.join()
    assert ids[:200] == tokenizer.encode("hello " * 200)[:200] == tokenizer.encode_with_offsets("hello " * 200)[0][:200]
    assert meanwhile >= 5


def test_a_context_that_can_be_larger_is_said_to_be_so() -> None:
    known = as_api_error(TooLong(9, 4, 8))
    assert known.code == "context_length_exceeded" and known.status == 400
    assert known.message.endswith("holds 4; shorten the prompt, or start the server with a larger --context, up to 8")
    assert str(TooLong(9, 8, 8)).endswith("but the context holds 8; shorten the prompt")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"])
def test_a_model_without_a_chat_template_names_the_paths_for_text(path: str) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "max_tokens": 9}
    answer = ask(app_of(Scripted(make_tokenizer())), "POST", path, json=body)
    assert answer.status_code == 400 and "send plain text to /v1/completions" in answer.text


def test_an_error_does_not_send_back_all_that_is_wrong() -> None:
    body = {"messages": [{"role": "r" * 1_000_000, "content": "Hi"}]}
    answer = ask(app_of(service()), "POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 400 and len(answer.content) < 500
    assert answer.json()["error"]["message"].startswith("messages[0].role: invalid enum value 'rrr")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "a", "grammar": ""}, "grammar"),
        ("/v1/responses", {"input": []}, "input"),
        ("/api/generate", {"model": "scripted", "prompt": "a", "options": {"stop": ["x"] * 17}}, "options.stop"),
    ],
)
def test_the_field_that_is_wrong_is_named(path: str, body: Any, field: str) -> None:
    answer = ask(app_of(service()), "POST", path, json=body)
    message = answer.json()["error"] if path.startswith("/api") else answer.json()["error"]["message"]
    assert answer.status_code == 400 and message.startswith(f"{field}: ")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat"])
def test_a_refusal_of_the_template_names_no_file_and_no_flag(path: str, tmp_path: Path) -> None:
    template = "{{ raise_exception('no more than one turn') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"chat_template": template}))
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    said: Any = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "input": "hi", "max_tokens": 16}
    answer = ask(app_of(Scripted(Tokenizer.load(tmp_path))), "POST", path, json=said)
    said = answer.json()["error"] if path.startswith("/api") else answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert said == "the chat template failed: no more than one turn; change the messages"


def test_many_items_of_one_answer_are_joined_in_one_pass() -> None:
    calls = [InputItem("function_call", call_id=str(i), name="f", arguments="{}") for i in range(60_000)]
    thoughts = [InputItem("reasoning", content="t" * 100) for _ in range(60_000)]
    begun = time.process_time()
    (message,) = template_messages(ResponseRequest(input=[*thoughts, *calls]), "thoughts")
    assert time.process_time() - begun < 5
    assert message["thoughts"] == "t" * 6_000_000 and message["tool_calls"][-1]["id"] == "59999"


def test_a_body_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BODY_TIMEOUT_S", 0.2)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    with pytest.raises(ApiError, match="the body did not come"):
        asyncio.run(asyncio.wait_for(endpoint.read_body(receive, {"headers": []}, Bodies(1000).begin()), 5))


def test_who_sends_too_much_is_told_so(server: Running) -> None:
    """A connection that is closed while the client sends would lose the answer."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12000000\r\n\r\n"
        client.sendall(head.encode() + b" " * 12_000_000)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = b""
        while part := client.recv(1 << 16):
            text += part
    first, _, second = text.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 413 ") and b"HTTP/1.1 200 OK" in second
    said, _ = json.JSONDecoder().raw_decode(second.decode())
    assert "more than 8,388,608 bytes" in said["error"]["message"]
