"""Constrained answers are valid whatever the model says, with every tokenizer, and hostile grammars are cheap."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from helpers import EXAMPLES
from text_kit import (
    CONFIG,
    byte_level_backend,
    fallback_backend,
    make_tokenizer,
    metaspace_backend,
    nested_byte_level_backend,
)
from tokenizers import AddedToken

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.constraints import Constraint, Grammars
from dymoe_runtime.text.constraints.checks import MAX_DEPTH, MAX_PARTS, MAX_RULES, MAX_TEXT
from dymoe_runtime.text.generate import Ending, Token, answer_tokens, generate
from dymoe_runtime.text.sampling import Sampler, SamplingParams
from dymoe_runtime.text.tokenizer import Tokenizer


class Babble:
    """A model whose logits are random; more and more they want an answer to end."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0, extra: int = 3, first: str = "") -> None:
        self._random = np.random.default_rng(seed)
        self._bias = np.zeros(tokenizer.vocab_size + extra, np.float32)
        for token_id in range(tokenizer.vocab_size):
            token = tokenizer.decode([token_id])
            self._bias[token_id] = any(mark in token for mark in '"]},') - 30 * (token.strip() == "")
        self._bias[[*tokenizer.eos_ids]] = 1
        self._first = tokenizer.encode(first, add_special_tokens=False) if first else []
        self.position = self.changes = 0
        self.max_context = 5000

    def prefill(self, ids: Any) -> np.ndarray:
        return self.decode(0)

    def decode(self, token_id: int) -> np.ndarray:
        self.changes += 1
        self.position += 1
        logits = 3 * self._random.standard_normal(len(self._bias), np.float32)
        if self.position <= len(self._first):
            logits[self._first[self.position - 1]] = 1000
        grown: np.ndarray = logits + self._bias * self.position / 4
        return grown


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.load(EXAMPLES / "model", (0,))


@pytest.fixture(scope="module")
def grammars(demo: Tokenizer) -> Grammars:
    return Grammars(demo)


def said(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def random_schema(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.choice(["string", "integer", "number", "enum", "object", "object", "array", "any", "const", "null"])
    if depth > 2 and kind in ("object", "array", "any"):
        kind = "boolean"
    if kind == "string":
        limits = {"maxLength": rng.randrange(4, 12)} if rng.random() < 0.7 else {}
        return rng.choice([{"type": "string", **limits}, {"type": "string", "pattern": "^[a-z]{1,4}-[0-9]{2}$"}])
    if kind == "integer":
        low = rng.randrange(-100, 100)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(200)}
    if kind == "number":
        return {"type": ["number", "null"], "exclusiveMinimum": rng.uniform(-5, 0), "maximum": 10}
    if kind == "enum":
        return {"enum": rng.sample(["red", 'a "b"', "ünï", 5, None, True, 1.5], 3)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, [1, "two"], {"a": None}])}
    if kind == "array":
        least = rng.randrange(3)
        items = {"type": "array", "items": random_schema(rng, depth + 1), "minItems": least, "maxItems": least + 2}
        return items | ({"prefixItems": [random_schema(rng, depth + 1)]} if rng.random() < 0.3 else {})
    if kind == "any":
        return {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]}
    if kind in ("boolean", "null"):
        return {"type": kind}
    names = rng.sample(["name", "größe", "a b", "x-1", "tags", 'q"q'], rng.randrange(1, 5))
    schema = {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names}}
    schema["required"] = rng.sample(names, rng.randrange(len(names) + 1))
    if rng.random() < 0.7:
        schema["additionalProperties"] = rng.choice([False, {"type": "integer"}])
    return schema


