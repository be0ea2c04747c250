"""Grammars of values that are written as text: strings as they are, others as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from dymoe_runtime.text.tool_calls.grammar.lark import Lark
from dymoe_runtime.text.tool_calls.grammar.tools import Cannot, Tool
from dymoe_runtime.text.tool_calls.values import ANY, STRING, allowed_types, resolved

# Keys of schemas that ask nothing of values, and those of what others refer to.
NOTES = frozenset(
    ("title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly", "strict")
)
DEFINITIONS = frozenset(("$schema", "$id", "$comment", "$defs", "definitions"))
OF_STRINGS = frozenset(("type", "minLength", "maxLength", "enum", "const"))
OF_MIXTURES = frozenset(("type", "anyOf", "oneOf"))


def value_until(
    lark: Lark, tool: Tool, schema: Any, end: str, where: str, otherwise: frozenset[str], mark: str | None = None
) -> str:
    """Return the part that is a value by a schema, as `Schemas.value` reads it, and the text `end` behind it.

    Readers stop at the first `mark`, by default `end`. Raises Cannot if text cannot be held to the schema.
    """
    one = resolved(schema, tool.schema)
    types = allowed_types(one, tool.schema) or otherwise
    choices = one.get("enum", [one["const"]] if "const" in one else None)
    if choices is not None:
        fitting = [choice for choice in choices if isinstance(choice, str) == (types == STRING)]
        if fitting != choices or any(isinstance(c, str) and (mark or end) in c for c in choices):
            raise Cannot(f"{where} has values of several types, which this model's calls do not tell apart")
        check_keys(one, OF_STRINGS, where)
        texts = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
        return lark.any_of(lark.literal(text + end) for text in texts)
    if types == STRING:
        check_keys(one, OF_STRINGS, where)
        return lark.text_until(end, one.get("minLength", 0), one.get("maxLength"), mark)
    if "string" not in types:
        definitions: dict[str, Any] = {key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema}
        return f"{lark.json({**definitions, **one})} {lark.literal(end)}"
    _check_mixture(one, tool.schema, where)
    return lark.text_until(end, mark=mark)


def check_keys(schema: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise Cannot if a schema has keys that are neither known nor notes."""
    unknown = next((key for key in schema if key not in {*known, *NOTES, *DEFINITIONS}), None)
    if unknown is not None:
        raise Cannot(f"{where} has '{unknown}', to which this model's calls cannot be held")


def _check_mixture(schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> None:
    """Raise Cannot if a text, which may be read as a value of any allowed type, could fail to fit the schema."""
    check_keys(schema, OF_MIXTURES, where)
    for alternative in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        _check_mixture(resolved(alternative, root), root, where)
    if allowed_types(schema, root) and not allowed_types(schema, root) <= ANY:
        raise Cannot(f"{where} has a type that is not known")
