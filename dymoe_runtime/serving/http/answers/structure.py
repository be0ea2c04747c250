"""What requests ask of the structure of answers: tools that may be called, and formats that the text must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.exchange.errors import ApiError, bad_field
from dymoe_runtime.text.constraints.constraint import Constraint
from dymoe_runtime.text.tool_calls import ToolCallParser, parser_for

MakeConstraint = Callable[[], Constraint]


@dataclass(frozen=True)
class Tools:
    """What the tools of a request mean for its prompt and its answer."""

    definitions: list[dict[str, Any]] | None = None  # for the chat template; None where no tool may be called
    calls: Callable[[], ToolCallParser] | None = None  # makes the parser of an answer
    must: bool = False  # the answer has to call one
    many: bool = True  # it may have several calls


def tools_of(
    backend: Backend,
    definitions: Sequence[dict[str, Any]],
    choice: Any,
    *,
    many: bool = True,
    piecewise: bool = False,
    field: str = "tools",
) -> Tools:
    """Return the tools of a request in OpenAI's form, given its choice: a word, or the name of a tool in an object.

    With `many` unset, the answer ends behind its first call. With `piecewise`, calls come while they are written.

    Raises ApiError if the tool that must be called is none of them, or if the format of the model's calls is not known.
    """
    if not definitions or choice == "none":
        if choice == "required" or isinstance(choice, dict):
            raise bad_field("tool_choice", "there is no tool to call; send its definition in tools")
        return Tools()
    named = choice["name"] if isinstance(choice, dict) else None
    offered = [tool for tool in definitions if named in (None, tool["function"]["name"])]
    if not offered:
        raise bad_field("tool_choice", f"no tool is named '{str(named)[:80]}'; choose one of tools")
    make = parser_for(backend.tokenizer)
    if make is None:
        raise bad_field(field, "how this model calls tools is not known; leave them out")
    return Tools(
        offered,
        lambda: make(offered, None if many else 1, piecewise),
        named is not None or choice == "required",
        many and named is None,  # a function that is named is called once
    )


def answer_constraint(
    backend: Backend, tools: Tools, constraint: Callable[[], MakeConstraint | None], field: str
) -> MakeConstraint | None:
    """Return what makes the constraint of each answer: that it calls a tool, or what `constraint` returns.

    Call it where long work may run. Raises ApiError if it cannot be compiled, or if an answer that may call tools has a
    format, which `field` names, too.
    """
    made = constraint()
    if tools.calls is not None and made is not None:
        raise bad_field(field, "it does not go with tools; leave out either, or set tool_choice to none")
    form = backend.tokenizer.tool_format
    if not tools.must or form is None or tools.definitions is None:
        return made
    try:
        return backend.grammars.calls(form, tools.definitions, tools.many, "tool_choice")
    except DymoeError as error:
        raise ApiError(400, str(error), "tool_choice") from error


def constraint_of(
    backend: Backend, schema: Mapping[str, Any] | bool | None, grammar: str | None, field: str
) -> MakeConstraint | None:
    """Return what makes a constraint for each answer: of a JSON schema, of any JSON object (True), or of a grammar.

    Call it where long work may run. Raises ApiError, naming the field, if it cannot be compiled.
    """
    if schema is None and grammar is None:
        return None
    try:
        if grammar is not None:
            return backend.grammars.grammar(grammar, field)
        return backend.grammars.json(schema, field)
    except DymoeError as error:
        raise ApiError(400, str(error), field) from error


def has_tools(backend: Backend) -> bool:
    """Return whether it is known how the model calls tools, and its template takes them."""
    return backend.tokenizer.has_chat_template and backend.tokenizer.tool_format is not None
