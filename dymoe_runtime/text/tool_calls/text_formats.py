"""Formats that write arguments as text between marks, as XML would, or in a notation of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from dymoe_runtime.text.tool_calls.call import MAX_CALLS, Call
from dymoe_runtime.text.tool_calls.source import MAX_DEPTH, NotACall, Reading, Source, checked_name, loads
from dymoe_runtime.text.tool_calls.values import ANY, CONSTANTS, STRING, Schemas

QUOTE = '<|"|>'
_VALUE_END = re.compile(r"[,}\]]")


def read_functions(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read `<function=NAME><parameter=KEY>VALUE</parameter></function>`, as Qwen3-Coder and Qwen3.5 write it.

    It stands in `<tool_call>`, which the models sometimes leave out. A line break after and before a mark is none of
    the value.
    """
    yield from source.accept("<tool_call>")
    calls = yield from _several(source, "<function=", partial(_function, source, schemas))
    yield from source.accept("</tool_call>")
    return calls


def _function(source: Source, schemas: Schemas) -> Reading[Call]:
    name, _ = yield from source.name(">")
    arguments: dict[str, Any] = {}
    while not (yield from source.accept("</function>")):
        yield from source.expect("<parameter=")
        key = yield from source.key(">")
        text, _ = yield from source.until("</parameter>")
        arguments[key] = schemas.value(name, key, text.removeprefix("\n").removesuffix("\n"), STRING)
    return Call(name, arguments)


def read_invocations(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read `<invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>` in MiniMax-M2's marks."""
    yield from source.expect("<minimax:tool_call>")
    calls = yield from _several(source, '<invoke name="', partial(_invocation, source, schemas))
    yield from source.accept("</minimax:tool_call>")
    return calls


def _invocation(source: Source, schemas: Schemas) -> Reading[Call]:
    name, _ = yield from source.name('">')
    arguments: dict[str, Any] = {}
    while (yield from source.accept('<parameter name="')):
        key = yield from source.key('">')
        text, _ = yield from source.until("</parameter>")
        arguments[key] = schemas.value(name, key, text, STRING)
    yield from source.expect("</invoke>")
    return Call(name, arguments)


def _several(source: Source, begin: str, read: Callable[[], Reading[Call]]) -> Reading[list[Call]]:
    """Read calls, each after the mark `begin`: at least one, up to the first that is malformed."""
    yield from source.expect(begin)
    calls = [(yield from read())]
    while len(calls) < MAX_CALLS:
        end = source.position
        try:
            if not (yield from source.accept(begin)):
                break
            calls.append((yield from read()))
        except NotACall:
            source.position = end
            break
    return calls


def read_pairs(source: Source, schemas: Schemas, suffix: str = "") -> Reading[list[Call]]:
    """Read `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`, GLM-4.5's format.

    Laguna and Hy3 write it, too; the marks of Hy3 end with a `suffix`, and it puts calls between marks of a list.
    """
    yield from source.accept(f"<tool_calls{suffix}>")
    yield from source.expect(f"<tool_call{suffix}>")
    key_mark, end = f"<arg_key{suffix}>", f"</tool_call{suffix}>"
    name, mark = yield from source.name(key_mark, end, f"<tool_sep{suffix}>")
    if mark.startswith("<tool_sep"):
        mark = key_mark if (yield from source.accept(key_mark)) else end
        if mark == end:
            yield from source.expect(end)
    arguments: dict[str, Any] = {}
    while mark == key_mark:
        key = yield from source.key(f"</arg_key{suffix}>")
        yield from source.expect(f"<arg_value{suffix}>")
        text, _ = yield from source.until(f"</arg_value{suffix}>")
        arguments[key] = schemas.value(name, key, text, ANY)
        if not (yield from source.accept(key_mark)):
            yield from source.expect(end)
            mark = end
    yield from source.accept(f"</tool_calls{suffix}>")
    return [Call(name, arguments)]


read_hy3_pairs = partial(read_pairs, suffix=":opensource")


def read_gemma(source: Source, schemas: Schemas) -> Reading[list[Call]]:
    """Read `<|tool_call>call:NAME{KEY:VALUE,...}<tool_call|>`, whose strings stand in marks of Gemma 4's own."""
    yield from source.expect("<|tool_call>")
    yield from source.expect("call:")
    name, _ = yield from source.name("{")
    body, _ = yield from source.until("<tool_call|>")
    body = body.rstrip()
    arguments, end = _object(body, 0, 1)
    if end != len(body):
        raise NotACall
    return [Call(name, arguments)]


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    """Return the object behind whose `{` the text continues at `at`, and where it ends."""
    values: dict[str, Any] = {}
    at = _behind_space(text, at)
    if text.startswith("}", at):
        return values, at + 1
    while True:
        if text.startswith(QUOTE, at):
            key, at = _quoted(text, at)
            at = _behind_space(text, at)
            if not text.startswith(":", at):
                raise NotACall
            at += 1
        else:
            colon = text.find(":", at)
            if colon < 0:
                raise NotACall
            key, at = checked_name(text[at:colon].strip()), colon + 1
        values[key], at = _value(text, _behind_space(text, at), depth)
        at = _behind_space(text, at)
        if text.startswith("}", at):
            return values, at + 1
        if not text.startswith(",", at):
            raise NotACall
        at = _behind_space(text, at + 1)


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    values = list[Any]()
    at = _behind_space(text, at)
    if text.startswith("]", at):
        return values, at + 1
    while True:
        value, at = _value(text, _behind_space(text, at), depth)
        values.append(value)
        at = _behind_space(text, at)
        if text.startswith("]", at):
            return values, at + 1
        if not text.startswith(",", at):
            raise NotACall
        at += 1


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise NotACall
    if text.startswith(QUOTE, at):
        return _quoted(text, at)
    if text.startswith("{", at):
        return _object(text, at + 1, depth + 1)
    if text.startswith("[", at):
        return _list(text, at + 1, depth + 1)
    found = _VALUE_END.search(text, at)
    end = len(text) if found is None else found.start()
    word = text[at:end].strip()
    return loads(CONSTANTS.get(word, word)), end


def _quoted(text: str, at: int) -> tuple[str, int]:
    begin = at + len(QUOTE)
    end = text.find(QUOTE, begin)
    if end < 0:
        raise NotACall
    return text[begin:end], end + len(QUOTE)


def _behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
