"""The request of POST /v1/responses, and its input as chat templates take it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from dymoe_runtime.serving.http.answers.prompts import Message
from dymoe_runtime.serving.http.exchange.errors import bad_field
from dymoe_runtime.serving.http.openai.fields import Likely, Penalty, Seed, Share, Temperature, Tokens, TopK
from dymoe_runtime.serving.http.openai.messages import ContentPart, arguments_of, text_of


class InputItem(msgspec.Struct):
    """A message, a call of a function, its output, or the reasoning of an earlier answer."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None


class FunctionTool(msgspec.Struct):
    """A tool that the model may call; others than functions are left out."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolName(msgspec.Struct):
    """The tool that the model must call."""

    type: str
    name: str | None = None


class TextFormat(msgspec.Struct):
    """The format that the text must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct):
    """How much the model thinks."""

    effort: str | None = None
    summary: str | None = None


class ResponseRequest(msgspec.Struct, kw_only=True):
    """A text or a conversation to answer."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    max_output_tokens: Tokens | None = None
    top_logprobs: Likely | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def check(body: ResponseRequest) -> None:
    """Raise ApiError for what needs a server that keeps responses."""
    if body.previous_response_id is not None:
        raise bad_field("previous_response_id", "this server keeps no responses; send the whole conversation as input")
    if body.background:
        raise bad_field("background", "this server keeps no responses; wait for this one, or stream it")


def template_messages(body: ResponseRequest, reasoning_key: str) -> list[Message]:
    """Return the input as messages for chat templates; raise ApiError for items that no template takes."""
    made: list[Message] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*made, {"role": "user", "content": body.input}]
    names: dict[str, str] = {}
    for i, item in enumerate(body.input):
        where = f"input[{i}]"
        kind = item.type or "message"
        if kind == "message":
            if item.role is None:
                raise bad_field(f"{where}.role", "this field is required")
            role = "system" if item.role == "developer" else item.role
            message = {"role": role, "content": text_of(item.content, f"{where}.content")}
            _append(made, message) if role == "assistant" else made.append(message)
        elif kind == "function_call":
            names[item.call_id or ""] = item.name or ""
            function = {"name": item.name or "", "arguments": arguments_of(item.arguments or "", where)}
            call = {"id": item.call_id or "", "type": "function", "function": function}
            _append(made, {"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            call_id = item.call_id or ""
            output = text_of(item.output, f"{where}.output")
            made.append({"role": "tool", "content": output, "tool_call_id": call_id, "name": names.get(call_id, "")})
        elif kind == "reasoning":
            parts = item.content or item.summary
            _append(made, {"role": "assistant", "content": "", reasoning_key: [text_of(parts, f"{where}.content")]})
        else:
            raise bad_field(f"{where}.type", f"items of type '{kind[:40]}' are not supported; send messages and calls")
    if not made:
        raise bad_field("input", "it is empty; send at least one message")
    for message in made:  # a join each time would copy what came before
        if reasoning_key in message:
            message[reasoning_key] = "".join(message[reasoning_key])
    return made


def definitions(tools: list[FunctionTool]) -> list[dict[str, Any]]:
    """Return the definitions of functions in the form of chat completions; raise ApiError for one without a name.

    Other tools, which a provider would run, are left out: agents offer them to every server.
    """
    made = []
    for i, tool in enumerate(tools):
        if tool.type != "function":
            continue
        if not tool.name:
            raise bad_field(f"tools[{i}].name", "this field is required")
        function = {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters or {}}
        made.append({"type": "function", "function": function})
    return made


def _append(messages: list[Message], part: Message) -> None:
    """Add a part of an answer to the message before it, if that is one and the part goes on with it."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or (part["content"] and (last["content"] or last.get("tool_calls"))):
        messages.append(part)
        return
    last["content"] += part["content"]
    if "tool_calls" in part:
        last.setdefault("tool_calls", []).extend(part["tool_calls"])
    for key in part.keys() - {"role", "content", "tool_calls"}:
        last.setdefault(key, []).extend(part[key])
