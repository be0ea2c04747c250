"""Messages of OpenAI's chat completions, and as chat templates take them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from dymoe_runtime.serving.http.answers.prompts import Message
from dymoe_runtime.serving.http.exchange.errors import bad_field


class ContentPart(msgspec.Struct):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct):
    """A function, and its arguments as JSON."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct):
    """A call that an earlier answer made."""

    function: FunctionCall
    id: str = ""
    type: str = "function"


class ChatMessage(msgspec.Struct):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


def template_messages(messages: list[ChatMessage], reasoning_key: str) -> list[Message]:
    """Return messages as chat templates take them; raise ApiError for parts that are no text."""
    names: dict[str, str] = {}
    return [_message(message, f"messages[{i}]", reasoning_key, names) for i, message in enumerate(messages)]


def _message(message: ChatMessage, where: str, reasoning_key: str, names: dict[str, str]) -> Message:
    role = "system" if message.role == "developer" else message.role
    made: Message = {"role": role, "content": text_of(message.content, f"{where}.content")}
    if message.name:
        made["name"] = message.name
    if message.reasoning_content:
        made[reasoning_key] = message.reasoning_content
    if message.tool_calls:
        made["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
        names |= {call.id: call.function.name for call in message.tool_calls}
    if message.role == "tool":
        made["tool_call_id"] = message.tool_call_id or ""
        if message.tool_call_id in names:  # some templates want the name of the function
            made.setdefault("name", names[message.tool_call_id])
    return made


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    """Return a call with its arguments as values, as templates expect them."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments_of(call.function.arguments, where)},
    }


def arguments_of(text: str, where: str) -> dict[str, Any]:
    """Return the arguments of a call; raise ApiError unless they are a JSON object."""
    try:
        values = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise bad_field(f"{where}.function.arguments", "expected a JSON object, as text")
    return values


def text_of(content: str | list[ContentPart] | None, where: str) -> str:
    """Return the text of a content; raise ApiError if a part is something else."""
    if content is None or isinstance(content, str):
        return content or ""
    for i, part in enumerate(content):
        if part.text is None:
            kind = part.type[:40]
            raise bad_field(f"{where}[{i}]", f"parts of type '{kind}' are not supported by the model; send text")
    return "\n".join(part.text or "" for part in content)