def with_reference(rng: random.Random, schema: Any) -> Any:
    """The schema as a node of a list."""
    if rng.random() < 0.8:
        return schema
    node = {
        "type": "object",
        "properties": {"value": schema, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    }
    return {"$defs": {"node": node | {"required": ["value"]}}, "$ref": "#/$defs/node"}


def test_a_hundred_random_schemas_have_valid_answers(demo: Tokenizer, grammars: Grammars) -> None:
    rng = random.Random(27)
    lengths = []
    for seed in range(100):
        schema = with_reference(rng, random_schema(rng))
        constraint = grammars.json_schema(schema).constraint()
        params = SamplingParams(rng.choice([0.0, 1.0]), seed=seed)
        tokens = list(generate(Babble(demo, seed), demo, [1], params, 2000, constraint=constraint))
        assert tokens[-1].finish == "stop", (schema, said(tokens))
        jsonschema.validate(json.loads(said(tokens)), schema)
        assert said(tokens).lstrip() == said(tokens)
        lengths.append(len(tokens))
    assert sum(lengths) > 1000 and len(set(lengths)) > 20


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("build", [byte_level_backend, fallback_backend, nested_byte_level_backend])
@pytest.mark.parametrize("extra", [0, 50])
def test_every_kind_of_tokenizer_can_be_constrained(build: Callable[[], tokenizers.Tokenizer], extra: int) -> None:
    tokenizer = make_tokenizer(build)
    grammar = Grammars(tokenizer).json_schema(SCHEMA)
    texts = set()
    for seed in range(6):
        model = Babble(tokenizer, seed, extra)
        tokens = list(generate(model, tokenizer, [5], SamplingParams(1.0), 500, constraint=grammar.constraint()))
        assert tokens[-1].finish == "stop" and tokenizer.decode([t.id for t in tokens]) == said(tokens)
        special = {*tokenizer.special_ids.values()} - tokenizer.eos_ids
        assert not special & {token.id for token in tokens} and max(t.id for t in tokens) < tokenizer.vocab_size
        jsonschema.validate(json.loads(said(tokens)), SCHEMA)
        texts.add(said(tokens))
    assert len(texts) == 6


def test_logits_of_allowed_tokens_stay_as_they_are(demo: Tokenizer, grammars: Grammars) -> None:
    constraint = grammars.regex("[0-9]{3}").constraint()
    logits = np.random.default_rng(0).standard_normal(demo.vocab_size + 9, np.float32)
    before = logits.copy()
    scores = constraint.allow(logits)
    allowed = np.flatnonzero(np.isfinite(scores))
    assert np.array_equal(logits, before) and np.array_equal(scores[allowed], logits[allowed])
    assert {demo.decode([i]) for i in allowed.tolist()} >= set("0123456789")
    assert all(re.fullmatch("[0-9]{1,3}", demo.decode([i])) for i in allowed.tolist())
    assert constraint.permits(int(allowed[0])) and not constraint.permits(len(logits))
    three = demo.encode("123", add_special_tokens=False)
    for token_id in three:
        assert not constraint.ended
        constraint.accept(token_id)
    assert constraint.ended
    assert set(np.flatnonzero(np.isfinite(constraint.allow(logits))).tolist()) == set(demo.eos_ids)
    constraint.restart()
    assert not constraint.ended and np.array_equal(constraint.allow(logits), scores)
    with pytest.raises(DymoeError, match="the grammar cannot go on"):
        constraint.accept(demo.encode("x", add_special_tokens=False)[0])


def test_constraints_of_one_grammar_are_apart(demo: Tokenizer, grammars: Grammars) -> None:
    grammar = grammars.regex("(ab)+")
    first, second = grammar.constraint(), grammar.constraint()
    for token_id in demo.encode("ab", add_special_tokens=False):
        first.accept(token_id)
    eos = min(demo.eos_ids)
    assert first.permits(eos) and not second.permits(eos)


GBNF = 'root ::= answer ("," ws answer)*\nanswer ::= "yes" | "no" | [0-9]{1,3} # a comment\nws ::= [ \\t]*\n'
LARK = 'start: answer ("," answer)*\nanswer: "yes" | "no" | /[0-9]{1,3}/\n'


@pytest.mark.parametrize(("text", "space"), [(GBNF, r"[ \t]*"), (LARK, "")])
def test_grammars_are_gbnf_or_lark(demo: Tokenizer, grammars: Grammars, text: str, space: str) -> None:
    grammar = grammars.grammar(text)
    for seed in range(5):
        tokens = list(generate(Babble(demo, seed), demo, [1], SamplingParams(1.0), 60, constraint=grammar.constraint()))
        one = "(yes|no|[0-9]{1,3})"
        assert tokens[-1].finish == "length" or re.fullmatch(f"{one}(,{space}{one})*", said(tokens))


def grown(make: Callable[[int], str], count: int) -> str:
    return "\n".join(map(make, range(count)))


LOOP = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}
MANY = {"properties": {f"p{i}": {} for i in range(MAX_PARTS)}}
DEEP = '{"items":' * (MAX_DEPTH + 1) + "{}" + "}" * (MAX_DEPTH + 1)
REFUSED_SCHEMAS: list[tuple[Any, str]] = [
    ({"not": {}}, "s.json: 'not' is not supported; leave it out"),
    ({"type": "array", "uniqueItems": True}, "s.json: 'uniqueItems' is not supported"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' is not supported where two"),
    ({"type": "strin"}, "Invalid type: strin; correct it"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum .2. is greater than maximum .1."),
    ("{", "not valid JSON"),
    ("[]", "not a JSON object"),
    ([], "of type list; give a JSON schema"),
    (False, "no value fits it"),
    ({"const": object()}, "no value of JSON"),
    ({"$ref": "http://127.0.0.1:9/x"}, "does not fetch|not present"),
    ({"$ref": "#/$defs/x"}, "does not exist"),
    ({"enum": ["x" * MAX_TEXT]}, f"more than {MAX_TEXT} characters; simplify it"),
    ('{"enum": ["' + "x" * MAX_TEXT + '"]}', f"more than {MAX_TEXT} characters"),
    (MANY, f"more than {MAX_PARTS} objects"),
    (DEEP, "nested more than"),
    ('{"items":' * 50_000, "more than|nested more than"),
    (
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        "no answer can end, because the schema",
    ),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no answer can end"),
    (LOOP, "no answer can end"),
    ({"type": "object", "required": ["a"], "additionalProperties": {"$ref": "#"}}, "no answer can end"),
]
REFUSED_GRAMMARS = [
    ('start: "a" start', "g.lark: no text can end, because the first rule needs itself"),
    ('root ::= "a" root', "no text can end"),
    ('start: "a" (b | c)\nb: "x" c\nc: b+', "no text can end"),
    ('start: b{2,3}\nb: "x" start', "no text can end"),
    ("start: x", "g.lark: no rule is named 'x'; add it"),
    ("start: %json {} x", 'g.lark: .*unknown name: "x"; correct it'),
    ('begin: "a"', "no start rule found"),
    ('start: ("a"', "Expected token"),
    ("root ::= ((", "not a grammar in GBNF"),
    ("root ::= " + "(" * 60 + '"a"', "not a grammar in GBNF|nested"),
    ("start: " + "(" * 500, "nested more than"),
    ("start: /" + "x" * MAX_TEXT + "/", f"more than {MAX_TEXT} characters"),
    (grown(lambda i: f"a{i}: a{i + 1}", MAX_RULES + 1), f"more than {MAX_RULES} rules"),
]


def assert_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(DymoeError, match=words) as refusal:
        make()
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize(("schema", "words"), REFUSED_SCHEMAS)
def test_schemas_that_cannot_be_used_are_refused(grammars: Grammars, schema: Any, words: str) -> None:
    assert_refused(lambda: grammars.json_schema(schema, "s.json"), words)


@pytest.mark.parametrize(("text", "words"), REFUSED_GRAMMARS)
def test_grammars_that_cannot_be_used_are_refused(grammars: Grammars, text: str, words: str) -> None:
    assert_refused(lambda: grammars.grammar(text, "g.lark"), words)


def test_expressions_that_cannot_be_used_are_refused(grammars: Grammars) -> None:
    assert_refused(lambda: grammars.regex("(a"), "the regular expression: .*invalid regex")
    assert_refused(lambda: grammars.regex(r"[^\s\S]"), "no text fits it")


OPTIONAL = {"type": "object", "properties": {"a": {"$ref": "#"}}}


@pytest.mark.parametrize("schema", [
    {"$defs": {"n": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}}, "$ref": "#/$defs/n"}, OPTIONAL, True,
    OPTIONAL | {"type": ["object", "null"], "required": ["a"]}, {"type": "array", "items": {"$ref": "#"}},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},
])  # fmt: skip
def test_schemas_that_can_end_are_taken(grammars: Grammars, schema: Any) -> None:
    assert grammars.json_schema(schema).constraint()
    assert schema is True or grammars.json_schema(json.dumps(schema)).constraint()


