"""Answers held to a schema or a grammar, through the clients of all protocols."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import jsonschema
import ollama
import openai
import pytest
from serving.kit import Running

ASKED: Any = [{"role": "user", "content": "Describe a town"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"coast": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["coast", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def check(text: str | None) -> None:
    jsonschema.validate(json.loads(text or ""), SCHEMA)


def test_openai_chat(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "town", "schema": SCHEMA, "strict": True}}
    given: Any = {"model": "demo", "messages": ASKED, "response_format": wanted}
    choice = client.chat.completions.create(**given).choices[0]
    check(choice.message.content)
    assert choice.finish_reason == "stop"
    chunks = client.chat.completions.create(**given, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    both = client.chat.completions.create(**given, n=2, temperature=2.0, seed=1)
    for one in both.choices:
        check(one.message.content)


def test_openai_grammar_and_any_object(client: openai.OpenAI) -> None:
    body = {"grammar": 'root ::= ("yes" | "no") "!"'}
    choice = client.chat.completions.create(model="demo", messages=ASKED, extra_body=body).choices[0]
    assert choice.message.content in ("yes!", "no!") and choice.finish_reason == "stop"
    text = client.completions.create(model="demo", prompt="Is it", extra_body=body).choices[0].text
    assert text in ("yes!", "no!")
    any_object: Any = {"type": "json_object"}
    choice = client.chat.completions.create(model="demo", messages=ASKED, response_format=any_object).choices[0]
    assert (choice.message.content or "").startswith("{")


def test_openai_responses(client: openai.OpenAI) -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "town", "schema": SCHEMA, "strict": True}}
    response = client.responses.create(model="demo", input="Describe a town", text=wanted)
    check(response.output_text)
    assert response.status == "completed"


def test_anthropic(server: Running) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    wanted: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message: Any = client.messages.create(model="demo", messages=ASKED, max_tokens=48, output_config=wanted)
    check(message.content[0].text)
    assert message.stop_reason == "end_turn"


def test_ollama(server: Running) -> None:
    client = ollama.Client(host=server.url)
    check(client.chat("demo", ASKED, format=SCHEMA).message.content)
    check("".join(part.response for part in client.generate("demo", "A town", format=SCHEMA, stream=True)))
    assert client.generate("demo", "A town", format="json").response.startswith("{")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}},
            "response_format.json_schema.schema",
        ),
        ({"extra_body": {"grammar": "root ::= ("}}, "grammar"),
        ({"extra_body": {"grammar": "no grammar"}}, "grammar"),
        (
            {"response_format": {"type": "json_object"}, "tools": [{"type": "function", "function": {"name": "a"}}]},
            "response_format",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(changes: Any, field: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=ASKED, **changes)
    assert caught.value.param == field
