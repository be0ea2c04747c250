"""Arguments that are given out while they are written join to what they are in one piece."""

from __future__ import annotations

import json
import random
from itertools import count
from typing import Any

import pytest
from text.tool_calls.test_parsers import FORMATS, TOOLS, fragments, random_calls

from dymoe_runtime.text.tool_calls import formats
from dymoe_runtime.text.tool_calls.parser import CallDelta, Format, StreamParser

# Formats that write the name before arguments in JSON; the others give calls in one piece.
STREAMED = ("tagged", "list", "action", "mistral", "solar", "harmony", "bare")


def given(form: Format, pieces: list[str], piecewise: bool, limit: int | None = None) -> tuple[str, list[CallDelta]]:
    """The text of an answer, and its calls; each is opened once and goes on in order."""
    numbers = count()
    parser = StreamParser(form, TOOLS, lambda: f"call{next(numbers):05}", limit=limit, piecewise=piecewise)
    content, calls = "", list[CallDelta]()
    for part in (*map(parser.push, pieces), parser.flush()):
        content += part.content
        for delta in part.calls:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append(delta)
            else:
                assert delta.index == len(calls) - 1 and delta.arguments
                last = calls[-1]
                calls[-1] = CallDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
    return content, calls


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_join_to_the_whole(name: str) -> None:
    form, write, _ = FORMATS[name]
    rng = random.Random(name)
    for _ in range(16):
        calls = random_calls(rng)[: 1 if name == "hy3" else 3]
        text = ("" if form.bare else "Let me see. ") + write(calls)
        whole = given(form, [text], piecewise=False)
        assert given(form, fragments(rng, text), piecewise=True) == whole and len(whole[1]) == len(calls)
        assert given(form, fragments(rng, text), piecewise=True, limit=1)[1] == whole[1][:1]
        assert given(form, fragments(rng, text), piecewise=False, limit=1)[1] == whole[1][:1]


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_come_before_they_are_complete(name: str) -> None:
    form, write, _ = FORMATS[name]
    text = write([("get_weather", {"city": "x" * 50})])
    _, calls = given(form, [text[: text.index("xxx") + 40]], piecewise=True)
    assert [call.arguments for call in calls] == (['{"city": "' + "x" * 40] if name in STREAMED else [])


ARGUMENTS = [
    r'{"a":"\ud83d\ude00\ud800x\n\u00e9\/\"\\", "b" : [ ],"c":{ },"d":[1,2.50,-0,1e2,true,null,{"e":[[]]}]}',
    '{"line": "one\ntwo\ttabs", "ünï": "👍🏽", "": ""}',
    r'{"x": "\ud83d\u0041", "y": 1e999, "z": "\udc00\ud83d"}', "{}", "{ }",
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_any_spelling_joins_to_the_same(arguments: str) -> None:
    text = f'<tool_call>{{"id": "abcdefghi", "name": "f", "arguments": {arguments}, "more": [1]}}</tool_call>'
    whole = given(formats.TAGGED, [text], piecewise=False)
    assert len(whole[1]) == 1 and whole[1][0].id == "abcdefghi"
    for step in (1, 2, 3, 7, 1000):
        pieces = [text[at : at + step] for at in range(0, len(text), step)]
        assert given(formats.TAGGED, pieces, piecewise=True) == whole


@pytest.mark.parametrize("rest", [
    '{"x": NaN}}', '{"x" 1}}', '{"x": "\\q"}}', '{"x": 01}}', '{"x": tru', '{"x": "a', '{x: 1}}',
])  # fmt: skip
def test_a_call_that_breaks_off_ends_there_and_nothing_is_lost(rest: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {rest}'
    for pieces in ([text], list(text)):
        content, calls = given(formats.TAGGED, pieces, piecewise=True)
        assert [call.name for call in calls] == ["f"]
        joined = calls[0].arguments + content
        assert joined.replace(" ", "") == rest.replace(" ", "")
        with pytest.raises(ValueError):
            json.loads(calls[0].arguments)
    good: Any = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    if rest.endswith("}}"):
        assert [call.name for call in given(formats.TAGGED, [text, good], piecewise=True)[1]] == ["f", "g"]


def test_what_is_no_call_stays_text_in_pieces_too() -> None:
    for text in ('<tool_call>{"name": 3}', '<tool_call>{"arguments": {}}', "<tool_call>[1]", '{"name": "f"}'):
        assert given(formats.TAGGED, list(text), piecewise=True) == (text, [])
    other = '{"name": "unknown", "parameters": {"x": 1}}'
    assert given(formats.BARE, list(other), piecewise=True) == (other, [])
