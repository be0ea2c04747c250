"""Requests of Anthropic's protocol, and their messages as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from dymoe_runtime.serving.http.answers.prompts import Message
from dymoe_runtime.serving.http.exchange.errors import bad_field
from dymoe_runtime.serving.http.openai.fields import Share, Stops, Temperature, Tokens, TopK


class Block(msgspec.Struct):
    """A part of a message: text, thinking, a call of a tool, or its result."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None


class InputMessage(msgspec.Struct):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(msgspec.Struct):
    """A tool that the model may call."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None


class ToolChoice(msgspec.Struct):
    """Whether the model may, must or must not call a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct):
    """The format that the text must have."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    """How the answer is written."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct):
    """A conversation whose tokens are counted."""

    messages: list[InputMessage]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """A conversation to answer."""

    output_format: OutputFormat | None = None  # where it was before output_config
    max_tokens: Tokens
    stream: bool | None = None
    stop_sequences: Stops | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None


def template_messages(request: CountRequest, reasoning_key: str) -> list[Message]:
    """Return the messages as chat templates take them; raise ApiError for parts that no template takes."""
    made: list[Message] = []
    if request.system:
        made.append({"role": "system", "content": _text(request.system, "system")})
    names: dict[str, str] = {}
    for i, message in enumerate(request.messages):
        where = f"messages[{i}].content"
        if isinstance(message.content, str):
            made.append({"role": message.role, "content": message.content})
        elif message.role == "system":
            made.append({"role": "system", "content": _text(message.content, where)})
        elif message.role == "assistant":
            made.append(_assistant(message.content, where, reasoning_key, names))
        else:
            made += _user(message.content, where, names)
    return made


def definitions(tools: Iterable[AnthropicTool]) -> list[dict[str, Any]]:
    """Return the definitions of tools in OpenAI's form, as chat templates take them; raise ApiError for malformed ones.

    Tools that a provider would run, which have a type of their own and no schema, are left out.
    """
    made = []
    for i, tool in enumerate(tools):
        if tool.input_schema is None:
            if tool.type not in (None, "custom"):
                continue
            raise bad_field(f"tools[{i}].input_schema", "this field is required")
        function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
        made.append({"type": "function", "function": function})
    return made


def choice_of(choice: ToolChoice | None) -> Any:
    """Return a choice of tools as OpenAI's protocol has it."""
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise bad_field("tool_choice.name", "this field is required")
        return {"name": choice.name}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _assistant(blocks: list[Block], where: str, reasoning_key: str, names: dict[str, str]) -> Message:
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for i, block in enumerate(blocks):
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            if not block.name:
                raise bad_field(f"{where}[{i}].name", "this field is required")
            names[block.id or ""] = block.name
            function = {"name": block.name, "arguments": block.input or {}}
            calls.append({"id": block.id or "", "type": "function", "function": function})
        elif block.type != "redacted_thinking":
            raise _unknown(block, f"{where}[{i}]")
    message: Message = {"role": "assistant", "content": "\n".join(texts)}
    if any(thoughts):
        message[reasoning_key] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _user(blocks: list[Block], where: str, names: dict[str, str]) -> list[Message]:
    """Return results of tools as messages of their own, then the text, as they come."""
    made: list[Message] = []
    texts = list[str]()
    for i, block in enumerate(blocks):
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "tool_result":
            text = _text(block.content or "", f"{where}[{i}].content")
            call_id = block.tool_use_id or ""
            if block.is_error:
                text = json.dumps({"error": text}, ensure_ascii=False)
            made.append({"role": "tool", "content": text, "tool_call_id": call_id, "name": names.get(call_id, "")})
        else:
            raise _unknown(block, f"{where}[{i}]")
    if texts or not made:
        made.append({"role": "user", "content": "\n".join(texts)})
    return made


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for i, block in enumerate(content):
        if block.type != "text":
            raise _unknown(block, f"{where}[{i}]")
    return "\n".join(block.text or "" for block in content)


def _unknown(block: Block, where: str) -> Exception:
    return bad_field(where, f"blocks of type '{block.type[:40]}' are not supported by the model; send text")
