"""An answer that must call a tool does so whatever the model says, in every format, with arguments that fit."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from text_kit import CONFIG, byte_level_backend
from tokenizers import AddedToken

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.constraints.grammars import Grammars
from dymoe_runtime.text.generate import Ending, Token, answer_tokens
from dymoe_runtime.text.reasoning import Splitter, make_splitter
from dymoe_runtime.text.sampling import Sampler, SamplingParams
from dymoe_runtime.text.tokenizer import Tokenizer
from dymoe_runtime.text.tool_calls import formats
from dymoe_runtime.text.tool_calls.parser import CallDelta, Format, StreamParser

FORMATS = {name: form for name, form in vars(formats).items() if isinstance(form, Format)}
# Marks of turns and channels, which the formats have beside their own.
CHANNELS = {
    "HARMONY": ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>"),
    "SOLAR": ("<|think|>", "<|content|>", "<|begin|>", "<|end|>", "<|tool_calls|>"),
}
# What ends a text within an answer, as one token, so that random answers find it.
ENDS = {
    "FUNCTIONS": "\n</parameter>", "INVOCATIONS": "</parameter>", "PAIRS": "</arg_value>", "GEMMA": '<|"|>',
    "HY3_PAIRS": "</arg_value:opensource>", "HARMONY": "<|end|>", "SOLAR": "<|end|>",
}  # fmt: skip
PLACE = {
    "type": "object",
    "properties": {"lat": {"type": "number"}, "name": {"type": "string", "maxLength": 9}},
    "required": ["lat"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "description": "where"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "level": {"enum": [1, 2.5, None]},
        "place": {"$ref": "#/$defs/place"},
        "tags": {"type": "array", "items": {"enum": ["a", "b c"]}, "minItems": 1, "maxItems": 3},
        "exact": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city", "unit", "place"],
    "additionalProperties": False,
    "$defs": {"place": PLACE},
}
NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "x": {"type": "integer"}},
}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS: dict[str, Any] = {"get_weather": WEATHER, "list.add": NODE, "now": NO_ARGUMENTS}


def tools(schemas: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in schemas.items()]


@lru_cache
def tokenizer_of(name: str, special: bool, end: str | None = None) -> Tokenizer:
    """A tokenizer that has the marks of a format as special tokens, or spells them, and what ends a text as a token."""
    end = end or ENDS.get(name)
    backend = byte_level_backend()
    if special:
        marks = (*FORMATS[name].special, *CHANNELS.get(name, ()))
        backend.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    if end is not None and backend.token_to_id(end) is None:
        backend.add_tokens([AddedToken(end, normalized=False)])
    return Tokenizer(backend, CONFIG, {})


@lru_cache
def grammars_of(name: str, special: bool) -> Grammars:
    return Grammars(tokenizer_of(name, special))


class Babble:
    """A model whose logits are random; more and more it wants what ends things."""

    max_context = 4000

    def __init__(self, tokenizer: Tokenizer, seed: int, end: str | None, haste: float) -> None:
        self._random = np.random.default_rng(seed)
        self._bias = np.zeros(tokenizer.vocab_size, np.float32)
        for token_id in range(tokenizer.vocab_size):
            token = tokenizer.decode([token_id], skip_special_tokens=False)
            self._bias[token_id] = 2 * (token == end) + (len(token) < 4 and any(mark in token for mark in '"]}'))
        self.position, self.changes, self._haste = 0, 0, haste

    def prefill(self, ids: Any) -> np.ndarray:
        return self.decode(0)

    def decode(self, token_id: int) -> np.ndarray:
        self.changes += 1
        self.position += 1
        logits: np.ndarray = 3 * self._random.standard_normal(len(self._bias), np.float32)
        return logits + self._bias * self.position * self._haste


def answer(
    tokenizer: Tokenizer, constraint: Any, seed: int, splitter: Splitter, end: str | None, haste: float = 0.1
) -> list[Token]:
    tokens = answer_tokens(
        Babble(tokenizer, seed, end, haste),
        tokenizer,
        [5],
        Sampler(SamplingParams(temperature=1.0, seed=seed)),
        Ending.of(tokenizer, 3000, (), (), False),
        constraint=constraint,
        splitter=splitter,
    )
    return list(tokens)


def calls_in(name: str, text: str, given: list[dict[str, Any]]) -> list[CallDelta]:
    parser = StreamParser(FORMATS[name], given)
    parts = [parser.push(text), parser.flush()]
    assert not "".join(part.content for part in parts), text[:600]
    return [call for part in parts for call in part.calls]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_random_answers_are_calls_with_valid_arguments(name: str, special: bool) -> None:
    if name in ("HARMONY", "SOLAR") and not special:
        pytest.skip("the format is known by its special tokens")
    tokenizer, grammars, form = tokenizer_of(name, special), grammars_of(name, special), FORMATS[name]
    splitter = lambda: make_splitter("", "", tokenizer.special_ids, set(form.special) & tokenizer.special_ids.keys())  # noqa: E731
    called, counts = set[str](), set[int]()
    cases: Any = (
        (SCHEMAS, False, 4),
        ({"get_weather": WEATHER}, True, 2),
        ({"list.add": NODE}, True, 1),
        ({"now": NO_ARGUMENTS}, True, 8),
    )
    for schemas, many, seeds in cases:
        given = tools(schemas)
        made = grammars.calls(form, given, many)
        for seed in range(seeds):
            tokens = answer(
                tokenizer,
                made.constraint(),
                seed,
                splitter(),
                ENDS.get(name),
                0.1 if len(schemas[min(schemas)]["properties"]) else 0.0,
            )
            text = "".join(token.text for token in tokens)
            assert tokens[-1].finish == "stop", text[:600]
            calls = calls_in(name, text, given)
            assert calls if many else len(calls) == 1
            for call in calls:
                jsonschema.validate(json.loads(call.arguments), schemas[call.name or ""])
                called.add(call.name or "")
            counts.add(len(calls))
    assert called == SCHEMAS.keys() and (max(counts) > 1 or name == "HARMONY")


@pytest.mark.parametrize("begun", ["", "<think>"])
def test_thoughts_before_a_call_are_free(begun: str) -> None:
    """Between their marks; the call follows them."""
    given, end = tools({"now": NO_ARGUMENTS}), "</think>"
    tokenizer = tokenizer_of("TAGGED", True, end)
    made, thoughts = Grammars(tokenizer).calls(formats.TAGGED, given, False), 0
    for seed in range(6):
        splitter = make_splitter(f"<think>{end}", begun, tokenizer.special_ids, formats.TAGGED.special)
        tokens = answer(tokenizer, made.constraint(), seed, splitter, end)
        assert tokens[-1].finish == "stop"
        thoughts += any(token.reasoning for token in tokens)
        (call,) = calls_in("TAGGED", "".join(token.text for token in tokens), given)
        assert call.name == "now"
    assert thoughts == 6 if begun else thoughts < 6


@pytest.mark.parametrize(("name", "begin"), [("HARMONY", "<|channel|>analysis<|message|>"), ("SOLAR", "<|think|>")])
def test_thoughts_in_a_channel_are_free(name: str, begin: str) -> None:
    """The grammar has a place for them, and none for an answer without a call."""
    tokenizer, given = tokenizer_of(name, True), tools({"now": NO_ARGUMENTS})
    constraint = grammars_of(name, True).calls(FORMATS[name], given, False).constraint()
    text = f"{begin}Let me {{think}}.\n"
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        assert constraint.permits(token_id)
        constraint.accept(token_id)
    assert not constraint.permits(min(tokenizer.eos_ids))
    fresh = grammars_of(name, True).calls(FORMATS[name], given, False).constraint()
    assert not fresh.permits(tokenizer.encode("x", add_special_tokens=False)[0])


REFUSED: dict[str, tuple[str, Any, str]] = {
    "pattern": ("FUNCTIONS", {"properties": {"x": {"type": "string", "pattern": "^a+$"}}}, "'pattern'"),
    "together": ("PAIRS", {"properties": {"x": {"type": "string"}}, "minProperties": 1}, "'minProperties'"),
    "mixture": ("INVOCATIONS", {"properties": {"x": {"type": ["string", "null"], "maxLength": 3}}}, "maxLength"),
    "several": ("HY3_PAIRS", {"properties": {"x": {"enum": ["a", 1]}}}, "several types"),
    "name": ("FUNCTIONS", {"properties": {"<x>": {"type": "string"}}}, "a name that this model cannot write"),
    "list": ("GEMMA", {"properties": {"x": {"type": "array", "uniqueItems": True}}}, "'uniqueItems'"),
    "no object": ("TAGGED", {"type": "array"}, "type object"),
    "malformed": ("TAGGED", {"type": "object", "properties": {"x": {"type": "nothing"}}}, "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused(case: str) -> None:
    name, schema, words = REFUSED[case]
    with pytest.raises(DymoeError) as refused:
        grammars_of(name, True).calls(FORMATS[name], tools({"f": schema}), where="tool_choice")
    assert words in str(refused.value) and str(refused.value).startswith("tool_choice: ")


def test_names_that_no_call_can_have_are_refused() -> None:
    rng = random.Random(0)
    for bad in ("a b", "", "x" * 300, 'q"', rng.choice(["ü\n", "<f>"])):
        with pytest.raises(DymoeError, match="rename"):
            grammars_of("TAGGED", True).calls(FORMATS["TAGGED"], tools({bad: {}}))
