"""Compiles chat templates and renders them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

import jinja2
import jinja2.meta

from dymoe_runtime.text.chat_template import rewrite
from dymoe_runtime.text.chat_template.environment import MeteredEnvironment
from dymoe_runtime.text.chat_template.meter import LimitError, Limits, Meter

# Most characters of a template, and most nodes that it is made of. Long ones of known models have 20,000 and 1,400.
MAX_LENGTH, MAX_NODES = 100_000, 6_000
# Most characters of what is told of an error; a template may raise any text.
MAX_REASON = 300


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Return the text that a template makes of `variables`, such as `messages`.

    Raises LimitError if it asks for more than a template may use, and whatever else it raises.
    """
    limits = Limits.of(variables)
    environment = MeteredEnvironment(Meter(limits))
    code = _compiled(template)
    program = jinja2.Template.from_code(environment, code, environment.make_globals(None))
    pieces: list[str] = []
    left = limits.output
    for piece in program.generate(variables):
        left -= len(piece)
        if left < 0:
            raise LimitError(f"its output is longer than {limits.output:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def variables_of(template: str) -> frozenset[str]:
    """Return the names that `template` reads and does not set."""
    environment = MeteredEnvironment(Meter(Limits()))
    try:
        names = jinja2.meta.find_undeclared_variables(_parsed(environment, template))
    except Exception:  # rendering says what is wrong
        return frozenset()
    return frozenset(names) - set(environment.globals)


def reason(error: Exception) -> str:
    """Return what an error of `render` says, in one line."""
    if isinstance(error, (RecursionError, MemoryError)):  # Python's parser raises both
        return "it calls itself or is nested too deeply"
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."


@lru_cache(maxsize=8)
def _compiled(template: str) -> CodeType:
    environment = MeteredEnvironment(Meter(Limits()))
    tree = rewrite.counted(_parsed(environment, template))
    tree.set_environment(environment)
    return environment.compile(tree)


def _parsed(environment: jinja2.Environment, template: str) -> jinja2.nodes.Template:
    if not isinstance(template, str):
        raise TypeError("the template is not a text")
    if len(template) > MAX_LENGTH:
        raise LimitError(f"it is longer than {MAX_LENGTH:,} characters")
    tree = environment.parse(template)
    if sum(1 for _ in tree.find_all(jinja2.nodes.Node)) > MAX_NODES:
        raise LimitError(f"it is made of more than {MAX_NODES:,} parts")
    return tree
