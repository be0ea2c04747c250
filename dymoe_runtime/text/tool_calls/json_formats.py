"""Formats whose calls are JSON: objects or lists of them, between the marks of a family."""

from __future__ import annotations

from dymoe_runtime.text.tool_calls.call import MAX_CALLS, Call, calls_of, known_id
from dymoe_runtime.text.tool_calls.source import NotACall, Reading, Source
from dymoe_runtime.text.tool_calls.values import Schemas


def read_tagged(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes, Qwen3 and Granite 4 write it."""
    yield from source.expect("<tool_call>")
    return (yield from _read_json(source, "</tool_call>"))


def read_tagged_list(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read `<tool_calls>[{"name": ..., "arguments": {...}}, ...]</tool_calls>`, as Hunyuan-A13B writes it."""
    yield from source.expect("<tool_calls>")
    return (yield from _read_json(source, "</tool_calls>"))


def read_action(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read a list with `tool_name` and `parameters` between Cohere's marks of an action."""
    yield from source.expect("<|START_ACTION|>")
    return (yield from _read_json(source, "<|END_ACTION|>"))


def read_granite(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]`, as Granite 3 writes it: no mark ends it."""
    yield from source.expect("<|tool_call|>")
    return calls_of((yield from source.json()))


def read_mistral(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read `[TOOL_CALLS]` and a list, or in newer versions a name, `[ARGS]` and an object."""
    yield from source.expect("[TOOL_CALLS]")
    if (yield from source.peek()) == "[":
        return calls_of((yield from source.json()))
    name, mark = yield from source.name("[CALL_ID]", "[ARGS]", "{")
    call_id = None
    if mark == "[CALL_ID]":
        call_id, mark = yield from source.name("[ARGS]")
    if mark == "{":
        source.position -= 1
    arguments = yield from source.json()
    if not isinstance(arguments, dict):
        raise NotACall
    return [Call(name, arguments, known_id(call_id))]


def read_solar(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read an id, a name and an object of arguments, each after its mark, as Solar Open writes them."""
    yield from source.expect("<|tool_call:begin|>")
    call_id, _ = yield from source.until("<|tool_call:name|>", most=64)
    name, _ = yield from source.name("<|tool_call:args|>")
    arguments = yield from source.json()
    yield from source.accept("<|tool_call:end|>")
    if not isinstance(arguments, dict):
        raise NotACall
    return [Call(name, arguments, known_id(call_id.strip()))]


def read_harmony(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read a message to a function, as `ChannelSplitter` spells it."""
    yield from source.expect("<|channel|>commentary to=")
    recipient, _ = yield from source.name("<|message|>")
    arguments: object = {}
    if not (yield from source.accept("<|call|>")):
        arguments = yield from source.json()
        yield from source.accept("<|call|>")
    if not isinstance(arguments, dict):
        raise NotACall
    return [Call(recipient.removeprefix("functions."), arguments)]


def read_bare(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read `{"name": ..., "parameters": {...}}` at the begin of an answer, as Llama 4 writes it.

    Several objects may follow each other, with a semicolon between them. Only the names of tools are calls, because an
    answer may be an object, too.
    """
    while (yield from source.accept("<|python_start|>")) or (yield from source.accept("<|python_end|>")):
        pass
    calls = list[Call]()
    end = source.position
    try:
        while len(calls) < MAX_CALLS:
            calls += yield from _named(source, schemas)
            yield from source.accept("<|python_end|>")
            yield from source.accept(";")
            end = source.position
            if (yield from source.peek()) != "{":
                break
    except NotACall:
        if not calls:
            raise
        source.position = end
    return calls


def _named(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read JSON that describes calls of tools by their names."""
    calls = calls_of((yield from source.json()))
    if not all(call.name in schemas for call in calls):
        raise NotACall
    return calls


def _read_json(source: Source, end: str) -> Reading[list[Call]]:
    """Read the calls, and the mark at their end, which a model may leave out."""
    calls = calls_of((yield from source.json()))
    while (yield from source.peek()) in ("{", "[") and len(calls) < MAX_CALLS:
        begin = source.position
        try:
            calls += calls_of((yield from source.json()))
        except NotACall:
            source.position = begin
            break
    yield from source.accept(end)
    return calls