@pytest.mark.parametrize("text", [
    'start: "a" start | "b"', 'start: "a" start?', 'start: "x" b*\nb: "y" b', 'start: "x" b{0,2}\nb: "y" b',
    'start: ["a" start] "b" /[c-e]+/ %json {"type": "null"}',
    'start: A (start | "x")\nA: /a/ | B\nB: "b"\n// start: start\n%ignore / +/',
])  # fmt: skip
def test_grammars_that_can_end_are_taken(grammars: Grammars, text: str) -> None:
    assert grammars.grammar(text).constraint()


@pytest.mark.parametrize(("name", "make"), [
    ("states", lambda g: g.regex("(.*a.{20}b|.*b.{21}a|.*c.{22}d)+")),
    ("ambiguous", lambda g: g.grammar('start: s\ns: s s s | s s | "a" "b"? | "a" |')),
    ("items", lambda g: g.grammar(grown(lambda i: f"a{i or ''}: a{i + 1} a{i + 1} | a{i + 1} | \"y\" a", 200)
                                  + '\na200: "z"\nstart: a')),
    ("counts", lambda g: g.grammar('start: ("a" | "b" start){1,100000}')),
    ("lists", lambda g: g.json_schema({"type": "array", "minItems": 9**9, "items": {"type": "array"}})),
    ("length", lambda g: g.json_schema({"type": "string", "minLength": 10**6, "maxLength": 10**7})),
    ("properties", lambda g: g.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(400)}})),
    ("references", lambda g: g.json_schema({"$ref": "#/$defs/0", "$defs": {
        str(i): {"type": "array", "minItems": 1, "items": {"$ref": f"#/$defs/{i * 387 % 331}"}} for i in range(331)}})),
    ("chain", lambda g: g.grammar("start: a0\n" + grown(lambda i: f"a{i}: a{i + 1}", MAX_RULES - 2) + " | %json {}")),
    ("expression", lambda g: g.regex("(a{1000}){1000}" * 5)),
])  # fmt: skip
def test_hostile_grammars_take_little(
    demo: Tokenizer, grammars: Grammars, name: str, make: Callable[[Any], Any]
) -> None:
    """Each is refused, or each of its steps is short; the memory of all is bounded by the limits of the library."""
    started, resident = time.process_time(), resident_bytes()
    model = Babble(demo)
    try:
        constraint: Constraint = make(grammars).constraint()
        assert time.process_time() - started < 2
        for _ in range(100):
            logits = constraint.allow(model.decode(0))
            if not np.isfinite(logits).any() or constraint.ended:
                break
            constraint.accept(int(logits.argmax()))
    except DymoeError as error:
        assert "\n" not in str(error)
    assert time.process_time() - started < 5
    assert resident_bytes() - resident < 80 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def thinking(
    template: str, prompt: str, said_first: str, schema: Any, marks: tuple[str, ...] = ()
) -> tuple[str, str, str]:
    """The answer, the reasoning and the finish of a model that begins with a text and then babbles."""
    backend = byte_level_backend()
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokenizer = Tokenizer(backend, CONFIG, {"default": template})
    constraint = Grammars(tokenizer).json_schema(schema).constraint()
    ending = Ending.of(tokenizer, 300, (), (), False)
    model, sampler = Babble(tokenizer, first=said_first), Sampler(SamplingParams())
    options: dict[str, Any] = {"splitter": tokenizer.splitter(prompt), "constraint": constraint}
    tokens = list(answer_tokens(model, tokenizer, [5], sampler, ending, **options))
    return said(tokens), "".join(token.reasoning for token in tokens), str(tokens[-1].finish)


