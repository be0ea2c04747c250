"""Checks of schemas and grammars before the library that compiles them: how large, how deep, and whether they end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.files import parse_json

# The most characters of a schema or a grammar, the most objects in a schema or rules of a grammar, and the deepest
# nesting: larger ones take seconds and tens of megabytes to compile, and every token milliseconds.
MAX_TEXT, MAX_PARTS, MAX_RULES, MAX_DEPTH = 100_000, 1_000, 500, 64
SIMPLE = frozenset({"string", "number", "integer", "boolean", "null"})


def checked_schema(schema: object, where: str) -> str:
    """Return a JSON schema as text; raise DymoeError if it is none, too large or too deep, or has no end."""
    if isinstance(schema, str):
        if len(schema) > MAX_TEXT:
            raise _too_large(where)
        if _depth(schema) > MAX_DEPTH:
            raise DymoeError(f"{where}: nested more than {MAX_DEPTH} deep; simplify it")
        schema = parse_json(schema, where, 'give a JSON schema, such as {"type": "object"}')
    if schema is False:
        raise DymoeError(f"{where}: no value fits it; give another schema")
    schema = {} if schema is True else schema
    if not isinstance(schema, Mapping):
        raise DymoeError(f"{where}: of type {type(schema).__name__}; give a JSON schema, which is an object")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise DymoeError(f"{where}: no value of JSON ({error}); give a JSON schema") from error
    if len(text) > MAX_TEXT:
        raise _too_large(where)
    if _depth(text) > MAX_DEPTH:
        raise DymoeError(f"{where}: nested more than {MAX_DEPTH} deep; simplify it")
    schemas = list(_schemas(schema))
    if len(schemas) > MAX_PARTS:
        raise DymoeError(f"{where}: made of more than {MAX_PARTS} objects; simplify it")
    if not _ends(schema, schemas):
        raise DymoeError(
            f"{where}: no answer can end, because the schema requires itself again and again; make a property optional"
        )
    return text


def check_text(text: str, where: str) -> None:
    """Raise DymoeError if a grammar or an expression is too large or too deep."""
    if len(text) > MAX_TEXT:
        raise _too_large(where)
    if _depth(text) > MAX_DEPTH:
        raise DymoeError(f"{where}: nested more than {MAX_DEPTH} deep; simplify it")


def _too_large(where: str) -> DymoeError:
    return DymoeError(f"{where}: more than {MAX_TEXT} characters; simplify it")


def _depth(text: str) -> int:
    """Return how deep brackets are nested, at most: those in texts count, too."""
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", text):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and all objects within it, for a reference may point at any of them."""
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            yield one
            left += one.values()
        elif isinstance(one, list):
            left += one


def _ends(root: Any, schemas: list[Mapping[str, Any]]) -> bool:
    """Return whether some value that is not infinite fits a schema, as far as its structure says.

    Values are built from the leaves on: in each round, those schemas end whose parts do.
    """
    ending: set[int] = set()
    left, count = schemas[::-1], len(schemas) + 1
    while len(left) < count and id(root) not in ending:
        count = len(left)
        left = [schema for schema in left if not _one_ends(root, schema, ending)]
    return not schemas or id(root) in ending


def _one_ends(root: Any, schema: Mapping[str, Any], ending: set[int]) -> bool:
    """Return whether a schema ends, given those that do; add it to them if so."""
    found = _parts_end(root, schema, lambda part: not isinstance(part, Mapping) or id(part) in ending)
    if found:
        ending.add(id(schema))
    return found


def _parts_end(root: Any, schema: Mapping[str, Any], ends: Callable[[Any], bool]) -> bool:
    if "enum" in schema or "const" in schema:
        return True
    if isinstance(schema.get("$ref"), str) and not ends(_target(root, schema["$ref"])):
        return False
    if isinstance(schema.get("allOf"), list) and not all(map(ends, schema["allOf"])):
        return False
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list) and schema[key] and not any(map(ends, schema[key])):
            return False
    types = schema.get("type", list(SIMPLE))
    types = {types} if isinstance(types, str) else {t for t in types if isinstance(t, str)} if types else set()
    if types & SIMPLE or not types & {"object", "array"}:
        return True
    return ("object" in types and _object_ends(schema, ends)) or ("array" in types and _array_ends(schema, ends))


def _object_ends(schema: Mapping[str, Any], ends: Callable[[Any], bool]) -> bool:
    required, properties = schema.get("required"), schema.get("properties")
    if not isinstance(required, list):
        return True
    known = properties if isinstance(properties, Mapping) else {}
    return all(ends(known.get(name, schema.get("additionalProperties"))) for name in required if isinstance(name, str))


