"""Grammars of the formats whose calls are JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from dymoe_runtime.text.tool_calls.grammar.lark import Lark
from dymoe_runtime.text.tool_calls.grammar.tools import Tool

# What a format makes of the tools: the part that is one call, or with `many` one or more.
Writer = Callable[[Lark, Sequence[Tool], bool], str]


def write_tagged(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""
    objects = lark.any_of(_named_first(lark, tool, "name", "arguments") for tool in tools)
    call = lark.rule(_joined(lark.literal("<tool_call>\n"), objects, lark.literal("\n</tool_call>")))
    return lark.repeated(call, "\n", many)


def write_tagged_list(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write `<tool_calls>[{"name": ..., "arguments": {...}}, ...]</tool_calls>`."""
    objects = lark.any_of(_named_first(lark, tool, "name", "arguments") for tool in tools)
    calls = lark.repeated(objects, ", ", many)
    return _joined(lark.literal("<tool_calls>["), calls, lark.literal("]</tool_calls>"))


def write_action(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write a list with an id, `tool_name` and `parameters` between Cohere's marks of an action."""
    before = _joined(lark.literal('{"tool_call_id": "'), "/[0-9]{1,2}/", lark.literal('", '))
    objects = lark.any_of(_named_first(lark, tool, "tool_name", "parameters", before) for tool in tools)
    calls = lark.repeated(objects, ",\n", many)
    return _joined(lark.literal("<|START_ACTION|>[\n"), calls, lark.literal("\n]<|END_ACTION|>"))


def write_granite(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write `<|tool_call|>[{"arguments": {...}, "name": ...}, ...]`."""
    begin = lark.literal('{"arguments": ')
    ends = [lark.literal(f', "name": {_quoted(tool)}}}') for tool in tools]
    objects = lark.any_of(_joined(begin, lark.json(tool.schema), end) for tool, end in zip(tools, ends, strict=True))
    return _joined(lark.literal("<|tool_call|>["), lark.repeated(objects, ", ", many), lark.literal("]"))


def write_mistral(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write `[TOOL_CALLS]` and a list, or a name, `[ARGS]` and an object where that is a token."""
    if lark.is_special("[ARGS]"):
        begins = [lark.literal(f"[TOOL_CALLS]{tool.name}[ARGS]") for tool in tools]
        call = lark.any_of(_joined(*pair) for pair in zip(begins, map(_arguments(lark), tools), strict=True))
        return f"{call}+" if many else call
    objects = lark.any_of(_named_first(lark, tool, "name", "arguments") for tool in tools)
    return _joined(lark.literal("[TOOL_CALLS]["), lark.repeated(objects, ", ", many), lark.literal("]"))


def write_solar(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write thoughts or none, then for each call an id, a name and arguments, each after its mark."""
    begin, end = lark.literal("<|tool_call:begin|>"), lark.literal("<|tool_call:end|>")
    names = [lark.literal(f"<|tool_call:name|>{tool.name}<|tool_call:args|>") for tool in tools]
    call = lark.any_of(
        _joined(begin, "/[a-zA-Z0-9]{10}/", name, lark.json(tool.schema), end)
        for tool, name in zip(tools, names, strict=True)
    )
    thought = lark.text_until("<|end|><|begin|>assistant", mark="<|end|>")
    return f"({lark.literal('<|think|>')} {thought})? {lark.literal('<|tool_calls|>')} {call}{'+' if many else ''}"


def write_harmony(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write thoughts or none, then one message to a function, behind which an answer ends in any case."""
    thought = lark.text_until("<|end|><|start|>assistant", mark="<|end|>")
    form = "<|constrain|>json" if lark.is_special("<|constrain|>") else "json"
    begins = [lark.literal(f"<|channel|>commentary to=functions.{tool.name} {form}<|message|>") for tool in tools]
    call = lark.any_of(_joined(*pair) for pair in zip(begins, map(_arguments(lark), tools), strict=True))
    return f"({lark.literal('<|channel|>analysis<|message|>')} {thought})? {call}"


def write_bare(lark: Lark, tools: Sequence[Tool], many: bool) -> str:
    """Write `{"name": ..., "parameters": {...}}`, several with a semicolon between them."""
    objects = lark.any_of(_named_first(lark, tool, "name", "parameters") for tool in tools)
    return lark.repeated(objects, "; ", many)


def _named_first(lark: Lark, tool: Tool, name: str, arguments: str, before: str = "") -> str:
    """Return an object with the name of a tool, then its arguments, by these keys; `before` has what comes first."""
    begin = lark.literal(f'{"" if before else "{"}"{name}": {_quoted(tool)}, "{arguments}": ')
    return _joined(before, begin, lark.json(tool.schema), lark.literal("}"))


def _arguments(lark: Lark) -> Callable[[Tool], str]:
    return lambda tool: lark.json(tool.schema)


def _quoted(tool: Tool) -> str:
    return json.dumps(tool.name, ensure_ascii=False)


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)
