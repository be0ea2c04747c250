"""Text that arrives in pieces, read by generators that pause until there is more of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Generator
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
# A generator that reads: it yields None where it needs more text, and what it gives out already (pieces.py); it returns
# what it has read.
Reading = Generator[object, None, T]

# The most characters of a call; the longest sensible ones write a file.
MAX_CALL = 1 << 20
# The deepest nesting of lists and objects in arguments.
MAX_DEPTH = 64
# The most characters of a function's or an argument's name, and what it is made of.
MAX_NAME = 256
_NAME = re.compile(rf"[\w.:/@-]{{1,{MAX_NAME}}}")
_KEY = re.compile(rf'[^<>{{}}"\x00-\x1f]{{1,{MAX_NAME}}}')
SPACE = " \t\r\n"
_BRACKETS = re.compile(r'["{}\[\]]')
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_STRING_END = re.compile(r'["\\]')


class NotACall(Exception):  # no error: the text is text
    """What was read is not a call of the format."""


class Source:
    """A growing text, and a position in it from which methods read. Methods that may have to wait are generators."""

    def __init__(self, piecewise: bool = False) -> None:
        """Begin with no text; with `piecewise`, readers give out arguments while they are written."""
        self.text = ""
        self.position = 0
        self.ended, self.piecewise = False, piecewise

    def add(self, text: str) -> None:
        """Append text."""
        self.text += text

    def drop(self) -> None:
        """Forget the text before the position."""
        self.text, self.position = self.text[self.position :], 0

    def more(self) -> Reading[None]:
        """Wait for more text; raise NotACall if there is none, or there is too much already."""
        if self.ended or len(self.text) > MAX_CALL:
            raise NotACall
        yield None

    def skip_space(self) -> Reading[None]:
        """Go to the next character that is no white space, or to the end of the text."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in SPACE:
                self.position += 1
            if self.position < len(self.text) or self.ended:
                return
            yield from self.more()

    def peek(self) -> Reading[str]:
        """Return the next character that is no white space, or an empty text at the end."""
        yield from self.skip_space()
        return self.text[self.position : self.position + 1]

    def accept(self, mark: str) -> Reading[bool]:
        """Return whether `mark` follows after white space; go behind it if so."""
        yield from self.skip_space()
        while True:
            if self.text.startswith(mark, self.position):
                self.position += len(mark)
                return True
            if self.ended or not mark.startswith(self.text[self.position :]):
                return False
            yield from self.more()

    def expect(self, mark: str) -> Reading[None]:
        """Go behind `mark`, which may follow white space; raise NotACall if it does not come next."""
        if not (yield from self.accept(mark)):
            raise NotACall

    def until(self, *marks: str, most: int = MAX_CALL) -> Reading[tuple[str, str]]:
        """Return the text before the first of `marks`, and that mark; go behind it.

        Raises NotACall if none comes within `most` characters.
        """
        begin, longest = self.position, max(map(len, marks))
        searched = begin
        while True:
            last = begin + most + longest
            found = [(at, mark) for mark in marks if (at := self.text.find(mark, searched, last)) >= 0]
            if found:
                at, mark = min(found)
                self.position = at + len(mark)
                return self.text[begin:at], mark
            searched = max(begin, len(self.text) - longest + 1)
            if searched - begin > most:
                raise NotACall
            yield from self.more()

    def name(self, *marks: str) -> Reading[tuple[str, str]]:
        """Return a function's name before the first of `marks`, and that mark; raise NotACall if it is none."""
        name, mark = yield from self.until(*marks, most=MAX_NAME)
        return checked_name(name.strip()), mark

    def key(self, *marks: str) -> Reading[str]:
        """Return an argument's name before the first of `marks`; raise NotACall if it is none."""
        key, _ = yield from self.until(*marks, most=MAX_NAME)
        return checked_key(key.strip())

    def json(self) -> Reading[Any]:
        """Return the JSON object or list that follows; raise NotACall if none does."""
        yield from self.skip_space()
        begin = at = self.position
        if not self.text.startswith(("{", "["), begin):
            raise NotACall
        depth, in_string = 0, False
        while True:
            found = (_STRING_END if in_string else _BRACKETS).search(self.text, at)
            if found is None or (found[0] == "\\" and found.end() == len(self.text)):
                at = len(self.text) if found is None else found.start()
                yield from self.more()
                continue
            at = found.end()
            if found[0] == "\\":
                at += 1
            elif found[0] == '"':
                in_string = not in_string
            else:
                depth += 1 if found[0] in "{[" else -1
                if depth > MAX_DEPTH:
                    raise NotACall
            if not depth:
                self.position = at
                return loads(self.text[begin:at])


def loads(text: str) -> Any:
    """Return the value of JSON, in whose strings line breaks may stand; raise NotACall if the text is none."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise NotACall from error


def dumps(value: Any) -> str:
    """Return JSON that UTF-8 can encode: halves of surrogate pairs are escaped."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):x}", json.dumps(value, ensure_ascii=False))


def checked_name(name: object) -> str:
    """Return the name of a function; raise NotACall if it is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise NotACall
    return name


def checked_key(key: str) -> str:
    """Return the name of an argument; raise NotACall if it is none."""
    if not _KEY.fullmatch(key):
        raise NotACall
    return key


def _refuse(text: str) -> NoReturn:
    raise NotACall


def _finite(text: str) -> float:
    """Return a number; one that is too large for a float is the largest, because JSON has no other for it."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))
