"""OpenAI's own client: chat, streams, completions, responses, models and errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers import PROMPT, run_cli
from serving.kit import GREEDY, MAX_TOKENS, Running

ASKED: Any = [{"role": "user", "content": "Tell me of the sea"}]
SHORT: Any = {"model": "demo", "messages": ASKED, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_greedy_answers_equal_those_of_dymoe_run(client: openai.OpenAI, shipped_path: Path) -> None:
    args = (*GREEDY, "--max-tokens", 24, "--json")
    chat = run_cli(shipped_path, "--chat", "--prompt", ASKED[0]["content"], *args).json["text"]
    assert client.chat.completions.create(**SHORT | {"max_tokens": 24}).choices[0].message.content == chat
    text = run_cli(shipped_path, "--prompt", PROMPT, *args).json["text"]
    assert client.completions.create(model="demo", prompt=PROMPT, max_tokens=24).choices[0].text == text
    response = client.responses.create(model="demo", input=ASKED[0]["content"], max_output_tokens=24)
    assert response.output_text == chat


def test_a_stream_joins_to_the_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**SHORT)
    chunks = list(client.chat.completions.create(**SHORT, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage is not None and whole.usage is not None
    assert usage.completion_tokens == 8 and usage.prompt_tokens == whole.usage.prompt_tokens
    # The second one began with what the first one had left in memory.
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens


def test_several_answers_differ_by_their_seeds(client: openai.OpenAI) -> None:
    asked = SHORT | {"n": 3, "temperature": 1.5}
    first, again, other = (
        [choice.message.content for choice in client.chat.completions.create(**asked, seed=seed).choices]
        for seed in (1, 1, 5)
    )
    assert first == again != other and len(set(first)) == 3
    chunks = client.chat.completions.create(**asked, seed=1, stream=True)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == first


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**SHORT).choices[0].message.content or ""
    choice = client.chat.completions.create(**SHORT, stop=["\x00", whole[9:12]]).choices[0]
    assert choice.message.content == whole[: whole.index(whole[9:12])] and choice.finish_reason == "stop"


def test_log_probabilities_come_with_the_likeliest_tokens(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**SHORT, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token  # greedy
        assert sum(math.exp(likely.logprob) for likely in token.top_logprobs) <= 1.0001
        assert token.bytes == list(token.token.encode())
    streamed = client.chat.completions.create(**SHORT, logprobs=True, stream=True)
    found = [c.choices[0].logprobs.content[0].logprob for c in streamed if c.choices[0].logprobs]  # type: ignore[index]
    assert found == [token.logprob for token in tokens]
    text = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, logprobs=2, echo=True).choices[0]
    assert text.logprobs is not None and text.logprobs.text_offset is not None and text.logprobs.tokens is not None
    for at, token in zip(text.logprobs.text_offset, text.logprobs.tokens, strict=True):
        assert text.text[at:].startswith(token)


def test_completions_take_texts_and_tokens(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=[PROMPT, "Once"], max_tokens=4, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text == whole.choices[1].text != whole.choices[2].text
    by_ids: Any = client.completions.create(model="demo", prompt=[[1000, 1001], [17]], max_tokens=2)
    one = client.completions.create(model="demo", prompt=[1000, 1001], max_tokens=2)
    assert by_ids.choices[0].text == one.choices[0].text and by_ids.usage.prompt_tokens == 3
    chunks = list(client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + whole.choices[0].text


def test_responses_stream_as_named_events(client: openai.OpenAI) -> None:
    conversation: Any = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "Tell me"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "What?"}]},
        {"role": "user", "content": "Of the sea"},
    ]
    whole = client.responses.create(model="demo", input=conversation, max_output_tokens=8)
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    events: list[Any] = list(
        client.responses.create(model="demo", input=conversation, max_output_tokens=8, stream=True)
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == 8


def test_the_limit_of_the_server_is_below_that_of_a_request(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**SHORT | {"max_tokens": 10_000})
    assert answer.usage is not None and answer.usage.completion_tokens <= MAX_TOKENS


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "dymoe"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-x/y'; this server has demo"):
        client.models.retrieve("gpt-x/y")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"n": 100}, "n"),
        ({"stop": [1]}, "stop[0]"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], field: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**SHORT | changes)
    assert caught.value.param == field and caught.value.type == "invalid_request_error"
    assert str(caught.value.body["message"]).startswith(f"{field}: ")  # type: ignore[index]


def test_a_prompt_that_does_not_fit_is_refused(client: openai.OpenAI) -> None:
    refusal = r"the prompt has \d+ tokens, but the context holds 512; shorten the prompt$"
    with pytest.raises(openai.BadRequestError, match=refusal) as caught:
        client.completions.create(model="demo", prompt="And again " * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="prompt: it is empty"):
        client.completions.create(model="demo", prompt="")
    with pytest.raises(openai.BadRequestError, match="the model has no token 2147483647"):
        client.completions.create(model="demo", prompt=[2**31 - 1])


def test_unknown_fields_and_names_of_models_are_taken(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**SHORT | {"model": "gpt-x"}, extra_body={"frobnicate": {"a": [1]}})
    assert answer.model == "demo" and answer.choices[0].message.content
