"""Anthropic's own client: messages, streams, counting and errors."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from serving.kit import Running

ASKED: Any = [{"role": "user", "content": "Tell me of the sea"}]
SHORT: Any = {"model": "demo", "messages": ASKED, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


def test_an_answer_is_that_of_the_other_protocols(client: anthropic.Anthropic, server: Running) -> None:
    message = client.messages.create(**SHORT)
    other = server.post("/v1/chat/completions", SHORT)
    assert text_of(message) == other["choices"][0]["message"]["content"]
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 8
    cached = message.usage.cache_read_input_tokens
    assert cached is not None and message.usage.input_tokens + cached == other["usage"]["prompt_tokens"]


def test_a_stream_joins_to_the_answer(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**SHORT) as stream:
        events = list(stream)
        assert text_of(stream.get_final_message()) == text_of(client.messages.create(**SHORT))
    kinds = [event.type for event in events if event.type != "text"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_stop_sequence_that_ended_an_answer_is_named(client: anthropic.Anthropic) -> None:
    whole = text_of(client.messages.create(**SHORT))
    message = client.messages.create(**SHORT, stop_sequences=["\x00", whole[9:12]])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", whole[9:12])
    assert text_of(message) == whole[: whole.index(whole[9:12])]


def test_tokens_are_counted_as_a_prompt_has_them(client: anthropic.Anthropic) -> None:
    conversation: Any = {
        "model": "demo",
        "system": [{"type": "text", "text": "Be brief"}],
        "messages": [
            *ASKED,
            {"role": "assistant", "content": [{"type": "text", "text": "It is wide."}]},
            {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "then?"}]},
        ],
    }
    counted = client.messages.count_tokens(**conversation).input_tokens
    usage = client.messages.create(**conversation, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0) > 20


def test_an_answer_that_is_begun_is_continued(client: anthropic.Anthropic) -> None:
    whole = text_of(client.messages.create(**SHORT))
    begun = [*ASKED, {"role": "assistant", "content": whole}]
    longer = text_of(client.messages.create(**SHORT | {"max_tokens": 16}))
    assert whole + text_of(client.messages.create(**SHORT | {"messages": begun})) == longer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": []}, "messages: it is empty"),
        ({"max_tokens": 0}, "max_tokens: expected int >= 1"),
        ({"extra_body": {"temperature": "hot"}}, "temperature: expected float"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, r"messages\[0\].content\[0\]"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], words: str, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        client.messages.create(**SHORT | changes)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_a_missing_field_is_named(server: Running, client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens: this field is required"):
        client.post("/v1/messages", body={"messages": ASKED}, cast_to=dict[str, Any])
