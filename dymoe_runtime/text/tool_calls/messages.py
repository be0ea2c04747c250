"""Tools and their calls and results in a prompt: in the form that a chat template takes, or in words of our own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.tool_calls.formats import takes_tools
from dymoe_runtime.text.tool_calls.parser import ID_LENGTH
from dymoe_runtime.text.tool_calls.source import dumps

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]

# What a template without tools is given in their place; models know the marks from Hermes and Qwen.
DEFINITIONS = """\
You can call these tools, whose definitions are in JSON:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments between these marks:
<tool_call>
{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}
</tool_call>
The result comes in <tool_response> marks. Do not make results up."""
EMPTY = {"type": "object", "properties": {}}
# Mistral's templates refuse other ids.
_SHORT_IDS = re.compile(rf"length\s*!=\s*{ID_LENGTH}")
# Harmony's template writes the first call of a message alone.
_FIRST_CALL = re.compile(r"message\.tool_calls\[0\]")


def uses_tools(messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> bool:
    """Return whether a prompt has definitions, calls or results of tools."""
    said = [message for message in messages if isinstance(message, Mapping)]
    return bool(tools) or any(message.get("role") == "tool" or message.get("tool_calls") for message in said)


def variants(
    messages: Sequence[Mapping[str, Any]], tools: Tools | None, template: str
) -> Iterator[tuple[list[Message], Tools | None]]:
    """Yield messages and tools in the forms that templates take, the likeliest first; the first that renders counts.

    Raises DymoeError if the arguments of a call are no JSON object, or a template without tools is given a definition
    that has no name.
    """
    normal = [_normal(message, number) for number, message in enumerate(messages)]
    if not all(_is_call(call) for message in normal for call in message.get("tool_calls", ())):
        yield [dict(message) for message in messages], tools  # in a form of the template's own
        return
    if not takes_tools(template):
        check_tools(tools)
        plain = _merged([_spelled(message) for message in normal])
        yield _introduced(plain, tools, "system"), None
        yield _introduced(plain, tools, "user"), None
        return
    if "tool_calls" not in template:  # Granite 3 has what it wrote in the text of its messages
        normal = [_with_listed_calls(message) for message in normal]
    if _SHORT_IDS.search(template):
        normal = [_with_short_ids(message) for message in normal]
    if _FIRST_CALL.search(template):
        normal = list(_one_call_each(normal))
    yield normal, tools
    filled = [_filled(tool) for tool in tools] if tools else tools
    yield normal, filled
    yield [_with_text_arguments(message) for message in normal], filled


def check_tools(tools: object) -> None:
    """Raise DymoeError unless `tools` are None or definitions of functions in OpenAI's form."""
    if tools is None:
        return
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise DymoeError(f"the tools are of type {type(tools).__name__}; give a list of definitions")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise DymoeError(
                f"tool {number} has no function with a name; "
                'give {"type": "function", "function": {"name": ..., "parameters": ...}}'
            )


def _normal(message: Mapping[str, Any], number: int) -> Message:
    """Return a message whose content is a text and whose arguments are objects."""
    normal = dict(message)
    content = normal.get("content")
    if content is None:
        normal["content"] = ""
    elif isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        normal["content"] = "".join(part["text"] for part in content)
    calls = normal.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise DymoeError(f"message {number}: tool_calls is no list; give a list of calls")
        normal["tool_calls"] = [_normal_call(call, number) for call in calls]
    return normal


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _normal_call(call: Any, number: int) -> Any:
    """Return a call with its arguments as an object; one in another form than OpenAI's as it is."""
    if not _is_call(call):
        return call
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise DymoeError(
            f"message {number}: the arguments of the call of '{function['name']}' are no JSON object; give an object"
        )
    return {"type": "function", **call, "function": {**function, "arguments": dict(arguments)}}


def _filled(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a definition with a description and parameters, which some templates read without a look."""
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
        return tool
    return {"type": "function", **tool, "function": {"description": "", "parameters": EMPTY, **tool["function"]}}


def _with_listed_calls(message: Message) -> Message:
    """Return a message whose calls stand in its text, as Granite 3 writes them."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
    return message | {"content": f"{message['content']}<|tool_call|>{dumps(calls)}"} if calls else message


def _with_text_arguments(message: Message) -> Message:
    """Return a message whose arguments are texts of JSON."""
    return _changed(message, lambda f: {**f, "arguments": dumps(f["arguments"])})


def _changed(message: Message, change: Any) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return message | {"tool_calls": [{**call, "function": change(call["function"])} for call in calls]}


def _with_short_ids(message: Message) -> Message:
    """Return a message whose ids have the one length that Mistral's templates take."""
    changed = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = _short(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [call | {"id": _short(str(call.get("id")))} for call in message["tool_calls"]]
    return changed


def _short(text: str) -> str:
    if len(text) == ID_LENGTH and text.isalnum():
        return text
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:ID_LENGTH]


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """Yield messages with at most one call, each followed by its result."""
    results = list[Message]()
    for index, message in enumerate(messages):
        if message in results:
            continue
        calls = message.get("tool_calls") or []
        if message.get("thinking") and calls and message["content"]:  # it takes one of them beside a call
            message = message | {"thinking": f"{message['thinking']}\n{message['content']}", "content": ""}
        if len(calls) < 2:
            yield message
            continue
        following = list[Message]()
        for later in messages[index + 1 :]:
            if later.get("role") != "tool":
                break
            following.append(later)
        for number, call in enumerate(calls):
            first = {} if not number else {"content": "", "thinking": ""}
            yield message | {"tool_calls": [call]} | first
            own = [m for m in following if m.get("tool_call_id") == call.get("id") and m not in results]
            results += own
            yield from own


def _spelled(message: Message) -> Message:
    """Return a message without calls and results, which stand in its text instead."""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.pop("tool_calls", None) or ()
    functions = [{key: call["function"][key] for key in ("name", "arguments")} for call in calls]
    texts = [message["content"], *(f"<tool_call>\n{dumps(function)}\n</tool_call>" for function in functions)]
    return message | {"content": "\n".join(text for text in texts if text)} if calls else message


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Return messages in which each run of the user's is one, because templates want the roles by turns."""
    merged = list[Message]()
    for is_user, run in groupby(messages, lambda message: message.get("role") == "user"):
        said = list(run)
        texts = [message["content"] for message in said]
        joins = is_user and len(said) > 1 and all(isinstance(text, str) for text in texts)
        merged += [{"role": "user", "content": "\n".join(texts)}] if joins else said
    return merged


def _introduced(messages: Sequence[Message], tools: Tools | None, role: str) -> list[Message]:
    """Return messages the first of which, of that role, has the definitions of the tools."""
    if not tools:
        return list(messages)
    text = DEFINITIONS.format(tools="\n".join(dumps(tool["function"]) for tool in tools))
    first = messages[0] if messages else {}
    if first.get("role") == role:
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    if role == "user" and len(messages) > 1 and first.get("role") == "system":
        return [first, *_introduced(messages[1:], tools, role)]
    return [{"role": role, "content": text}, *messages]
