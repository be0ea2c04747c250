"""Definitions, calls and results reach each kind of chat template in the form that it takes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from text_kit import CONFIG, byte_level_backend, fallback_backend
from tokenizers import AddedToken

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.generate import Ending, answer_tokens
from dymoe_runtime.text.sampling import Sampler, SamplingParams
from dymoe_runtime.text.tokenizer import Tokenizer
from dymoe_runtime.text.tool_calls import formats, parser_for

# Short templates with the traits of the families' own.
SAID = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
FUNCTION = "{% for c in m.tool_calls %}{% set f = c.function %}"
TEMPLATES = {
    "mapping": "{% for t in tools %}{{ t | tojson }}{% endfor %}"
    + SAID
    + FUNCTION
    + "<tool_call>{{ f.name }}{% for k, v in f.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>{% endfor %}{% endfor %}",
    "text": "{{ tools | tojson }}"
    + SAID
    + FUNCTION
    + "<tool_call>{{ '{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments + '}' }}{% endfor %}{% endfor %}",
    "description": "{% for t in tools %}{{ '// ' + t.function.description }}{% endfor %}" + SAID + "{% endfor %}",
    "short ids": "{{ tools }}"
    + SAID
    + "{% for c in m.tool_calls %}{% if c.id|length != 9 %}{{ raise_exception('id') }}{% endif %}[TOOL_CALLS]{{ c.id }}"
    "{% endfor %}{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}{% endfor %}",
    "first call": "{{ tools }}"
    + SAID
    + "{% if 'tool_calls' in m %}{% set message = m %}{{ message.tool_calls[0].function.name }}{% endif %}"
    "{{ m.thinking }}{% endfor %}",
    "listed": "{{ tools }}<|tool_call|>" + SAID + "{% endfor %}",
    "none": SAID + "{% endfor %}",
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + SAID
    + "{% endfor %}",
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BARE_TOOL = {"type": "function", "function": {"name": "g"}}


def call(name: str, arguments: Any, call_id: str = "call_1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [call("f", '{"x": "é"}'), call("g", {}, "call_2")]},
    {"role": "tool", "tool_call_id": "call_1", "content": "one"},
    {"role": "tool", "tool_call_id": "call_2", "content": "two"},
    {"role": "assistant", "content": "So.", "tool_calls": []},
]


def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(byte_level_backend(), CONFIG, {"default": TEMPLATES[name]})


def render(name: str, messages: list[dict[str, Any]] = MESSAGES) -> str:
    before = json.dumps(messages)
    text = tokenizer(name).chat(messages, tools=[TOOL, BARE_TOOL])
    assert json.dumps(messages) == before
    return text


def test_arguments_are_what_the_template_takes() -> None:
    assert "<tool_call>f<arg_key>x</arg_key><arg_value>é</arg_value></tool_call><tool_call>g</tool_call>" in render(
        "mapping"
    )
    assert render("mapping").startswith(json.dumps(TOOL))
    assert '<tool_call>{"name": "f", "arguments": {"x": "é"}}' in render("text")
    assert render("text").endswith("<tool>one<tool>two<assistant>So.")


def test_a_missing_description_is_empty() -> None:
    assert render("description").startswith("// // <user>Hi<assistant>")


def test_ids_have_the_length_that_the_template_takes() -> None:
    text = render("short ids")
    first, second = text.partition("[TOOL_CALLS]")[2].partition("<tool>one")[0].split("[TOOL_CALLS]")
    assert len(first) == len(second) == 9 and first != second
    assert f"<tool>one{first}<tool>two{second}" in text
    kept = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call("f", {}, "abcdefgh1")]}]
    assert render("short ids", kept).endswith("[TOOL_CALLS]abcdefgh1")


def test_a_template_that_writes_one_call_gets_each_in_a_message() -> None:
    assert render("first call").endswith("<user>Hi<assistant>f<tool>one<assistant>g<tool>two<assistant>So.")
    thinking = [{"role": "assistant", "content": "b", "thinking": "a", "tool_calls": [call("f", {})]}]
    assert render("first call", thinking).endswith("<assistant>fa\nb")


def test_calls_stand_in_the_text_where_the_template_writes_none() -> None:
    expected = (
        '<assistant><|tool_call|>[{"name": "f", "arguments": {"x": "é"}}, {"name": "g", "arguments": {}}]<tool>one'
    )
    assert expected in render("listed")


@pytest.mark.parametrize("name", ["none", "no system"])
def test_a_template_without_tools_is_told_in_a_message(name: str) -> None:
    text = render(name)
    assert text.startswith("<system>You can call" if name == "none" else "<user>Hi\n\nYou can call")
    assert json.dumps(TOOL["function"]) in text
    assert '<assistant><tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n<tool_call>' in text
    results = "<user><tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><assistant>So."
    assert text.endswith(results)
    with_system = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    if name == "none":
        assert render(name, with_system).startswith("<system>Be brief.\n\nYou can call")
    assert tokenizer(name).tool_format is formats.TAGGED


def test_a_prompt_without_tools_stays_as_it_was() -> None:
    plain = [{"role": "user", "content": "Hi"}]
    assert tokenizer("none").chat(plain) == "<user>Hi" == tokenizer("none").chat(plain, tools=[])


@pytest.mark.parametrize(("calls", "words"), [
    ([call("f", "[1]")], "message 1: .*'f' are no JSON object"),
    ([call("f", "{")], "message 1: .*'f' are no JSON object"),
    ("f", "message 1: tool_calls is no list"),
])  # fmt: skip
def test_malformed_calls_are_refused(calls: Any, words: str) -> None:
    for name in ("none", "mapping"):
        with pytest.raises(DymoeError, match=words):
            tokenizer(name).chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": calls}])


def test_calls_in_another_form_reach_the_template_as_they_are() -> None:
    own = Tokenizer(byte_level_backend(), CONFIG, {"default": "{{ messages[0].tool_calls[0].name }}"})
    assert own.chat([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]) == "f"


@pytest.mark.parametrize(("tools", "words"), [
    ([{"type": "function"}], "tool 0 has no function with a name"), (["f"], "tool 0 has no function with a name"),
    ("f", "the tools are of type str; give a list"),
])  # fmt: skip
def test_malformed_definitions_are_refused(tools: Any, words: str) -> None:
    with pytest.raises(DymoeError, match=words):
        tokenizer("none").chat([{"role": "user", "content": "Hi"}], tools=tools)


def test_a_template_that_refuses_all_forms_says_why_it_refused_the_first() -> None:
    refusing = Tokenizer(byte_level_backend(), CONFIG, {"default": "{{ tools }}{{ raise_exception('not today') }}"})
    with pytest.raises(DymoeError, match="the chat template failed: not today; change the messages"):
        refusing.chat(MESSAGES, tools=[TOOL])


@pytest.mark.parametrize(("template", "form"), [
    ("{{ tools }}<tool_call>\n{\"name\"", formats.TAGGED), ("{{ tools }}<tool_call>\n<function=x>", formats.FUNCTIONS),
    ("{% if tools %}<tool_call>{name}\n<arg_key>", formats.PAIRS), ("{{ tools }}'<arg_key{}>'", formats.HY3_PAIRS),
    ("{{ tools }}<minimax:tool_call><invoke", formats.INVOCATIONS), ("{{ tools }}[TOOL_CALLS]", formats.MISTRAL),
    ("{{ tools }}<tool_calls>[{", formats.TAGGED_LIST), ("{{ tools }}<|START_ACTION|>", formats.ACTION),
    ("{{ tools }}<|tool_call|>", formats.GRANITE), ("{{ tools }}<|tool_call>call:", formats.GEMMA),
    ("{{ tools }}<|tool_call:begin|>", formats.SOLAR), ("<|header_start|>{{ tools }}", formats.BARE),
    ("{{ tools }} in a way of its own", None), ("what tools? {{ messages }}", formats.TAGGED),
])  # fmt: skip
def test_the_template_says_the_format(template: str, form: formats.Format | None) -> None:
    found = Tokenizer(byte_level_backend(), CONFIG, {"default": template})
    assert found.tool_format is form
    assert (parser_for(found) is None) == (form is None)
    assert Tokenizer(byte_level_backend(), CONFIG, {}).tool_format is None
    both = Tokenizer(byte_level_backend(), CONFIG, {"default": "{{ messages }}", "tool_use": template})
    assert both.tool_format is form


class Saying:
    """A model that says ids one after the other."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        self.rows = np.zeros((len(ids), vocabulary), np.float32)
        self.rows[range(len(ids)), ids] = 1
        self.position = self.changes = 0
        self.max_context = 10_000

    def prefill(self, ids: Any) -> Any:
        self.changes += 1
        return self.rows[0]

    def decode(self, token_id: int) -> Any:
        self.changes += 1
        self.position += 1
        return self.rows[self.position]


