"""Values of arguments that a model writes as plain text: their types come from the schemas of the tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dymoe_runtime.text.tool_calls.source import NotACall, loads

# What Python calls the values of JSON that have a name there.
CONSTANTS = {"True": "true", "False": "false", "None": "null"}
# How many alternatives of a schema are looked at, each within the one before.
MAX_ALTERNATIVES = 8


class Schemas:
    """The schemas of the arguments of tools in OpenAI's form."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        functions = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
        self._parameters = {f.get("name"): f.get("parameters") for f in functions if isinstance(f, Mapping)}

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tool of that name."""
        return name in self._parameters

    def types(self, function: str, argument: str) -> frozenset[str]:
        """Return the types of JSON that an argument may have; none if nothing is known."""
        parameters = self._parameters.get(function)
        properties = resolved(parameters, parameters).get("properties")
        return allowed_types(properties.get(argument) if isinstance(properties, Mapping) else None, parameters)

    def value(self, function: str, argument: str, text: str, otherwise: frozenset[str]) -> Any:
        """Return the value of an argument that is written as `text`: JSON, or for strings the text itself.

        `otherwise` are the types of an argument of which nothing is known. A text that is no value of these types stays
        a text.
        """
        types = self.types(function, argument) or otherwise
        if types == {"string"}:
            return text
        try:
            value = loads(CONSTANTS.get(text.strip(), text.strip()))
        except NotACall:
            return text
        if isinstance(value, str):  # a string in quotes
            return value if "string" not in types else text
        return value if _type_of(value) & types else text


ANY = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
STRING = frozenset({"string"})


def _type_of(value: Any) -> frozenset[str]:
    """Return the names that JSON schemas have for the type of a value."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    if isinstance(value, float):
        return frozenset({"number", "integer"} if value.is_integer() else {"number"})
    return frozenset({"array"} if isinstance(value, list) else {"object"})


def allowed_types(schema: object, root: object, depth: int = 0) -> frozenset[str]:
    """Return the types that a schema allows; none if it does not say. `root` is the schema that it is a part of."""
    schema = resolved(schema, root)
    if depth > MAX_ALTERNATIVES:
        return frozenset()
    own = schema.get("type")
    names = [own] if isinstance(own, str) else own if isinstance(own, list) else []
    types = frozenset(name for name in names if isinstance(name, str)) & ANY
    if not types and isinstance(schema.get("enum"), list):
        types = frozenset().union(*(STRING if isinstance(v, str) else _type_of(v) for v in schema["enum"]))
    if not types and "const" in schema:
        types = STRING if isinstance(schema["const"], str) else _type_of(schema["const"])
    for key in ("anyOf", "oneOf"):
        alternatives = schema.get(key)
        if isinstance(alternatives, list):
            types = types.union(*(allowed_types(alternative, root, depth + 1) for alternative in alternatives))
    return types


def resolved(schema: object, root: object) -> Mapping[str, Any]:
    """Return a schema, or in place of a reference what it refers to within `root`; an empty one for what is none."""
    for _ in range(MAX_ALTERNATIVES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#"):
            break
        schema = root
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(key) if isinstance(schema, Mapping) else None
    return schema if isinstance(schema, Mapping) else {}