def _array_ends(schema: Mapping[str, Any], ends: Callable[[Any], bool]) -> bool:
    least = schema.get("minItems", 0)
    if not isinstance(least, int) or least < 1:
        return True
    first = schema.get("prefixItems")
    first = first[:least] if isinstance(first, list) else []
    return all(map(ends, first)) and (least <= len(first) or ends(schema.get("items")))


def _target(root: Any, reference: str) -> Any:
    """Return what a reference within the schema points at; None if it is none."""
    if not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found


_RULE = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)[^\S\n]*(?:\[[^\]\n]*\])?(?:\.-?\d+)?[^\S\n]*:", re.MULTILINE)
_WORDS = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|\#[^\n]*)|(?P<text>"(?:\\.|[^"\\])*"i?|/(?:\\.|[^/\\])+/[a-z]*|<[^<>\s]*>)"""
    r"""|(?P<name>[A-Za-z_]\w*)|(?P<sign>[()|\[\]?*+])|(?P<times>\{\d*,?\d*\}|~\s*\d+(?:\.\.\d+)?)""",
    re.VERBOSE,
)


def check_grammar_ends(lark: str, where: str) -> None:
    """Raise DymoeError if no text of a Lark grammar can end, because its first rule needs itself again and again.

    Rules with what this does not know are taken to end.
    """
    begins = list(_RULE.finditer(lark))
    if not begins:
        raise DymoeError(f"{where}: it has no rule; write it in GBNF or Lark")
    if len(begins) > MAX_RULES:
        raise DymoeError(f"{where}: more than {MAX_RULES} rules; simplify it")
    rules: dict[str, str] = {}
    for rule, following in zip(begins, [*begins[1:], None], strict=True):
        body = lark[rule.end() : following.start() if following else len(lark)]
        rules[rule[1]] = re.sub(r"^[ \t]*%[a-z]+\b.*$", "", body, flags=re.MULTILINE)
    known = {*rules, *re.findall(r"\w+", "".join(re.findall(r"^[ \t]*%.*$", lark, re.MULTILINE)))}
    for body in rules.values():
        unknown = next((name for name in _names(body) if name not in known), None)
        if unknown is not None:
            raise DymoeError(f"{where}: no rule is named {unknown!r}; add it")
    clauses = [clause for name, body in rules.items() for clause in _clauses(name, body, rules)]
    if "start" in rules and "start" not in _proved(clauses):
        raise DymoeError(
            f"{where}: no text can end, because the first rule needs itself again and again; give it an alternative"
        )


# A name, and the names that must end for it to end: a rule, or a group within one.
_Clause = tuple[str, list[str]]


def _names(body: str) -> Iterator[str]:
    """Yield the names in a rule, up to what this does not know."""
    at = 0
    while (word := _WORDS.match(body, at)) is not None:
        at = word.end()
        if word["name"]:
            yield word["name"]


def _clauses(name: str, body: str, rules: Collection[str]) -> list[_Clause]:
    """Return a clause for each alternative of a rule; one that needs nothing if the rule has what is not known here."""
    clauses: list[_Clause] = []
    groups = [name]  # the open ones, by names of their own
    needs: list[list[str]] = [[]]  # of their alternatives so far
    last, at = "", 0  # what the last item needs
    while at < len(body):
        word = _WORDS.match(body, at)
        if word is None:
            return [(name, [])]
        at, sign = word.end(), word["sign"]
        if word["text"] or word["name"]:
            last = word["name"] if word["name"] in rules else ""
            needs[-1] += [last] if last else []
        elif sign and sign in "([":
            groups.append(f"{name} {at}{sign}")
            needs.append([])
        elif sign and sign in ")]":
            if len(groups) == 1:
                return [(name, [])]
            last = groups.pop()
            clauses.append((last, needs.pop()))
            needs[-1] += [last]
            clauses += [(last, [])] if last.endswith("[") else []
        elif sign == "|":
            clauses.append((groups[-1], needs[-1]))
            needs[-1] = []
        elif last and ((sign and sign in "?*") or (word["times"] and re.match(r"\{0*[,}]", word["times"]))):
            needs[-1].pop()  # the last item may be left out
            last = ""
    return [*clauses, (name, needs[0])] if len(groups) == 1 else [(name, [])]


def _proved(clauses: list[_Clause]) -> set[str]:
    """Return the names that end, by a proof from the clauses without conditions on."""
    needing: dict[str, list[int]] = {}
    for number, (_, needs) in enumerate(clauses):
        for name in needs:
            needing.setdefault(name, []).append(number)
    left = [len(needs) for _, needs in clauses]
    proved: set[str] = set()
    new = [name for (name, _), count in zip(clauses, left, strict=True) if not count]
    while new:
        name = new.pop()
        if name in proved:
            continue
        proved.add(name)
        for number in needing.get(name, ()):
            left[number] -= 1
            new += [clauses[number][0]] if not left[number] else []
    return proved
