"""The formats of the supported families, chosen by the marks in a chat template or among the special tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from dymoe_runtime.text.tool_calls import json_formats, text_formats
from dymoe_runtime.text.tool_calls.parser import Format, StreamParser, ToolCallParser


class Factory(Protocol):
    """Makes the parser of one answer."""

    def __call__(
        self, tools: Sequence[Mapping[str, Any]], limit: int | None = None, piecewise: bool = False
    ) -> ToolCallParser:
        """Return a parser of one answer to a prompt with these tools.

        It takes at most `limit` calls. With `piecewise`, arguments in JSON come while they are written.
        """


TAGGED = Format(("<tool_call>",), json_formats.read_tagged, ("<tool_call>", "</tool_call>"))
FUNCTIONS = Format(("<tool_call>", "<function="), text_formats.read_functions, ("<tool_call>", "</tool_call>"))
PAIRS = Format(
    ("<tool_call>",),
    text_formats.read_pairs,
    ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
HY3_PAIRS = Format(
    ("<tool_calls:opensource>", "<tool_call:opensource>"),
    text_formats.read_hy3_pairs,
    tuple(
        f"<{slash}{name}:opensource>"
        for name in ("tool_calls", "tool_call", "tool_sep", "arg_key", "arg_value")
        for slash in ("", "/")
    ),
)
INVOCATIONS = Format(
    ("<minimax:tool_call>",), text_formats.read_invocations, ("<minimax:tool_call>", "</minimax:tool_call>")
)
MISTRAL = Format(("[TOOL_CALLS]",), json_formats.read_mistral, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"))
TAGGED_LIST = Format(("<tool_calls>",), json_formats.read_tagged_list, ("<tool_calls>", "</tool_calls>"))
ACTION = Format(("<|START_ACTION|>",), json_formats.read_action, ("<|START_ACTION|>", "<|END_ACTION|>"))
GRANITE = Format(("<|tool_call|>",), json_formats.read_granite, ("<|tool_call|>",))
GEMMA = Format(("<|tool_call>",), text_formats.read_gemma, ("<|tool_call>", "<tool_call|>", text_formats.QUOTE))
SOLAR = Format(
    ("<|tool_call:begin|>",),
    json_formats.read_solar,
    ("<|tool_call:begin|>", "<|tool_call:name|>", "<|tool_call:args|>", "<|tool_call:end|>"),
)
# Its marks stand in text already, as the splitter of its channels writes them.
HARMONY = Format(("<|channel|>commentary to=",), json_formats.read_harmony)
BARE = Format(
    ("{", "<|python_start|>", "<|python_end|>"),
    json_formats.read_bare,
    ("<|python_start|>", "<|python_end|>"),
    bare=True,
)

# What a template has that writes calls in a format; the first that is found counts.
_BY_TEMPLATE: tuple[tuple[str, Format], ...] = (
    (r"<\|tool_call:begin\|>", SOLAR),
    (r"<\|START_ACTION\|>", ACTION),
    (r"<\|tool_call>", GEMMA),
    ("<minimax:tool_call>", INVOCATIONS),
    ("<function=", FUNCTIONS),
    (r"<arg_key\{\}>", HY3_PAIRS),
    ("<arg_key>", PAIRS),
    (r"\[TOOL_CALLS\]", MISTRAL),
    ("<tool_calls>", TAGGED_LIST),
    (r"<\|tool_call\|>", GRANITE),
    ("<tool_call>", TAGGED),
    (r"<\|header_start\|>|\"parameters\": ", BARE),
)
_READS_TOOLS = re.compile(r"\{[%{].*?\btools\b", re.DOTALL)


def takes_tools(template: str) -> bool:
    """Return whether a chat template reads the definitions of tools."""
    return _READS_TOOLS.search(template) is not None


def format_of(template: str, special: Collection[str]) -> Format | None:
    """Return how answers to a chat template write calls, or None if that is not known.

    `special` are the special tokens. A template that takes no tools gets the definitions in a system message that asks
    for the commonest format.
    """
    if "<|channel|>" in special and "<|message|>" in special:
        return HARMONY
    if not takes_tools(template):
        return TAGGED
    return next((form for mark, form in _BY_TEMPLATE if re.search(mark, template)), None)


class HasToolFormat(Protocol):
    """A tokenizer whose chat template is known."""

    @property
    def tool_format(self) -> Format | None:
        """Return how answers write calls of tools."""


def parser_for(tokenizer: HasToolFormat) -> Factory | None:
    """Return a function that makes a parser for one answer, given the tools of its prompt.

    Returns None if the format of the model's calls is not known; then its answers stay text.
    """
    form = tokenizer.tool_format
    if form is None:
        return None
    return lambda tools, limit=None, piecewise=False: StreamParser(form, tools, limit=limit, piecewise=piecewise)
