"""Formats whose calls are JSON: objects or lists of them, between the marks of a family."""

from __future__ import annotations

from collections.abc import Callable

from dymoe_runtime.text.tool_calls.call import ARGUMENTS, MAX_CALLS, NAMES, Call, calls_of, known_id
from dymoe_runtime.text.tool_calls.pieces import Opened, read_arguments, skip_members
from dymoe_runtime.text.tool_calls.source import NotACall, Reading, Source
from dymoe_runtime.text.tool_calls.values import Schemas

# Keys with an id, which may come before the name.
IDS = ("id", "tool_call_id")


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
        return calls_of((yield from source.json()))  # whole, because ids may stand at the end of a call
    name, mark = yield from source.name("[CALL_ID]", "[ARGS]", "{")
    call_id = None
    if mark == "[CALL_ID]":
        call_id, mark = yield from source.name("[ARGS]")
    if mark == "{":
        source.position -= 1
    return (yield from _call(source, name, known_id(call_id)))


def read_solar(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read an id, a name and an object of arguments, each after its mark, as Solar Open writes them."""
    yield from source.expect("<|tool_call:begin|>")
    call_id, _ = yield from source.until("<|tool_call:name|>", most=64)
    name, _ = yield from source.name("<|tool_call:args|>")
    calls = yield from _call(source, name, known_id(call_id.strip()))
    yield from source.accept("<|tool_call:end|>")
    return calls


def read_harmony(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read a message to a function, as `ChannelSplitter` spells it."""
    yield from source.expect("<|channel|>commentary to=")
    recipient, _ = yield from source.name("<|message|>")
    name = recipient.removeprefix("functions.")
    if (yield from source.accept("<|call|>")):
        return [Call(name, {})]
    calls = yield from _call(source, name, None)
    yield from source.accept("<|call|>")
    return calls


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
    if source.piecewise and (yield from _pieces(source, schemas.__contains__)):
        return []
    calls = calls_of((yield from source.json()))
    if not all(call.name in schemas for call in calls):
        raise NotACall
    return calls


def _described(source: Source) -> Reading[list[Call]]:
    """Read JSON that describes calls; return those that were not given out in pieces."""
    if source.piecewise and (yield from _pieces(source)):
        return []
    return calls_of((yield from source.json()))


def _call(source: Source, name: str, call_id: str | None) -> Reading[list[Call]]:
    """Read the arguments of a call; return it unless it was given out in pieces."""
    if source.piecewise:
        yield from read_arguments(source, Opened(name, call_id))
        return []
    arguments = yield from source.json()
    if not isinstance(arguments, dict):
        raise NotACall
    return [Call(name, arguments, call_id)]


def _read_json(source: Source, end: str) -> Reading[list[Call]]:
    """Read the calls, and the mark at their end, which a model may leave out."""
    calls = yield from _described(source)
    while (yield from source.peek()) in ("{", "[") and len(calls) < MAX_CALLS:
        begin = source.position
        try:
            calls += yield from _described(source)
        except NotACall:
            source.position = begin
            break
    yield from source.accept(end)
    return calls


def _pieces(source: Source, is_tool: Callable[[str], bool] = lambda name: True) -> Reading[bool]:
    """Read an object that describes a call, or a list of them; yield Opened, texts, Closed, and Calls that come whole.

    Returns False, having read nothing, where it is not written so that the arguments can come as they are written: the
    name before them. Raises NotACall, perhaps in the middle of a call, where what follows is malformed.
    """
    begin, begun = source.position, False
    is_list = yield from source.accept("[")
    for _ in range(MAX_CALLS):
        head = yield from _head(source)
        if head is not None and is_tool(head.name):
            begun = True
            yield from read_arguments(source, head)
            yield from skip_members(source)
        elif begun:
            yield from calls_of((yield from source.json()))
        else:
            source.position = begin
            return False
        if not is_list or (yield from source.accept("]")):
            return True
        yield from source.expect(",")
    raise NotACall


def _head(source: Source) -> Reading[Opened | None]:
    """Read `{"name": "...", "arguments":` up to the object; return None, having read nothing, where there is none."""
    begin = source.position
    try:
        yield from source.expect("{")
        call_id, key = None, (yield from _key(source, (*IDS, *NAMES)))
        if key in IDS:
            given, _ = yield from source.until('"', most=64)
            call_id = known_id(given) if key == "id" else None
            yield from source.expect(",")
            key = yield from _key(source, NAMES)
        name, _ = yield from source.name('"')
        yield from source.expect(",")
        yield from _key(source, ARGUMENTS, quoted=False)
        if (yield from source.peek()) == "{":
            return Opened(name, call_id)
    except NotACall:
        pass
    source.position = begin
    return None


def _key(source: Source, keys: tuple[str, ...], quoted: bool = True) -> Reading[str]:
    """Read one of `keys`, a colon, and the quote of a string; raise NotACall if something else comes."""
    for key in keys:
        if (yield from source.accept(f'"{key}"')):
            yield from source.expect(":")
            if quoted:
                yield from source.expect('"')
            return key
    raise NotACall
