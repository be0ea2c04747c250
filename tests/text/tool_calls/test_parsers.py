"""Calls are taken out of answers in any pieces, as a plain reading of the whole text takes them."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from dymoe_runtime.text.tool_calls import formats, source
from dymoe_runtime.text.tool_calls.parser import MAX_FAILURES, Format, Parsed, StreamParser

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "share": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    "deep": {"type": ["object", "array"]},
    "flag": {"type": "boolean"},
}
FUNCTIONS = ("get_weather", "search.web", "write-file")
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}}}
    for name in FUNCTIONS
]
SPACE = " \t\r\n"
Calls = list[tuple[str, dict[str, Any]]]
Found = tuple[int, Calls]


# How each family's template writes calls.
def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_tagged(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)


def write_tagged_list(calls: Calls) -> str:
    return f"<tool_calls>{json.dumps([{'name': n, 'arguments': a} for n, a in calls])}</tool_calls>"


def write_action(calls: Calls) -> str:
    entries = [{"tool_call_id": str(i), "tool_name": n, "parameters": a} for i, (n, a) in enumerate(calls)]
    return f"<|START_ACTION|>{json.dumps(entries, indent=4, ensure_ascii=False)}<|END_ACTION|>"


def write_granite(calls: Calls) -> str:
    return f"<|tool_call|>{json.dumps([{'arguments': a, 'name': n} for n, a in calls])}"


def write_mistral(calls: Calls) -> str:
    if len(calls) > 1:
        return f"[TOOL_CALLS]{json.dumps([{'name': n, 'arguments': a, 'id': 'abcdefgh1'} for n, a in calls])}"
    return "".join(f"[TOOL_CALLS]{n}[CALL_ID]abcdefgh1[ARGS]{json.dumps(a)}" for n, a in calls)


def write_solar(calls: Calls) -> str:
    return "".join(
        f"<|tool_call:begin|>a1b2c3d4e5<|tool_call:name|>{n}<|tool_call:args|>{json.dumps(a)}<|tool_call:end|>"
        for n, a in calls
    )


def write_harmony(calls: Calls) -> str:
    return "".join(f"<|channel|>commentary to=functions.{n}<|message|>{json.dumps(a)}<|call|>" for n, a in calls)


def write_functions(calls: Calls) -> str:
    return "\n".join(
        f"<tool_call>\n<function={n}>\n"
        + "".join(f"<parameter={k}>\n{as_text(v)}\n</parameter>\n" for k, v in a.items())
        + "</function>\n</tool_call>"
        for n, a in calls
    )


def write_invocations(calls: Calls) -> str:
    return (
        "<minimax:tool_call>\n"
        + "".join(
            f'<invoke name="{n}">'
            + "".join(f'\n<parameter name="{k}">{as_text(v)}</parameter>' for k, v in a.items())
            + "\n</invoke>\n"
            for n, a in calls
        )
        + "</minimax:tool_call>"
    )


def write_pairs(calls: Calls, suffix: str = "") -> str:
    return "\n".join(
        f"<tool_call>{n}\n"
        + "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{as_text(v)}</arg_value>\n" for k, v in a.items())
        + "</tool_call>"
        for n, a in calls
    )


def write_hy3(calls: Calls) -> str:
    text = "".join(
        f"<tool_call>{n}<tool_sep>\n"
        + "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{as_text(v)}</arg_value>\n" for k, v in a.items())
        + "</tool_call>\n"
        for n, a in calls[:1]
    )
    return re.sub(
        "<(/?(?:tool_calls?|tool_sep|arg_key|arg_value))>", r"<\1:opensource>", f"<tool_calls>\n{text}</tool_calls>"
    )


def write_gemma(calls: Calls) -> str:
    def value(v: Any) -> str:
        if isinstance(v, str):
            return f'<|"|>{v}<|"|>'
        if isinstance(v, dict):
            return "{" + ",".join(f"{k}:{value(x)}" for k, x in v.items()) + "}"
        return "[" + ",".join(map(value, v)) + "]" if isinstance(v, list) else json.dumps(v)

    return "".join(f"<|tool_call>call:{n}{value(a)}<tool_call|>" for n, a in calls)


def write_bare(calls: Calls) -> str:
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)


# A plain reading: what the whole text has at a place, by regular expressions and Python's JSON.
DECODER = json.JSONDecoder(strict=False)
NAME, KEY = r"[\w.:/@-]+", r'[^<>{}"\n]+'
WHITE = re.compile(r"[ \t\r\n]*")


def white(text: str, at: int) -> int:
    found = WHITE.match(text, at)
    assert found is not None
    return found.end()


def plain_json(text: str, at: int, begin: str, end: str) -> Found | None:
    calls: Calls = []
    at = white(text, at + len(begin))
    while text.startswith(("{", "["), at):
        new: Calls = []
        try:
            value, after = DECODER.raw_decode(text, at)
            for entry in value if isinstance(value, list) else [value]:
                name = entry.get("name", entry.get("tool_name"))
                arguments = entry.get("arguments", entry.get("parameters", {}))
                assert re.fullmatch(NAME, name) and isinstance(arguments, dict)
                new.append((name, arguments))
        except (ValueError, AttributeError, AssertionError, TypeError):
            break
        calls += new
        at = white(text, after)
        if not end or not new:
            break
    return (at + len(end) * text.startswith(end, at), calls) if calls else None


def plain_match(pattern: str, text: str, at: int) -> Found | None:
    found = re.compile(pattern, re.DOTALL).match(text, at)
    if found is None:
        return None
    try:
        arguments, end = DECODER.raw_decode(text, white(text, found.end()))
    except ValueError:
        return None
    return (end, [(found[1], arguments)]) if isinstance(arguments, dict) else None


def typed(name: str, key: str, text: str, unknown_is_json: bool) -> Any:
    known = name in FUNCTIONS and key in PROPERTIES
    if (known and key == "city") or (not known and not unknown_is_json):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def plain_marked(
    call: str, pair: str, text: str, at: int, unknown_is_json: bool = False, trim: str = ""
) -> Found | None:
    found = re.compile(call, re.DOTALL).match(text, at)
    if found is None:
        return None
    calls: Calls = []
    for one in re.finditer(call, found[0], re.DOTALL):
        arguments = {}
        for key, value in re.findall(pair, one[2], re.DOTALL):
            value = value.removeprefix(trim).removesuffix(trim)
            arguments[key] = typed(one[1], key, value, unknown_is_json)
        calls.append((one[1].strip(), arguments))
    return found.end(), calls


def plain_gemma(text: str, at: int) -> Found | None:
    found = re.compile(rf"<\|tool_call>call:\s*({NAME})\s*(\{{.*?\}})\s*<tool_call\|>", re.DOTALL).match(text, at)
    if found is None:
        return None
    pieces = re.split(r'(<\|"\|>.*?<\|"\|>)', found[2], flags=re.DOTALL)
    keyed = [
        json.dumps(p[5:-5]) if i % 2 else re.sub(r"([{,]\s*)([\w./@-]+)\s*:", r'\1"\2":', p)
        for i, p in enumerate(pieces)
    ]
    try:
        return found.end(), [(found[1], json.loads("".join(keyed), strict=False))]
    except ValueError:
        return None


def plain_harmony(text: str, at: int) -> Found | None:
    begin = rf"<\|channel\|>commentary to=\s*(?:functions\.)?({NAME})\s*<\|message\|>"
    empty = re.compile(rf"{begin}\s*<\|call\|>").match(text, at)
    if empty is not None:
        return empty.end(), [(empty[1], {})]
    return with_end(plain_match(begin, text, at), text, "<|call|>")


def plain_invocations(text: str, at: int) -> Found | None:
    pair = rf'\s*<parameter name="({KEY})">((?:(?!</parameter>).)*)</parameter>'
    call = rf'\s*<invoke name="({NAME})">((?:{pair})*)\s*</invoke>'
    found = re.compile(rf"<minimax:tool_call>((?:{call})+)\s*(</minimax:tool_call>)?", re.DOTALL).match(text, at)
    if found is None:
        return None
    inner = [one for one in re.finditer(call, found[1], re.DOTALL)]
    calls = [(one[1], {k: typed(one[1], k, v, False) for k, v in re.findall(pair, one[2], re.DOTALL)}) for one in inner]
    return found.end(), calls


def plain_bare(text: str, at: int) -> Found | None:
    calls: Calls = []
    while text.startswith("{", at):
        found = plain_json(text, at, "", "")
        if found is None or found[1][0][0] not in FUNCTIONS:
            break
        calls += found[1]
        at = white(text, found[0])
        at = white(text, at + text.startswith(";", at))
    return (at, calls) if calls else None


SUFFIX = ":opensource"
PAIR = r"\s*<arg_key{0}>([^<>{{}}\"\n]+)</arg_key{0}>\s*<arg_value{0}>((?:(?!</arg_value{0}>).)*)</arg_value{0}>"
PAIR_CALL = rf"<tool_call{{0}}>\s*({NAME})\s*(?:<tool_sep{{0}}>)?((?:{PAIR})*)\s*</tool_call{{0}}>"
QWEN_PAIR = r"\s*<parameter=([^<>{}\"\n]+)>((?:(?!</parameter>).)*)</parameter>"
QWEN_CALL = rf"(?:<tool_call>\s*)?<function=({NAME})>((?:{QWEN_PAIR})*)\s*</function>\s*(?:</tool_call>)?"
SOLAR_CALL = rf"<\|tool_call:begin\|>.{{0,64}}?<\|tool_call:name\|>\s*({NAME})\s*<\|tool_call:args\|>"
Plain = Callable[[str, int], Found | None]
FORMATS: dict[str, tuple[Format, Callable[[Calls], str], Plain]] = {
    "tagged": (formats.TAGGED, write_tagged, lambda t, a: plain_json(t, a, "<tool_call>", "</tool_call>")),
    "list": (formats.TAGGED_LIST, write_tagged_list, lambda t, a: plain_json(t, a, "<tool_calls>", "</tool_calls>")),
    "action": (formats.ACTION, write_action, lambda t, a: plain_json(t, a, "<|START_ACTION|>", "<|END_ACTION|>")),
    "granite": (formats.GRANITE, write_granite, lambda t, a: plain_json(t, a, "<|tool_call|>", "")),
    "mistral": (
        formats.MISTRAL,
        write_mistral,
        lambda t, a: plain_json(t, a, "[TOOL_CALLS]", "")
        if re.compile(r"\[TOOL_CALLS\]\s*\[").match(t, a)
        else plain_match(rf"\[TOOL_CALLS\]\s*({NAME})\s*(?:\[CALL_ID\]\s*{NAME}\s*)?\[ARGS\]", t, a),
    ),
    "solar": (
        formats.SOLAR,
        write_solar,
        lambda t, a: with_end(
            plain_match(SOLAR_CALL, t, a), t, "<|tool_call:end|>"
        ),
    ),
    "harmony": (formats.HARMONY, write_harmony, lambda t, a: plain_harmony(t, a)),
    "functions": (
        formats.FUNCTIONS,
        write_functions,
        lambda t, a: plain_marked(QWEN_CALL, QWEN_PAIR, t, a, trim="\n"),
    ),
    "invocations": (formats.INVOCATIONS, write_invocations, plain_invocations),
    "pairs": (
        formats.PAIRS,
        write_pairs,
        lambda t, a: plain_marked(PAIR_CALL.format(""), PAIR.format(""), t, a, unknown_is_json=True),
    ),
    "hy3": (
        formats.HY3_PAIRS,
        write_hy3,
        lambda t, a: plain_marked(
            rf"(?:<tool_calls{SUFFIX}>\s*)?{PAIR_CALL.format(SUFFIX)}\s*(?:</tool_calls{SUFFIX}>)?",
            PAIR.format(SUFFIX), t, a, unknown_is_json=True,
        ),
    ),
    "gemma": (formats.GEMMA, write_gemma, plain_gemma),
    "bare": (formats.BARE, write_bare, plain_bare),
}  # fmt: skip


def with_end(found: Found | None, text: str, end: str) -> Found | None:
    if found is None:
        return None
    at = white(text, found[0])
    return at + len(end) * text.startswith(end, at), found[1]


def read_plainly(form: Format, plain: Plain, text: str) -> tuple[str, Calls]:
    """The text and the calls of a whole answer."""
    pieces, calls, at = [""], Calls(), 0
    while at < len(text):
        starts = [start for mark in form.begins if (start := text.find(mark, at)) >= 0]
        if form.bare:
            starts = [white(text, 0)] if not at and text.startswith("{", white(text, 0)) else []
        if not starts:
            break
        start = min(starts)
        found = plain(text, start)
        if found is None:
            mark = max((m for m in form.begins if text.startswith(m, start)), key=len)
            pieces[-1] += text[at : start + len(mark)]
            at = start + len(mark)
            if form.bare:
                break
        else:
            pieces[-1] += text[at:start]
            pieces.append("")
            at, calls = found[0], calls + found[1]
    pieces[-1] += text[at:]
    last = len(pieces) - 1
    if not last:
        return pieces[0], calls
    strip = " \t\r\n"
    kept = [
        p.rstrip(strip) if not i else p.lstrip(strip) if i == last else p.strip(strip) for i, p in enumerate(pieces)
    ]
    return "".join(kept), calls


def stream(form: Format, pieces: list[str]) -> tuple[str, Calls]:
    """What a parser makes of an answer in pieces."""
    numbers = count()
    parser = StreamParser(form, TOOLS, lambda: f"call{next(numbers):05}")
    content, calls = "", Calls()
    parsed: list[Parsed] = [*map(parser.push, pieces), parser.flush(), parser.flush()]
    for part in parsed:
        content += part.content
        for delta in part.calls:
            assert delta.index == len(calls) and delta.id and delta.name is not None
            calls.append((delta.name, json.loads(delta.arguments)))
    return content, calls


WORDS = ["Let me see. ", "<b>", "\n", "  ", "{x}", "<tool", "[TOOL_", "ünï", "<|", "a < b", "]", "你好", '"', "ok\n\n"]
VALUES = ["Köln", "", ' "q" \\ ', "a\nb", "12", "true", "x, y} ]", "<div>", "👍🏽"]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(VALUES)
    if kind < 5:
        return rng.choice([0, -7, 3.5, 10**20, True, False, None])
    if kind < 7:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {f"k{i}": random_value(rng, depth + 1) for i in range(rng.randrange(3))}


def random_calls(rng: random.Random) -> Calls:
    return [
        (
            rng.choice(FUNCTIONS),
            {
                key: value
                for key, value in {
                    "city": rng.choice(VALUES),
                    "days": rng.randrange(100),
                    "share": rng.choice([0.5, None, 3.0]),
                    "deep": {f"k{i}": random_value(rng) for i in range(3)},
                    "flag": rng.random() < 0.5,
                    "unknown": rng.choice(["text", "a b", "ünï"]),
                }.items()
                if rng.random() < 0.6
            },
        )
        for _ in range(rng.randrange(1, 4))
    ]


def fragments(rng: random.Random, text: str) -> list[str]:
    pieces = list[str]()
    at = 0
    while at < len(text):
        length = rng.choice([1, 1, 2, 5, 17, 200])
        pieces.append(text[at : at + length])
        at += length
    return pieces


@pytest.mark.parametrize("name", FORMATS)
def test_any_pieces_are_read_as_the_whole(name: str) -> None:
    """16 conversations a format, 208 in all; each whole, and with something missing."""
    form, write, plain = FORMATS[name]
    rng = random.Random(name)
    for number in range(16):
        calls = random_calls(rng)
        calls = calls[:1] if name == "hy3" else calls
        before = "" if form.bare else "".join(rng.choices(WORDS, k=rng.randrange(4)))
        after = "" if form.bare else "".join(rng.choices(WORDS, k=rng.randrange(3)))
        if name in ("tagged", "list", "action", "mistral"):  # JSON that follows would be another call
            after = after.replace("{x}", "").replace("]", "")
        text = before + write(calls) + after
        content, found = read_plainly(form, plain, text)
        assert found == calls, (number, text)
        assert stream(form, fragments(rng, text)) == (content, calls)
        for _ in range(4):  # a piece is missing, or the end
            start = rng.randrange(len(text))
            damaged = text[:start] + (text[start + rng.randrange(1, 9) :] if rng.random() < 0.7 else "")
            expected = read_plainly(form, plain, damaged)
            assert stream(form, fragments(rng, damaged)) == expected, damaged
            if not expected[1]:
                assert expected[0] == damaged


# Answers as the families document them, and the calls in them.
EXAMPLES: list[tuple[str, str, str, Calls]] = [
    (
        "tagged",
        '<tool_call>\n{"name": "get_current_temperature", "arguments": {"location": "San Francisco, CA, USA"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "get_temperature_date", "arguments": {"location": "San Francisco, CA, USA"'
        ', "date": "2024-10-01"}}\n</tool_call>',
        "",
        [
            ("get_current_temperature", {"location": "San Francisco, CA, USA"}),
            ("get_temperature_date", {"location": "San Francisco, CA, USA", "date": "2024-10-01"}),
        ],
    ),
    (
        "functions",
        "I'll square it.\n<tool_call>\n<function=square_the_number>\n<parameter=input_num>\n1024\n</parameter>\n"
        "</function>\n</tool_call>",
        "I'll square it.",
        [("square_the_number", {"input_num": "1024"})],
    ),
    (
        "functions",  # the first mark is often left out
        "<function=get_weather>\n<parameter=city>\nBeijing\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>"
        "\n</tool_call>",
        "",
        [("get_weather", {"city": "Beijing", "days": 2})],
    ),
    (
        "pairs",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n<arg_key>date</arg_key>\n"
        "<arg_value>2024-06-27</arg_value>\n</tool_call>",
        "",
        [("get_weather", {"city": "北京", "date": "2024-06-27"})],
    ),
    ("pairs", "<tool_call>now</tool_call>", "", [("now", {})]),
    (
        "invocations",
        '<minimax:tool_call>\n<invoke name="search_web">\n<parameter name="query_tag">["technology", "events"]'
        '</parameter>\n<parameter name="city">Shanghai</parameter>\n</invoke>\n</minimax:tool_call>',
        "",
        [("search_web", {"query_tag": '["technology", "events"]', "city": "Shanghai"})],
    ),
    (
        "harmony",
        '<|channel|>commentary to=functions.get_current_weather<|message|>{"location":"San Francisco"}<|call|>',
        "",
        [("get_current_weather", {"location": "San Francisco"})],
    ),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "get_current_weather", "arguments": {"location": "Paris", "format": "celsius"}, '
        '"id": "VvvODy9mT"}]',
        "",
        [("get_current_weather", {"location": "Paris", "format": "celsius"})],
    ),
    (
        "list",
        '<tool_calls>[{"name": "get_weather", "arguments": {"city": "深圳"}}]</tool_calls>',
        "",
        [("get_weather", {"city": "深圳"})],
    ),
    (
        "gemma",
        '<|tool_call>call:get_current_temperature{location:<|"|>London<|"|>,unit:<|"|>c, or {f}<|"|>}<tool_call|>',
        "",
        [("get_current_temperature", {"location": "London", "unit": "c, or {f}"})],
    ),
    (
        "action",
        'I will look.<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "search", "parameters": {"q": "x"}}\n]'
        "<|END_ACTION|>",
        "I will look.",
        [("search", {"q": "x"})],
    ),
    ("bare", ' {"name": "get_weather", "parameters": {"city": "Oslo"}}', "", [("get_weather", {"city": "Oslo"})]),
    ("bare", '{"name": "Ann", "parameters": {}} is a person', '{"name": "Ann", "parameters": {}} is a person', []),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), EXAMPLES)
def test_documented_answers(name: str, text: str, content: str, calls: Calls) -> None:
    form = FORMATS[name][0]
    assert stream(form, list(text)) == (content, calls)
    assert stream(form, [text]) == (content, calls)


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    parser = StreamParser(formats.TAGGED)
    assert parser.push("Hello, ").content == "Hello,"
    assert parser.push("world <too").content == " world"
    assert parser.push("th>").content == " <tooth>"
    assert parser.push('\n<tool_call>{"name": "f"').content == ""
    calls = parser.push(', "arguments": {"x": 1}}</tool_call').calls
    assert not calls
    calls = parser.push(">").calls
    assert [(c.index, c.name, c.arguments) for c in calls] == [(0, "f", '{"x": 1}')] and len(calls[0].id) == 9
    assert parser.push("\n\nDone. ").content == "Done." and parser.flush().content == " "


@pytest.mark.parametrize("body", [
    '{"name": 3, "arguments": {}}', '{"arguments": {}}', '{"name": "", "arguments": {}}', "[]", "[1]", '"f"', "{", "",
    '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": NaN}', '{"name": "f", "arguments": {"x": Infinity}}',
    '{"name": "f", "arguments": "no"}', '{"name": "' + "f" * 300 + '"}', '{"name": "a\\u0000"}', '{"name": "a b"}',
    '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "[" * 100 + "]" * 100,
    '{"name": "f", "arguments": {"x": ' + "[" * 99 + "]" * 99 + "}}",
])  # fmt: skip
def test_malformed_calls_stay_text(body: str) -> None:
    text = f"a\n<tool_call>{body}</tool_call> b"
    for pieces in ([text], list(text)):
        assert stream(formats.TAGGED, pieces) == (text, [])
    good = '<tool_call>{"name": "f"}</tool_call>'
    if body not in ("{", "[" * 100 + "]" * 100):
        assert stream(formats.TAGGED, [text, good]) == (text, [("f", {})])


def test_a_number_that_is_too_large_is_the_largest() -> None:
    (call,) = stream(formats.TAGGED, ['<tool_call>{"name": "f", "arguments": {"x": -1e999}}</tool_call>'])[1]
    assert call == ("f", {"x": -sys.float_info.max})


def test_half_of_a_surrogate_pair_can_be_sent() -> None:
    parser = StreamParser(formats.TAGGED)
    delta = parser.push('<tool_call>{"name": "f", "arguments": {"x": "\\ud800é"}}</tool_call>').calls[0]
    assert delta.arguments.encode() and json.loads(delta.arguments) == {"x": "\ud800é"}


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_answers_take_little_time(name: str) -> None:
    form, write, _ = FORMATS[name]
    call = write([(FUNCTIONS[0], {"city": "x"})])
    longest = source.MAX_CALL
    texts = [
        form.begins[0] * 20_000,
        (form.begins[0] + '{"') * 20_000,
        call[:-1] + "x" * 100 + " " * 300_000 + form.begins[0] * 100,
        call[: call.index("x")] + "y" * (longest + 10),
        "\n" * 200_000,
    ]
    for text in texts:
        pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
        started = time.process_time()
        content, calls = stream(form, pieces)
        assert time.process_time() - started < 5
        assert (content == text and not calls) or len(calls) < 5


def test_after_many_failures_all_is_text() -> None:
    bad, good = "<tool_call>x", '<tool_call>{"name": "f"}</tool_call>'
    assert stream(formats.TAGGED, [bad * (MAX_FAILURES - 1), good])[1] == [("f", {})]
    assert stream(formats.TAGGED, [bad * MAX_FAILURES, good]) == (bad * MAX_FAILURES + good, [])
