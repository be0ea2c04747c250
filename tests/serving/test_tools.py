"""Tools and reasoning through the clients of all protocols, with a service that says what a model would."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest
from serving.kit import Scripted, app_of, ask
from starlette.applications import Starlette
from text_kit import CONFIG, byte_level_backend

from dymoe_runtime.text.constraints.constraint import Constraint
from dymoe_runtime.text.generate import Token
from dymoe_runtime.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}[assistant]{% if enable_thinking %}<think>{% endif %}"
)
THOUGHT, SAID = "The city is named.", "Let me look."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'
ARGUMENTS = {"city": "Bern", "days": 2}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
FUNCTION: Any = {"name": "weather", "description": "Tell the weather.", "parameters": PARAMETERS}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
ASKED: Any = [{"role": "user", "content": "How is Bern?"}]
RESULT = "sunny"


def scripted() -> Scripted:
    """A service that thinks, says something and calls a tool, three characters at a time."""
    pieces = [Token(5, "", reasoning=THOUGHT)]
    text = SAID + CALL
    pieces += [Token(5, text[at : at + 3]) for at in range(0, len(text), 3)]
    made = Scripted(
        Tokenizer(byte_level_backend(), CONFIG, {"default": TEMPLATE}), texts=[*pieces, Token(6, "", "stop")]
    )
    made.max_context = 10_000
    return made


def run(work: Callable[[Starlette], Coroutine[Any, Any, None]], service: Scripted) -> None:
    """Let a client talk to an application in this process."""
    asyncio.run(work(app_of(service)))


def openai_client(app: Starlette) -> openai.AsyncOpenAI:
    client = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(app))
    return openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=client, max_retries=0)


def test_openai_chat() -> None:
    service = scripted()
    history = [
        *ASKED,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": THOUGHT,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": RESULT},
    ]
    given: Any = {"model": "m", "tools": TOOLS, "messages": history}

    async def work(app: Starlette) -> None:
        client = openai_client(app)
        choice = (await client.chat.completions.create(**given)).choices[0]
        (call,) = choice.message.tool_calls or []
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", SAID)
        assert call.function.name == "weather" and json.loads(call.function.arguments) == ARGUMENTS  # type: ignore[union-attr]
        assert choice.message.reasoning_content == THOUGHT  # type: ignore[attr-defined]
        chunks = [c.choices[0] async for c in await client.chat.completions.create(**given, stream=True)]
        assert "".join(c.delta.content or "" for c in chunks) == SAID
        calls = [c for chunk in chunks for c in chunk.delta.tool_calls or []]
        assert [c.function.name for c in calls if c.function and c.function.name] == ["weather"] and calls[0].id
        assert json.loads("".join(c.function.arguments or "" for c in calls if c.function)) == ARGUMENTS
        assert chunks[-1].finish_reason == "tool_calls"

    run(work, service)
    prompt = service.requests[0].prompt or ""
    assert '"description": "Tell the weather."' in prompt and prompt.endswith(f"[tool]{RESULT}[assistant]")
    assert f"[assistant]<think>{THOUGHT}</think>" in prompt and '"weather"' in prompt.partition("[assistant]")[2]


def test_openai_responses() -> None:
    service = scripted()
    history: Any = [
        *ASKED,
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": RESULT},
    ]
    given: Any = {"model": "m", "input": history, "tools": [{"type": "function", **FUNCTION}]}

    async def work(app: Starlette) -> None:
        client = openai_client(app)
        whole = await client.responses.create(**given)
        assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
        assert whole.status == "completed" and whole.output_text == SAID
        call: Any = whole.output[2]
        assert json.loads(call.arguments) == ARGUMENTS and call.call_id and call.name == "weather"
        async with client.responses.stream(**given) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert {"response.reasoning_text.delta", "response.function_call_arguments.done"} <= set(kinds)
        assert [item.type for item in final.output] == [item.type for item in whole.output]

    run(work, service)
    prompt = service.requests[0].prompt or ""
    assert prompt.count("[assistant]") == 2 and prompt.endswith(f"[tool]{RESULT}[assistant]")


def test_anthropic() -> None:
    service = scripted()
    history: Any = [
        *ASKED,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": THOUGHT, "signature": ""},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": RESULT}]}],
        },
    ]
    tools: Any = [{"name": "weather", "description": "Tell the weather.", "input_schema": PARAMETERS}]
    given: Any = {"model": "m", "max_tokens": 99, "messages": history, "tools": tools}

    async def work(app: Starlette) -> None:
        http = anthropic.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(app))
        client = anthropic.AsyncAnthropic(base_url="http://localhost", api_key="none", http_client=http, max_retries=0)
        message: Any = await client.messages.create(**given, thinking={"type": "enabled", "budget_tokens": 1024})
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        assert (message.stop_reason, message.content[0].thinking) == ("tool_use", THOUGHT)
        assert message.content[2].input == ARGUMENTS and message.content[2].id
        async with client.messages.stream(**given) as stream:
            final: Any = await stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
        assert final.content[2].input == ARGUMENTS and final.stop_reason == "tool_use"

    run(work, service)
    first, second = (request.prompt or "" for request in service.requests)
    assert first.endswith(f"[tool]{RESULT}[assistant]<think>") and second.endswith(f"[tool]{RESULT}[assistant]")


def test_ollama() -> None:
    service = scripted()
    history: Any = [
        *ASKED,
        {
            "role": "assistant",
            "content": "",
            "thinking": THOUGHT,
            "tool_calls": [{"function": {"name": "weather", "arguments": {}}}],
        },
        {"role": "tool", "tool_name": "weather", "content": RESULT},
    ]

    async def work(app: Starlette) -> None:
        client = ollama.AsyncClient(host="http://localhost", transport=httpx.ASGITransport(app))
        whole = await client.chat("scripted", history, tools=TOOLS, think=True)
        (call,) = whole.message.tool_calls or []
        assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
        assert (whole.message.content, whole.message.thinking) == (SAID, THOUGHT)
        parts = [part async for part in await client.chat("scripted", history, tools=TOOLS, stream=True)]
        assert "".join(part.message.content or "" for part in parts) == SAID
        assert [c.function.arguments for part in parts for c in part.message.tool_calls or []] == [ARGUMENTS]
        assert "tools" in ((await client.show("scripted")).capabilities or [])

    run(work, service)
    assert (service.requests[0].prompt or "").endswith(f"[tool]{RESULT}[assistant]<think>")


def chosen(choice: Any, **more: Any) -> tuple[httpx.Response, Scripted]:
    service = scripted()
    body = {"messages": ASKED, "tools": TOOLS, "tool_choice": choice, **more}
    return ask(app_of(service), "POST", "/v1/chat/completions", json=body), service


def test_a_choice_of_tools_is_kept() -> None:
    answer, service = chosen("none")
    assert CALL in answer.json()["choices"][0]["message"]["content"]
    assert "weather" not in (service.requests[0].prompt or "")
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer, service = chosen(choice)
        (request,) = service.requests
        assert (request.prompt or "").endswith("[assistant]") and request.constraint is not None
        assert holds(request.constraint, CALL) and not holds(request.constraint, SAID)
        assert holds(request.constraint, f"{CALL}\n{CALL}") == (choice == "required")
    (request,) = chosen("required", parallel_tool_calls=False)[1].requests
    assert request.constraint is not None and not holds(request.constraint, f"{CALL}\n{CALL}")
    assert chosen("auto")[1].requests[0].constraint is None


def holds(constraint: Constraint, text: str) -> bool:
    """Whether a constraint lets a text through."""
    constraint.restart()
    for token_id in Tokenizer(byte_level_backend(), CONFIG, {}).encode(text, add_special_tokens=False):
        if constraint.ended or not constraint.permits(token_id):
            return False
        constraint.accept(token_id)
    return True


def test_anthropic_may_ask_for_a_call_too() -> None:
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        service = scripted()
        body = {"messages": ASKED, "max_tokens": 99, "tools": tools, "tool_choice": choice}
        assert ask(app_of(service), "POST", "/v1/messages", json=body).status_code == 200
        constraint = service.requests[0].constraint
        assert constraint is not None and holds(constraint, CALL) and not holds(constraint, SAID)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_behind_its_first_call_if_it_may_have_one(stream: bool) -> None:
    """In every protocol that has a field for it; the service is told to stop."""
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    bodies: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"messages": ASKED, "tools": TOOLS, "parallel_tool_calls": False}),
        ("/v1/responses", {"input": "Bern", "tools": [{"type": "function", **FUNCTION}], "parallel_tool_calls": False}),
        ("/v1/messages", {"messages": ASKED, "max_tokens": 99, "tools": tools,
                          "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
    ]  # fmt: skip
    for path, body in bodies:
        service = scripted()
        service.texts = [Token(5, f"{CALL}\n"), *([Token(5, CALL)] * 50), Token(6, "", "stop")]
        answer = ask(app_of(service), "POST", path, json={**body, "stream": stream})
        assert answer.status_code == 200
        assert len(set(re.findall(r'"(?:call_)?id":"(\w{9})"', answer.text))) == 1, answer.text
        assert service.cancelled == 1 and service.taken < 4
        assert any(reason in answer.text for reason in ('"tool_calls"', '"tool_use"', '"completed"'))


def test_arguments_are_streamed_while_they_are_written() -> None:
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    answer = chosen("auto", stream=True)[0]
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    deltas = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", [])]
    assert len(deltas) > 5 and all(delta["index"] == 0 for delta in deltas)
    assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == ARGUMENTS
    body = {"messages": ASKED, "max_tokens": 99, "tools": tools, "stream": True}
    answer = ask(app_of(scripted()), "POST", "/v1/messages", json=body)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    pieces = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert len(pieces) > 5 and json.loads("".join(pieces)) == ARGUMENTS


def test_a_call_that_is_cut_off_ends_its_stream_well() -> None:
    """Its arguments are not complete, as the reason says."""
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    bodies: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"messages": ASKED, "tools": TOOLS}),
        ("/v1/messages", {"messages": ASKED, "max_tokens": 99, "tools": tools}),
        ("/v1/responses", {"input": "Bern", "tools": [{"type": "function", **FUNCTION}]}),
    ]
    for path, body in bodies:
        for stream in (True, False):
            service = scripted()
            service.texts = [Token(5, CALL[:60]), Token(5, "", "length")]
            answer = ask(app_of(service), "POST", path, json={**body, "stream": stream})
            assert answer.status_code == 200 and '"error":{' not in answer.text
            assert any(reason in answer.text for reason in ('"length"', '"max_tokens"', '"incomplete"'))


@pytest.mark.parametrize(
    ("choice", "more", "words"),
    [
        ({"type": "function", "function": {"name": "clock"}}, {}, "no tool is named 'clock'"),
        ("required", {"tools": []}, "there is no tool to call"),
        ("sometimes", {}, "tool_choice"),
    ],
)
def test_a_choice_that_cannot_be_kept_is_refused(choice: Any, more: Any, words: str) -> None:
    answer, service = chosen(choice, **more)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"] and not service.requests
