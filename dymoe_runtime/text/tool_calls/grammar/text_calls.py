"""Grammars of the formats whose arguments are text between marks, as XML would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dymoe_runtime.text.tool_calls.grammar.lark import Lark
from dymoe_runtime.text.tool_calls.grammar.text_values import check_keys, value_until
from dymoe_runtime.text.tool_calls.grammar.tools import Cannot, Tool
from dymoe_runtime.text.tool_calls.source import NotACall, checked_key
from dymoe_runtime.text.tool_calls.values import ANY, STRING, resolved

# Keys of an object's schema that say nothing that these formats cannot hold.
OF_OBJECTS = frozenset(("type", "properties", "required", "additionalProperties"))


def write_functions(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write `<function=NAME><parameter=KEY>VALUE</parameter></function>` in `<tool_call>`."""
    end = lark.literal("</function>\n</tool_call>")

    def call(tool: Tool) -> str:
        def parameter(key: str, schema: Any, where: str) -> str:
            value = value_until(lark, tool, schema, "\n</parameter>", where, STRING, mark="</parameter>")
            return f"{lark.literal(f'<parameter={key}>')} {lark.literal(NEW_LINE)} {value} {lark.literal(NEW_LINE)}"

        begin = lark.literal(f"<tool_call>\n<function={tool.name}>\n")
        return f"{begin} {_parameters(lark, tool, parameter)} {end}"

    return lark.repeated(lark.any_of(map(call, tools)), "\n", many)


def write_invocations(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write `<invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>` in MiniMax-M2's marks."""
    end = lark.literal("</invoke>\n")

    def call(tool: Tool) -> str:
        def parameter(key: str, schema: Any, where: str) -> str:
            value = value_until(lark, tool, schema, "</parameter>", where, STRING)
            begin = lark.literal(f'<parameter name="{key}">')
            return f"{begin} {value} {lark.literal(NEW_LINE)}"

        begin = lark.literal(f'<invoke name="{tool.name}">\n')
        return f"{begin} {_parameters(lark, tool, parameter)} {end}"

    calls = f"{lark.any_of(map(call, tools))}{'+' if many else ''}"
    return f"{lark.literal(INVOCATIONS[0])} {calls} {lark.literal(INVOCATIONS[1])}"


def write_pairs(lark: Lark, tools: Sequence[Tool], many: bool, suffix: str = "") -> str:
    """Write `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`, in marks with a suffix."""
    end = lark.literal(f"</tool_call{suffix}>")
    separator = f"<tool_sep{suffix}>" if suffix else ""

    def call(tool: Tool) -> str:
        def parameter(key: str, schema: Any, where: str) -> str:
            value = value_until(lark, tool, schema, f"</arg_value{suffix}>", where, ANY)
            begin = lark.literal(f"<arg_key{suffix}>{key}</arg_key{suffix}>\n<arg_value{suffix}>")
            return f"{begin} {value} {lark.literal(NEW_LINE)}"

        begin = lark.literal(f"<tool_call{suffix}>{tool.name}{separator}\n")
        return f"{begin} {_parameters(lark, tool, parameter)} {end}"

    one = lark.any_of(map(call, tools))
    if not suffix:
        return lark.repeated(one, "\n", many)
    # The line break is no part of the mark behind it: the library would not tell it from that between calls.
    several = lark.rule(f"{one} {lark.literal(NEW_LINE)}")
    begin, close = f"<tool_calls{suffix}>\n", f"</tool_calls{suffix}>"
    return f"{lark.literal(begin)} {several}{'+' if many else ''} {lark.literal(close)}"


write_hy3_pairs = partial(write_pairs, suffix=":opensource")
NEW_LINE = "\n"
INVOCATIONS = ("<minimax:tool_call>\n", "</minimax:tool_call>")


def _parameters(lark: Lark, tool: Tool, write: Callable[[str, Any, str], str]) -> str:
    """Return the part with the arguments of a call, in the order of the schema; those that are not required may lack.

    Raises Cannot for conditions on all of them together, and for names that the format has no place for.
    """
    root = resolved(tool.schema, tool.schema)
    check_keys(root, OF_OBJECTS, f"the parameters of '{tool.name}'")
    parts = []
    for key, schema, required in _properties(root):
        try:
            checked_key(key)
        except NotACall as error:
            raise Cannot(
                f"the parameter '{key[:80]}' of '{tool.name}' has a name that this model cannot write"
            ) from error
        part = lark.rule(write(key, schema, f"the parameter '{key}' of '{tool.name}'"))
        parts.append(part if required else f"{part}?")
    return " ".join(parts)


def _properties(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Yield the name, the schema and whether it is required of each property."""
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required: Sequence[str] = schema.get("required") or ()
    for key, value in properties.items():
        if value is not False:
            yield key, value, key in required
    for key in required:
        if key not in properties:
            yield key, {}, True
