"""Requests of Ollama's protocol, and their messages as chat templates take them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dymoe_runtime.serving.http.answers.prompts import Message
from dymoe_runtime.serving.http.exchange.errors import bad_field
from dymoe_runtime.serving.http.openai.fields import Likely, Penalty, Repetition, Seed, Share, Stops, Temperature, TopK

MAX_TOKENS = (1 << 31) - 1
Predict = Annotated[int, Meta(ge=-2, le=MAX_TOKENS)]


class Options(msgspec.Struct):
    """How tokens are chosen, and when an answer ends; options of other kinds change nothing here."""

    num_predict: Predict | None = None  # below 1: until the model ends
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    stop: str | Stops | None = None
    repeat_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


class PastFunction(msgspec.Struct):
    """A function that an earlier answer called."""

    name: str
    arguments: dict[str, Any] | None = None


class PastCall(msgspec.Struct):
    """A call that an earlier answer made."""

    function: PastFunction
    id: str | None = None


class OllamaMessage(msgspec.Struct):
    """A message of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[PastCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Definition(msgspec.Struct):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OllamaTool(msgspec.Struct):
    """A tool that the model may call."""

    function: Definition
    type: str = "function"


class Common(msgspec.Struct):
    """Fields of chats and of plain texts."""

    model: str
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: str | float | None = None
    logprobs: bool | None = None
    top_logprobs: Likely | None = None


class OllamaChat(Common, kw_only=True):
    """A conversation to answer; without messages it only makes sure that the model is loaded."""

    messages: list[OllamaMessage] | None = None
    tools: list[OllamaTool] | None = None


class GenerateRequest(Common, kw_only=True):
    """A text to answer, or with `raw` to continue; without one it only makes sure that the model is loaded."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    raw: bool | None = None
    images: list[str] | None = None


class ShowRequest(msgspec.Struct):
    """A model to describe."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def template_messages(messages: list[OllamaMessage], reasoning_key: str) -> list[Message]:
    """Return messages as chat templates take them; raise ApiError for images."""
    made = []
    for i, message in enumerate(messages):
        if message.images:
            raise bad_field(f"messages[{i}].images", "images are not supported by the model; send text")
        one: Message = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            one[reasoning_key] = message.thinking
        if message.tool_calls:
            one["tool_calls"] = [
                {
                    "id": call.id or "",
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments or {}},
                }
                for call in message.tool_calls
            ]
        if message.role == "tool":
            one |= {"name": message.tool_name or "", "tool_call_id": message.tool_call_id or ""}
        made.append(one)
    return made


def definitions(tools: list[OllamaTool]) -> list[dict[str, Any]]:
    """Return the definitions of tools in OpenAI's form, as chat templates take them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {},
            },
        }
        for tool in tools
    ]