@pytest.mark.parametrize(("template", "prompt", "first", "reasoning", "marks"), [
    ("</think>", "<think>\n", "Free { words.\n</think>", "Free { words.", ()),
    ("</think>", "", "<think>Hm [</think>", "Hm [", ()), ("</think>", "", "{", "", ()),
    ("[/THINK]", "", "[THINK]Hm [[/THINK]", "Hm [", ("[THINK]", "[/THINK]")),
    ("", "", "<|channel|>analysis<|message|>Hm {<|end|><|start|>assistant<|channel|>final<|message|>", "Hm {",
     ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")),
    ("", "", "<|think|>Hm {<|end|><|begin|>assistant<|content|>", "Hm {",
     ("<|think|>", "<|content|>", "<|end|>", "<|begin|>")),
])  # fmt: skip
def test_a_constraint_begins_after_the_reasoning(
    template: str, prompt: str, first: str, reasoning: str, marks: tuple[str, ...]
) -> None:
    text, thought, finish = thinking(template, prompt, first, SCHEMA, marks)
    assert (thought, finish) == (reasoning, "stop")
    jsonschema.validate(json.loads(text), SCHEMA)


def test_an_end_token_does_not_follow_reasoning() -> None:
    text, thought, _ = thinking("</think>", "<think>", "Hm</s>", SCHEMA)
    assert len(thought) > 10 and not text


def test_tokenizers_that_cannot_write_json_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DymoeError, match=r"the tokenizer has no token for '.' alone, so no grammar fits it"):
        Grammars(make_tokenizer(metaspace_backend))
    with pytest.raises(DymoeError, match="the model has no end token"):
        Grammars(Tokenizer(byte_level_backend(), {}, {}))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        DymoeError, match=r"constrained output needs the extra 'grammar'.*pip install 'dymoe\[grammar\]'"
    ):
        Grammars(make_tokenizer())
