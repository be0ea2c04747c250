"""The grammar of Gemma 4's calls, whose values have a notation of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dymoe_runtime.text.tool_calls.grammar.lark import Lark
from dymoe_runtime.text.tool_calls.grammar.text_values import check_keys
from dymoe_runtime.text.tool_calls.grammar.tools import Cannot, Tool
from dymoe_runtime.text.tool_calls.source import NotACall, checked_name
from dymoe_runtime.text.tool_calls.text_formats import QUOTE
from dymoe_runtime.text.tool_calls.values import ANY, allowed_types, resolved

# Keys that values of each type may have; those of numbers are held by a grammar of JSON.
OF_TYPES = {
    "string": {"minLength", "maxLength"},
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set[str](),
    "null": set[str](),
}
CHOICES = ("anyOf", "oneOf")


def write_gemma(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write `<|tool_call>call:NAME{KEY:VALUE,...}<tool_call|>`, whose strings stand in marks of their own."""
    begin, end = "<|tool_call>call:", lark.literal("<tool_call|>")

    def call(tool: Tool) -> str:
        schemas = _Values(lark, tool)
        return f"{lark.literal(begin + tool.name)} {schemas.rule(tool.schema)} {end}"

    calls = lark.any_of(map(call, tools))
    return f"{calls}+" if many else calls


class _Values:
    """Rules of the values of one tool; a schema that is referred to has one rule."""

    def __init__(self, lark: Lark, tool: Tool) -> None:
        self._lark, self._root, self._where = lark, tool.schema, f"the parameters of '{tool.name}'"
        self._rules: dict[int, str] = {}

    def rule(self, schema: Any) -> str:
        """Return the rule of values that fit a schema; raise Cannot if the notation cannot hold them."""
        found = resolved(schema, self._root)
        if id(found) not in self._rules:
            name = self._rules[id(found)] = self._lark.name()
            self._lark.define(name, self._value(found))
        return self._rules[id(found)]

    def _value(self, schema: Mapping[str, Any]) -> str:
        if "enum" in schema or "const" in schema:
            check_keys(schema, {"enum", "const", "type"}, self._where)
            return " | ".join(self._exactly(value) for value in schema.get("enum", [schema.get("const")]))
        for key in CHOICES:
            if key in schema:
                check_keys(schema, {key, "type"}, self._where)
                return " | ".join(self.rule(alternative) for alternative in schema[key])
        types = allowed_types(schema, self._root) or ANY
        check_keys(schema, {"type"}.union(*(OF_TYPES[kind] for kind in types)), self._where)
        return " | ".join(self._of_type(kind, schema) for kind in sorted(types))

    def _of_type(self, kind: str, schema: Mapping[str, Any]) -> str:
        lark = self._lark
        if kind == "string":
            return self._text(schema)
        if kind == "array":
            return self._list(schema)
        if kind == "object":
            return self._object(schema)
        return lark.json({"type": kind} | {key: schema[key] for key in OF_TYPES[kind] if key in schema})

    def _text(self, schema: Mapping[str, Any]) -> str:
        lark = self._lark
        text = lark.text_until(QUOTE, schema.get("minLength", 0), schema.get("maxLength"))
        return f"{lark.literal(QUOTE)} {text}"

    def _list(self, schema: Mapping[str, Any]) -> str:
        lark, least, most = self._lark, int(schema.get("minItems", 0)), schema.get("maxItems")
        begin, end, comma = (lark.literal(mark) for mark in "[],")
        if most == 0 or schema.get("items") is False:
            return f"{begin} {end}"
        item = self.rule(schema.get("items"))
        further = f"({comma} {item}){{{max(least - 1, 0)},{'' if most is None else int(most) - 1}}}"
        whole = f"{item} {further}"
        return f"{begin} {whole if least else f'({whole})?'} {end}"

    def _object(self, schema: Mapping[str, Any]) -> str:
        """Return an object whose properties come in order; a comma is behind each but the last one."""
        lark = self._lark
        properties = {key: value for key, value in (schema.get("properties") or {}).items() if value is not False}
        needed = schema.get("required") or ()
        properties |= {key: {} for key in needed if key not in properties}
        begin, end, comma = (lark.literal(mark) for mark in "{},")
        # rest: what may follow when nothing was written yet, and when something was.
        first, later = end, end
        for key in reversed(properties):
            try:
                entry = f"{lark.literal(f'{checked_name(key)}:')} {self.rule(properties[key])}"
            except NotACall as error:
                raise Cannot(f"{self._where} have the name '{key[:80]}', which this model cannot write") from error
            behind = lark.rule(later)
            begun, continued = f"{entry} {behind}", f"{comma} {entry} {behind}"
            if key in needed:
                first, later = begun, continued
            else:
                first, later = f"{begun} | {lark.rule(first)}", f"{continued} | {behind}"
        return f"{begin} {lark.rule(first)}"

    def _exactly(self, value: Any) -> str:
        """Return the part that is a value of an enumeration."""
        if isinstance(value, str):
            if QUOTE in value:
                raise Cannot(f"{self._where} have a value with the mark {QUOTE}, which this model cannot write")
            return self._lark.literal(f"{QUOTE}{value}{QUOTE}")
        if isinstance(value, dict | list):
            raise Cannot(f"{self._where} have an object or a list among the values of an enumeration")
        return self._lark.literal(json.dumps(value))
