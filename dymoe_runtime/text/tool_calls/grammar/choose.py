"""The grammar of answers that must call a tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.tool_calls import formats
from dymoe_runtime.text.tool_calls.grammar import gemma_calls, json_calls, text_calls
from dymoe_runtime.text.tool_calls.grammar.lark import Lark
from dymoe_runtime.text.tool_calls.grammar.tools import Cannot, tools_of
from dymoe_runtime.text.tool_calls.parser import Format

WRITERS: Mapping[Format, json_calls.Writer] = {
    formats.TAGGED: json_calls.write_tagged,
    formats.TAGGED_LIST: json_calls.write_tagged_list,
    formats.ACTION: json_calls.write_action,
    formats.GRANITE: json_calls.write_granite,
    formats.MISTRAL: json_calls.write_mistral,
    formats.SOLAR: json_calls.write_solar,
    formats.HARMONY: json_calls.write_harmony,
    formats.BARE: json_calls.write_bare,
    formats.FUNCTIONS: text_calls.write_functions,
    formats.INVOCATIONS: text_calls.write_invocations,
    formats.PAIRS: text_calls.write_pairs,
    formats.HY3_PAIRS: text_calls.write_hy3_pairs,
    formats.GEMMA: gemma_calls.write_gemma,
}
# Formats whose grammar has the reasoning, too, because the call stands in a channel or turn of its own.
WITH_REASONING = (formats.HARMONY, formats.SOLAR)


def call_grammar(
    form: Format, definitions: Sequence[Mapping[str, Any]], special: Mapping[str, int], many: bool = True
) -> str:
    """Return the grammar, in Lark, of answers that are one or more calls of these tools, or exactly one.

    `definitions` are in OpenAI's form, `special` are the ids of the special tokens by their texts. The grammar begins
    behind the reasoning, but for the formats of `WITH_REASONING`. Raises DymoeError if a tool has parameters to which
    the format cannot be held.
    """
    lark = Lark(special)
    try:
        calls = WRITERS[form](lark, tools_of(definitions), many)
    except Cannot as error:
        raise DymoeError(f"{error}; simplify it, or let the model choose with auto") from error
    return lark.text(calls if form in WITH_REASONING else f'("\\n" "\\n"?)? {calls}')
