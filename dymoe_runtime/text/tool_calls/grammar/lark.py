"""A writer of grammars in Lark, as llguidance reads it, whose marks may be special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

# White space between the parts of JSON, as in answers that are held by a JSON schema.
WHITE_SPACE = r"(\x20|\x0A[\x20\x09]{0,20})"
ANY_TEXT = r"(.|\n)*"


class Lark:
    """A grammar that grows rule by rule; parts of it are texts that can stand in the body of a rule."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """Take the special tokens: text -> id."""
        self._special = special
        self._split = re.compile(
            "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or r"\b\B"
        )
        self._rules: list[str] = []

    def is_special(self, mark: str) -> bool:
        """Return whether a mark is one special token."""
        return mark in self._special

    def literal(self, text: str) -> str:
        """Return the part that is exactly `text`, in which special tokens are spelled out."""
        parts, at = list[str](), 0
        for found in self._split.finditer(text):
            if found.start() > at:
                parts.append(_quoted(text[at : found.start()]))
            parts.append(f"<[{self._special[found[0]]}]>")
            at = found.end()
        if at < len(text):
            parts.append(_quoted(text[at:]))
        return " ".join(parts) or '""'

    def rule(self, body: str) -> str:
        """Add a rule and return its name."""
        name = self.name()
        self.define(name, body)
        return name

    def name(self) -> str:
        """Return the name of a rule that `define` gets later."""
        self._rules.append("")
        return f"r{len(self._rules) - 1}"

    def define(self, name: str, body: str) -> None:
        """Give a rule its body."""
        self._rules[int(name[1:])] = f"{name}: {body}"

    def any_of(self, parts: Iterable[str]) -> str:
        """Return a rule of alternatives."""
        return self.rule(" | ".join(parts))

    def repeated(self, call: str, between: str, many: bool) -> str:
        """Return the part that is a call, or with `many` one or more with a text between them."""
        return f"{call} ({self.literal(between)} {call})*" if many else call

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return a rule of JSON that fits a schema."""
        return self.rule(f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': WHITE_SPACE}})}")

    def text_until(self, end: str, least: int = 0, most: int | None = None, mark: str | None = None) -> str:
        """Return the part that is any text of `least` to `most` characters, and `end` behind it.

        Readers stop at the first `mark`, which is by default `end`: the text does not have it.
        """
        mark = mark or end
        length = ANY_TEXT if (least, most) == (0, None) else rf"(.|\n){{{least},{'' if most is None else most}}}"
        if self._split.search(mark):  # a special token is no text
            return f"/{length}/ {self.literal(end)}"
        pattern = re.escape(mark).replace("/", r"\/")
        ending = re.escape(end).replace("/", r"\/").replace("\\\n", r"\n")
        name = f"T{len(self._rules)}"
        self._rules.append(rf"{name}: /{length}{ending}/ & ~/{ANY_TEXT}{pattern}(.|\n)+/")
        return name

    def text(self, start: str) -> str:
        """Return the whole grammar, whose first rule has the body `start`."""
        return "\n".join((f"start: {start}", *self._rules, ""))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
