"""A call of a tool, as a model asks for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dymoe_runtime.text.tool_calls.source import NotACall, checked_name, loads

# Names that formats have for the parts of a call in JSON.
NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters")
# The most calls in one list.
MAX_CALLS = 128
_ID = re.compile(r"[A-Za-z0-9_-]{9,64}")


class Call(NamedTuple):
    """A function's name and its arguments, and an id if the model gave one."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


def calls_of(value: Any) -> list[Call]:
    """Return the calls that a value of JSON describes: an object or a list of them; raise NotACall if it is none."""
    entries = value if isinstance(value, list) else [value]
    if not 0 < len(entries) <= MAX_CALLS:
        raise NotACall
    return [_call_of(entry) for entry in entries]


def known_id(text: object) -> str | None:
    """Return an id that a model gave, if it can stand for the call among those of a conversation."""
    return text if isinstance(text, str) and _ID.fullmatch(text) else None


def _call_of(entry: Any) -> Call:
    if not isinstance(entry, Mapping):
        raise NotACall
    call_id = known_id(entry.get("id"))
    if isinstance(entry.get("function"), Mapping):  # OpenAI's own form
        entry = entry["function"]
    name = next((entry[key] for key in NAMES if key in entry), None)
    arguments: Any = next((entry[key] for key in ARGUMENTS if key in entry), {})
    if isinstance(arguments, str):  # JSON within JSON, as in OpenAI's interface
        arguments = loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise NotACall
    return Call(checked_name(name), arguments, call_id)
