"""Calls whose arguments are given out while they are written: JSON, spelled anew piece by piece."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import NamedTuple

from dymoe_runtime.text.tool_calls.source import MAX_DEPTH, NotACall, Reading, Source, dumps, loads

_STRING_PART = re.compile(r'[^"\\]+')
_SCALAR_END = re.compile(r"[,}\]\s]")
_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
# The longest number that Python reads.
_MAX_SCALAR = 4300


class Opened(NamedTuple):
    """A call has begun; the texts that are yielded from here on are its arguments, until Closed comes."""

    name: str
    id: str | None


class Closed(NamedTuple):
    """The arguments of a call are complete."""


def read_arguments(source: Source, head: Opened) -> Reading[None]:
    """Read an object of arguments; yield Opened, the texts that join to it, and Closed."""
    if (yield from source.peek()) != "{":
        raise NotACall
    yield head
    yield from _value(source, 1)
    yield Closed()


def skip_members(source: Source) -> Reading[None]:
    """Go behind the object some of whose members have been read; raise NotACall if the rest is malformed."""
    while not (yield from source.accept("}")):
        yield from source.expect(",")
        yield from _silently(_member(source, 1))


def _silently(reading: Generator[object, None, None]) -> Reading[None]:
    for event in reading:
        if event is None:
            yield None


def _value(source: Source, depth: int) -> Reading[None]:
    """Read a value of JSON; yield texts that join to it, spelled as `dumps` does."""
    if depth > MAX_DEPTH:
        raise NotACall
    first = yield from source.peek()
    if first == '"':
        yield from _string(source)
    elif first in ("{", "["):
        source.position += 1
        yield first
        end = "}" if first == "{" else "]"
        more = not (yield from source.accept(end))
        while more:
            yield from _member(source, depth) if first == "{" else _value(source, depth + 1)
            more = yield from source.accept(",")
            if more:
                yield ", "
            else:
                yield from source.expect(end)
        yield end
    else:
        yield dumps(loads((yield from _scalar(source))))


def _member(source: Source, depth: int) -> Reading[None]:
    if (yield from source.peek()) != '"':
        raise NotACall
    yield from _string(source)
    yield from source.expect(":")
    yield ": "
    yield from _value(source, depth + 1)


def _scalar(source: Source) -> Reading[str]:
    begin = source.position
    while True:
        found = _SCALAR_END.search(source.text, begin)
        if found:
            source.position = found.start()
            return source.text[begin : found.start()]
        if len(source.text) - begin > _MAX_SCALAR:
            raise NotACall
        yield from source.more()


def _string(source: Source) -> Reading[None]:
    """Read a string behind its first quote; an escape, or the two of one character, come together."""
    source.position += 1
    yield '"'
    while True:
        text, at = source.text, source.position
        if at == len(text):
            yield from source.more()
        elif text[at] == '"':
            source.position += 1
            yield '"'
            return
        elif text[at] == "\\":
            escape = yield from _escape(source)
            yield dumps(loads(f'["{escape}"]')[0])[1:-1]
        else:
            found = _STRING_PART.match(text, at)
            assert found is not None
            source.position = found.end()
            yield dumps(found[0])[1:-1]


def _escape(source: Source) -> Reading[str]:
    """Read an escape; that of the first half of a surrogate pair with the second, if it follows."""
    begin = source.position
    yield from _wait_for(source, begin + 2)
    if source.text[begin + 1] == "u":
        yield from _wait_for(source, begin + 6)
    end = begin + (6 if source.text[begin + 1] == "u" else 2)
    if _HIGH.match(source.text, begin):
        while not source.ended and len(source.text) < end + 6 and "\\u".startswith(source.text[end : end + 2]):
            yield from source.more()
        end += 6 if _PAIR.match(source.text, begin) else 0
    source.position = end
    return source.text[begin:end]


def _wait_for(source: Source, length: int) -> Reading[None]:
    while len(source.text) < length:
        yield from source.more()
