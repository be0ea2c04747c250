"""Tools of a request, as grammars need them: names, and schemas whose arguments are an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.tool_calls.source import NotACall, checked_name
from dymoe_runtime.text.tool_calls.values import resolved


class Tool(NamedTuple):
    """The name of a function, and the schema of its arguments, of type object."""

    name: str
    schema: dict[str, Any]


class Cannot(DymoeError):
    """A format cannot hold what a schema asks."""


def tools_of(definitions: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Return the tools of definitions in OpenAI's form; raise DymoeError for one that no call can fit."""
    return [_tool(definition.get("function", definition)) for definition in definitions]


def _tool(function: Mapping[str, Any]) -> Tool:
    name = function.get("name")
    try:
        checked_name(name)
    except NotACall as error:
        raise DymoeError(f"'{str(name)[:80]}' is no name that the model can write; rename the function") from error
    parameters = function.get("parameters") or {}
    kind = resolved(parameters, parameters).get("type", "object")
    kinds = kind if isinstance(kind, list) else [kind]
    if "object" not in kinds:
        raise DymoeError(f"the parameters of '{name}' are of type {kind}; give a schema of type object")
    return Tool(str(name), {**parameters, "type": "object"})