def answer(tokenizer: Tokenizer, text: str, prompt: str = "", stop: str = "") -> tuple[str, str, list[tuple[str, str]]]:
    """The content, the reasoning and the calls of an answer whose text has special tokens in it."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_ids]
    ending = Ending.of(tokenizer, None, stop or (), (), False)
    model = Saying(ids, tokenizer.vocab_size)
    splitter = tokenizer.splitter(prompt)
    factory = parser_for(tokenizer)
    assert factory is not None
    parser = factory([TOOL])
    content, reasoning, calls = "", "", []
    for token in answer_tokens(model, tokenizer, [5], Sampler(SamplingParams()), ending, splitter=splitter):  # type: ignore[arg-type]
        parsed = parser.push(token.text)
        content, reasoning = content + parsed.content, reasoning + token.reasoning
        calls += [(delta.name or "", delta.arguments) for delta in parsed.calls]
    last = parser.flush()
    calls += [(delta.name or "", delta.arguments) for delta in last.calls]
    return content + last.content, reasoning, calls


def with_special(template: str, *marks: str, build: Any = byte_level_backend) -> Tokenizer:
    backend = build()
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return Tokenizer(backend, CONFIG, {"default": template})


@pytest.mark.parametrize("build", [byte_level_backend, fallback_backend])
def test_marks_that_are_special_tokens_stay_in_order_with_the_text(build: Any) -> None:
    marks = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|other|>")
    gemma = with_special("{{ tools }}<|tool_call>", *marks, build=build)
    text = 'Naïve 👍🏽<|tool_call>call:f{x:<|"|>👍🏽<|"|>,y:[<|"|>a"b<|"|>]}<tool_call|><|other|>'
    expected = {"x": "👍🏽", "y": ['a"b']}
    content, _, calls = answer(gemma, text)
    if build is fallback_backend:  # it writes a space before each piece of text
        expected = {"x": " 👍🏽", "y": [' a"b']}
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", expected)]
    assert content.strip() == "Naïve 👍🏽"


def test_harmony_calls_leave_the_reasoning() -> None:
    marks = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>")
    harmony = with_special("{{ tools }}", *marks)
    thought = "<|channel|>analysis<|message|>Need f.<|end|>"
    forms = (
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>',
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>',
        '<|start|>assistant<|channel|>analysis to=functions.f<|message|>{"x": 1}',
    )
    for form in forms:
        assert answer(harmony, thought + form) == ("", "Need f.", [("f", '{"x": 1}')])
    assert answer(harmony, ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}') == (
        "",
        "",
        [("f", '{"x": 1}')],
    )
    assert answer(harmony, forms[0] + forms[1])[2] == [("f", '{"x": 1}')] * 2
    final = "<|start|>assistant<|channel|>final<|message|>Yes."
    assert answer(harmony, thought + final) == ("Yes.", "Need f.", [])
    broken = answer(harmony, "<|channel|>commentary to=functions.f<|message|>{x<|end|>" + final)
    assert broken == ("<|channel|>commentary to=functions.f<|message|>{x<|call|>Yes.", "", [])


def test_solar_thinks_in_a_turn_of_its_own() -> None:
    own = ("<|begin|>", "<|think|>", "<|content|>", "<|end|>", "<|tool_calls|>", "<|calls|>")
    parts = ("<|tool_call:begin|>", "<|tool_call:name|>", "<|tool_call:args|>", "<|tool_call:end|>")
    solar = with_special("{{ tools }}<|tool_call:begin|>", *own, *parts)
    thought = "<|think|>Hm.<|end|><|begin|>assistant"
    assert answer(solar, f"{thought}<|content|>Yes.<|end|>") == ("Yes.", "Hm.", [])
    said = f'{thought}<|tool_calls|>{parts[0]}a1b2c3d4e5{parts[1]}f{parts[2]}{{"x": 1}}{parts[3]}<|calls|>'
    assert answer(solar, said) == ("", "Hm.", [("f", '{"x": 1}')])


def test_a_call_follows_reasoning_and_a_stop_string_ends_it() -> None:
    hermes = Tokenizer(byte_level_backend(), CONFIG, {"default": "{{ tools }}<tool_call>{'name'</think>"})
    said = 'Hm.\n</think>\n\nI look.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert answer(hermes, said, prompt="<think>\n") == ("I look.", "Hm.", [("f", "{}")])
    cut = answer(hermes, said, prompt="<think>\n", stop="}\n</tool")
    assert cut == ('I look.\n<tool_call>\n{"name": "f", "arguments": {}', "Hm.", [])


def test_hy3_thinks_in_marks_that_its_template_builds() -> None:
    template = "{% set HYTK = ':opensource' %}{{ '</think{}>'.format(HYTK) }}{{ tools }}{{ '<arg_key{}>' }}"
    hy3 = Tokenizer(byte_level_backend(), CONFIG, {"default": template})
    said = "Hm.</think:opensource><tool_calls:opensource>\n<tool_call:opensource>f<tool_sep:opensource>\n"
    said += "</tool_call:opensource>\n</tool_calls:opensource>"
    assert answer(hy3, said, prompt="<think:opensource>") == ("", "Hm.", [("f", "{}")])
