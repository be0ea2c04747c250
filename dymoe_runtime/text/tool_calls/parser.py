"""The parser of a stream of text: what is a call of a tool, and what is text."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from dymoe_runtime.text.tool_calls.call import Call
from dymoe_runtime.text.tool_calls.pieces import Closed, Opened
from dymoe_runtime.text.tool_calls.source import SPACE, NotACall, Reading, Source, dumps
from dymoe_runtime.text.tool_calls.values import Schemas

# The most calls that are tried and turn out to be none: each may be read to its end before that is known.
MAX_FAILURES = 32
# Templates of Mistral take ids of 9 letters and digits, the others any.
ID_LENGTH, ID_CHARS = 9, string.ascii_letters + string.digits


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call: the first one of an index has the function's name; the arguments of all join to JSON."""

    index: int
    id: str
    name: str | None
    arguments: str


class Parsed(NamedTuple):
    """What became certain: text of the answer, and calls."""

    content: str = ""
    calls: tuple[CallDelta, ...] = ()


class ToolCallParser(Protocol):
    """A filter that takes calls of tools out of the text of an answer, however that is divided into pieces."""

    @property
    def full(self) -> bool:
        """Return whether the most calls have come, so that the answer may end."""

    def push(self, text: str) -> Parsed:
        """Return what the next piece of text makes certain."""

    def flush(self) -> Parsed:
        """Return what was held back; call it at the end of the answer."""


class Format(NamedTuple):
    """How a family writes calls: the marks that begin one, and how it is read from there on.

    `special` are the marks that may be special tokens. Where `bare` is set, a call begins with one of `begins` at the
    begin of the answer alone.
    """

    begins: tuple[str, ...]
    read: Callable[[Source, Schemas], Reading[list[Call]]]
    special: tuple[str, ...] = ()
    bare: bool = False


class StreamParser:
    """A parser for one answer by a format.

    A call appears once it is complete, in one piece, because a malformed one must stay text. With `piecewise`, the
    arguments of formats in JSON come while they are written, and join to what they would be in one piece; a call that
    turns out to be malformed ends there, and the rest is text. White space beside calls is dropped. Text that could
    begin a call is held back.
    """

    def __init__(
        self,
        form: Format,
        tools: Sequence[Mapping[str, Any]] = (),
        make_id: Callable[[], str] | None = None,
        *,
        limit: int | None = None,
        piecewise: bool = False,
    ) -> None:
        """Begin with an answer to a prompt with `tools`, in OpenAI's form; what follows `limit` calls is dropped.

        `make_id` returns the id of a call to which the model gave none; the default is 9 random letters and digits.
        """
        self._form, self._schemas = form, Schemas(tools)
        self._make_id = make_id or _random_id
        self._source, self._limit = Source(piecewise), limit
        self._reading: Iterator[object] | None = None
        self._open = False  # a call whose arguments come in pieces
        self._given = -1  # where the text ends of which pieces were given out, if any were
        self._calls: list[Call] = []
        self._space = ""  # white space after text, which is dropped before a call
        self._clean = True  # nothing but white space since the begin or the last call
        self._count = self._failures = 0

    @property
    def full(self) -> bool:
        """Return whether the most calls have come."""
        return self._count == self._limit and not self._open

    def push(self, text: str) -> Parsed:
        """Return what the next piece of text makes certain."""
        self._source.add(text)
        return self._parse()

    def flush(self) -> Parsed:
        """Return what was held back; call it at the end of the answer."""
        self._source.ended = True
        content, calls = self._parse()
        space, self._space = self._space, ""
        return Parsed(content + space, calls)

    def _parse(self) -> Parsed:
        content, deltas = list[str](), list[CallDelta]()
        while not self.full and (self._reading is not None or self._begin(content)):
            try:
                event = next(self._reading)  # type: ignore[arg-type]
                if event is None:
                    break
                self._take(event, deltas)
                continue
            except StopIteration as done:
                for call in done.value:
                    self._take(call, deltas)
                self._space, self._clean = "", True
                self._source.drop()
            except NotACall:
                self._failures += 1
                self._fail(content)
            self._reading, self._given = None, -1
        return Parsed("".join(content), tuple(deltas))

    def _take(self, event: object, deltas: list[CallDelta]) -> None:
        """Add what a reader gives out: a call, or one that begins, a piece of its arguments, and its end."""
        self._given = self._source.position
        if isinstance(event, Call | Opened) and not self.full:
            self._open = isinstance(event, Opened)
            arguments = dumps(event.arguments) if isinstance(event, Call) else ""
            deltas.append(CallDelta(self._count, event.id or self._make_id(), event.name, arguments))
            self._count += 1
        elif isinstance(event, Closed):
            self._open = False
        elif isinstance(event, str) and self._open:
            last = deltas[-1] if deltas else None
            if last is None:
                deltas.append(CallDelta(self._count - 1, "", None, event))
            else:
                deltas[-1] = replace(last, arguments=last.arguments + event)

    def _fail(self, content: list[str]) -> None:
        """Go on behind what is no call: the mark at its begin is text, or the text from where pieces end."""
        source, self._open = self._source, False
        if self._given >= 0:
            source.position = self._given
            source.drop()
            self._space, self._clean = "", True
            return
        source.position = 0
        mark = next((m for m in self._form.begins if source.text.startswith(m)), "")
        content.append(self._say(len(mark) or 1))

    def _begin(self, content: list[str]) -> bool:
        """Begin to read a call if one comes next; add the text before it to `content`."""
        source = self._source
        at, found = self._next_mark(source.text)
        content.append(self._say(at))
        if not found:
            return False
        self._reading = self._read()
        return True

    def _read(self) -> Reading[list[Call]]:
        return (yield from self._form.read(self._source, self._schemas))

    def _next_mark(self, text: str) -> tuple[int, bool]:
        """Return where the text may end that is certain, and whether a mark begins there."""
        if self._failures >= MAX_FAILURES or (self._form.bare and not self._clean):
            return len(text), False
        if self._form.bare:
            at = len(text) - len(text.lstrip(SPACE))
            if text.startswith(self._form.begins, at):
                return at, True
            waits = not self._source.ended and any(mark.startswith(text[at:]) for mark in self._form.begins)
            return at if waits else len(text), False
        found = [at for mark in self._form.begins if (at := text.find(mark)) >= 0]
        if found:
            return min(found), True
        if not self._source.ended:
            for at in range(max(0, len(text) - max(map(len, self._form.begins)) + 1), len(text)):
                if any(mark.startswith(text[at:]) for mark in self._form.begins):
                    return at, False
        return len(text), False

    def _say(self, count: int) -> str:
        """Take `count` characters as text of the answer; return what of it is certain."""
        self._source.position = count
        text = self._source.text[:count]
        self._source.drop()
        if self._clean and self._count:
            text = text.lstrip(SPACE)
        whole = self._space + text
        body = whole.rstrip(SPACE)
        self._space = whole[len(body) :]
        self._clean = self._clean and not body
        return body


def _random_id() -> str:
    return "".join(secrets.choice(ID_CHARS) for _ in range(ID_LENGTH))
