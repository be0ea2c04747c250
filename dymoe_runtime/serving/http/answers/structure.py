"""What requests ask of the structure of answers: tools that may be called, and formats that the text must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dymoe_runtime.serving.http.answers.backend import Backend
from dymoe_runtime.serving.http.exchange.errors import bad_field


@dataclass(frozen=True)
class Tools:
    """Definitions for the chat template, and what makes parsers of the calls; neither where no tool may be called."""

    definitions: list[dict[str, Any]] | None = None
    calls: Callable[[], Any] | None = None


def tools_of(backend: Backend, definitions: Sequence[dict[str, Any]], choice: Any, field: str = "tools") -> Tools:
    """Return the tools of a request in OpenAI's form; raise ApiError if the model's template has no tools."""
    if not definitions or choice == "none":
        return Tools()
    raise bad_field(field, "this version does not support tools; leave them out")


def constraint_of(
    backend: Backend, schema: Mapping[str, Any] | bool | None, grammar: str | None, field: str
) -> Callable[[], Any] | None:
    """Return what makes a constraint for each answer: a JSON schema, any JSON object (True), or a grammar.

    Raises ApiError if it cannot be compiled.
    """
    if schema is None and grammar is None:
        return None
    raise bad_field(field, "this version does not support structured answers; leave it out")


def has_tools(backend: Backend) -> bool:
    """Return whether the model can be given tools."""
    return False
