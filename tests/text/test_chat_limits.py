"""Chat templates from anywhere end within limits of time and memory, and reach nothing of the process."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from text_kit import CONFIG, byte_level_backend, save

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.chat_template import meter
from dymoe_runtime.text.tokenizer import Tokenizer

STEPS, CHARACTERS, OUTPUT = (
    "takes more than .* steps",
    "makes values of more than .* characters",
    "output is longer than",
)
BITS, DIGITS, DEEP, LONG = "number of more than 4,096 bits", "digits", "more than 100 deep", "is longer than 100,000"
PARTS, RECURSION, SECURITY = (
    "is made of more than 6,000 parts",
    "calls itself or is nested",
    "is unsafe|has no such method",
)
USED_UP = f"{STEPS}|{CHARACTERS}"
MANY = "{% for i in range(99999) %}{% for j in range(99999) %}"
END = "{% endfor %}{% endfor %}"
# ns.l and ns.m are equal, and each looks as if it had 2 to the 50 entries.
LAUGHS = (
    "{% set ns = namespace(l=['ha'], m=['ha']) %}{% for i in range(50) %}"
    "{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% endfor %}"
)
DOUBLING = "{% set ns = namespace(s='ab', l=[1], n=3) %}{% for i in range(60) %}"
HOSTILE = {
    "loops": (f"{MANY}{END}", STEPS),
    "a loop whose filter lets nothing through": (
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        STEPS,
    ),
    "a loop for each character": (
        "{% for c in 'ab' * 500000 %}{% for d in 'ab' * 500 %}{% endfor %}{% endfor %}",
        STEPS,
    ),
    "a repeated text": ("{{ ('a' * 10000000000)|length }}", CHARACTERS),
    "a repeated list": ("{{ (10000000000 * [1])|length }}", CHARACTERS),
    "center": ("{{ 'a'|center(10000000000) }}", CHARACTERS),
    "ljust": ("{{ 'a'.ljust(10000000000) }}", CHARACTERS),
    "zfill": ("{{ 'a'.zfill(10000000000) }}", CHARACTERS),
    "expandtabs": ("{{ '\t'.expandtabs(10000000000) }}", CHARACTERS),
    "indent": ("{{ 'a\nb'|indent(10000000000) }}", CHARACTERS),
    "indent by a text": ("{{ ('a\n' * 9999)|indent('x' * 9999) }}", CHARACTERS),
    "truncate": ("{{ 'abc'|truncate(1, True, 'x' * 100000000) }}", CHARACTERS),
    "a format": ("{{ '%999999999d' % 1 }}", CHARACTERS),
    "a format of many digits": ("{{ '%99999999999d' % 1 }}", DIGITS),
    "a format whose width is a value": ("{{ '%*d' % (999999999, 1) }}", CHARACTERS),
    "the filter format": ("{{ '%.999999999f'|format(1.5) }}", CHARACTERS),
    "str.format": ("{{ '{:>999999999}'.format(1) }}", CHARACTERS),
    "str.format whose width is a value": ("{{ '{:{w}}'.format(1, w=999999999) }}", CHARACTERS),
    "str.format in other digits": ("{{ '{:>٩٩٩٩٩٩٩٩٩}'.format(1) }}", CHARACTERS),
    "format_map": ("{{ '{x:999999999}'.format_map({'x': 1}) }}", CHARACTERS),
    "format of all that a list holds": (LAUGHS + "{{ '{!r}'.format(ns.l) }}", STEPS),
    "indented JSON": ("{{ [[1], [2]]|tojson(indent=1000000000) }}", CHARACTERS),
    "JSON with long separators": ("{{ range(9999)|list|tojson(separators=('x' * 99999, ':')) }}", CHARACTERS),
    "batch": ("{{ [1]|batch(1000000000, 0)|list }}", CHARACTERS),
    "slice": ("{{ [1]|slice(1000000000)|list }}", CHARACTERS),
    "a range": ("{{ range(10 ** 30) }}", "too large|too big"),
    "a power": ("{{ 10 ** 100000000 }}", BITS),
    "a power of powers": (DOUBLING + "{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}", BITS),
    "round": ("{{ 1.5|round(1000000000, 'ceil') }}", DIGITS),
    "int": ("{{ ('7' * 1000000)|int(0, 3) }}", DIGITS),
    "strftime_now": ("{{ strftime_now('%Y' * 9999) }}", "formats a date"),
    "doubling +": (DOUBLING + "{% set ns.s = ns.s + ns.s %}{% endfor %}", CHARACTERS),
    "doubling ~": (DOUBLING + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}", CHARACTERS),
    "doubling %": (DOUBLING + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}", CHARACTERS),
    "doubling format": (DOUBLING + "{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}", CHARACTERS),
    "doubling join": (DOUBLING + "{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}", CHARACTERS),
    "doubling str.join": (DOUBLING + "{% set ns.s = ''.join([ns.s, ns.s]) %}{% endfor %}", CHARACTERS),
    "doubling by a loop's iterator": (
        DOUBLING + "{% for a in [ns.s] * 9 %}{% set ns.s = loop|join %}{% endfor %}{% endfor %}",
        CHARACTERS,
    ),
    "doubling replace": (DOUBLING + "{% set ns.s = ns.s|replace('a', 'aa') %}{% endfor %}", CHARACTERS),
    "doubling str.replace": (DOUBLING + "{% set ns.s = ns.s.replace('', ns.s) %}{% endfor %}", CHARACTERS),
    "doubling lists": (DOUBLING + "{% set ns.l = ns.l + ns.l %}{% endfor %}", CHARACTERS),
    "doubling blocks": (
        DOUBLING + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
        CHARACTERS,
    ),
    "doubling macros": (
        "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLING + "{% set ns.s = m(ns.s) %}{% endfor %}",
        CHARACTERS,
    ),
    "entities": (DOUBLING + "{% set ns.s = ('\"' ~ ns.s)|forceescape ~ ns.s %}{% endfor %}", USED_UP),
    "autoescape": ("{% autoescape true %}{% set s = '\"' * 900000 %}{{ s ~ s }}{% endautoescape %}", CHARACTERS),
    "Markup": ("{{ (('a'|safe) + '\"' * 900000)|length }}", CHARACTERS),
    "a list printed": (LAUGHS + "{{ ns.l }}", STEPS),
    "a list as JSON": (LAUGHS + "{{ ns.l|tojson|length }}", STEPS),
    "a list in a text": (LAUGHS + "{{ (ns.l ~ 'x')|length }}", STEPS),
    "lists compared": (LAUGHS + "{{ ns.l == ns.m }}", STEPS),
    "lists compared twice": (LAUGHS + "{{ ns.l == ns.m == ns.l }}", STEPS),
    "lists compared by a test": (LAUGHS + "{{ ns.l is eq ns.m }}", STEPS),
    "lists sorted": (LAUGHS + "{{ [ns.l, ns.m]|sort|length }}", STEPS),
    "a list looked for": (LAUGHS + "{{ ns.l in [ns.m] }}", STEPS),
    "a list looked for in an iterator": (LAUGHS + "{{ ns.l in [ns.m]|map('default') }}", STEPS),
    "a list looked for in a chain": (LAUGHS + "{{ 1 != ns.l in [ns.m]|map('default') }}", STEPS),
    "a list's index": (LAUGHS + "{{ [ns.l].index(ns.m) }}", STEPS),
    "a list that changed": (LAUGHS + "{% for a in [ns.l, ns.m] %}{{ loop.changed(a) }}{% endfor %}", STEPS),
    "a list in an error": (LAUGHS + "{{ {}[ns.l].x }}", STEPS),
    "a list raised": (LAUGHS + "{{ raise_exception(ns.l) }}", STEPS),
    "a deep list": (DOUBLING.replace("60", "9999") + "{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}", DEEP),
    "a deep key": (DOUBLING.replace("60", "9999") + "{% set ns.l = (ns.l,) %}{% endfor %}{{ {ns.l: 1} }}", DEEP),
    "a deep index": (DOUBLING.replace("60", "9999") + "{% set ns.l = (ns.l,) %}{% endfor %}{{ {}[ns.l] }}", DEEP),
    "a macro for ever": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", RECURSION),
    "two macros each": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        STEPS,
    ),
    "a block for ever": ("{% block a %}{{ self.a() }}{% endblock %}", RECURSION),
    "a loop in itself": (
        "{% for x in [40] recursive %}{% if x %}{{ loop([x - 1, x - 1]) }}{% endif %}{% endfor %}",
        STEPS,
    ),
    "output": ("{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}", OUTPUT),
    "output of a macro": ("{% macro m() %}" + MANY + "x" * 1000 + END + "{% endmacro %}{% set a = m() %}", USED_UP),
    "output that is filtered": ("{% filter length %}" + MANY + "x" * 1000 + END + "{% endfilter %}", USED_UP),
    "words": ("{% set s = 'a ' * 99999 %}" + MANY + "{% set x = s.split() %}" + END, CHARACTERS),
    "arguments": ("{% macro m() %}{{ varargs|length }}{% endmacro %}{{ m(*('\u4e00' * 2000000)) }}", CHARACTERS),
    "named arguments": (
        "{% macro m() %}{{ kwargs|length }}{% endmacro %}{% set ns = namespace(d={}) %}"
        "{% for i in range(999) %}{% set ns.d = dict(ns.d, **{'k' ~ i: i}) %}{% endfor %}"
        + MANY + "{% set x = m(**ns.d) %}" + END,
        USED_UP,
    ),
    "a search from the right": ("{% set s = 'a' * 1000000 %}{{ s.rfind('b' + s[:500000]) }}", STEPS),
    "searches": ("{% set s = 'a' * 999999 %}" + MANY + "{% set x = 'b' in s %}" + END, STEPS),
    "searches in a constant": (MANY + "{% set x = 'b' in '" + "a" * 90000 + "' %}" + END, STEPS),
    "searches in a list": ("{% set s = range(9999)|list %}" + MANY + "{% set x = 0.5 in s %}" + END, STEPS),
    "searches in a range": (MANY + "{% set x = 0.5 in range(99999) %}" + END, STEPS),
    "strip": ("{% set s = 'a' * 999999 %}{{ s.strip(('\u4e00' * 99999) + 'a') }}", STEPS),
    "striptags": ("{{ ('<!---->' * 99999)|striptags }}", STEPS),
    "wordwrap": ("{{ ('a' * 999999)|wordwrap(1) }}", STEPS),
    "sort": (MANY + "{% set x = range(99999)|sort %}" + END, STEPS),
    "a text sorted": ("{{ ('a' * 1000000)|sort|length }}", STEPS),
    "sum": ("{{ range(9999)|batch(1)|sum(start=[])|length }}", STEPS),
    "a filter of the meter's": (MANY + "{{ [-1]|map('count steps')|list }}" + END, "No filter named"),
    "a long template": ("{{ a }}" * 20000, LONG),
    "many parts": ("{{a}}" * 7000, PARTS),
    "parentheses": ("{{ " + "(" * 40000 + "1" + ")" * 40000 + " }}", RECURSION),
    "a long sum": ("{{ " + "1+" * 9000 + "1 }}", RECURSION),
    "conditions": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, RECURSION),
    "branches": ("{% if 0 %}" + "{% elif 0 %}" * 4000 + "{% endif %}", PARTS),
    "loops in loops": ("{% for i in [1] %}" * 99 + "{% endfor %}" * 99, "too many"),
    "a long number": ("{{ 0x" + "f" * 90000 + " }}", "limit|bits"),
}  # fmt: skip
KEPT = {
    "lists": "{% set ns.l = [ns.l, range(999)|list] %}",
    "mappings": "{% set ns.l = {'a': ns.l} %}",
    "namespaces": "{% set ns.l = namespace(a=ns.l) %}",
    "loops": "{% set ns.l = [loop, ns.l] %}",
    "methods": "{% set ns.l = [''.upper, ns.l] %}",
    "macros": "{% set p = ns.l %}{% macro m() %}{{ p }}{% endmacro %}{% set ns.l = m %}",
    "wide texts": "{% set ns.s = ns.s + '\U0001f600' %}{% set ns.l = [ns.l, ns.s] %}",
    "characters": "{% set ns.l = [ns.l, ('\u4e00' * 999)|list] %}",
}
ESCAPES = {
    "an attribute": ("{{ ''.__class__.__mro__ }}", SECURITY),
    "an entry": ("{{ ''['__class__'].x }}", SECURITY),
    "a format": ("{{ '{0.__class__.__init__.x}'.format(messages) }}", SECURITY),
    "a format taken by a filter": ("{{ (['{0.__class__.x}']|map(attribute='format')|list)[0](1) }}", SECURITY),
    "map": ("{{ ['']|map(attribute='__class__.x')|list }}", SECURITY),
    "groupby": ("{{ ['']|groupby('__class__.x')|list }}", SECURITY),
    "a function": ("{{ raise_exception.__globals__.x }}", SECURITY),
    "a class": ("{{ cycler.__init__.__globals__.x }}", SECURITY),
    "a macro": ("{% macro m() %}{% endmacro %}{{ m._func.x }}", SECURITY),
    "self": ("{{ self._TemplateReference__context.x }}", SECURITY),
    "a method without a cost": ("{{ (1).to_bytes(10000000000, 'big') }}", SECURITY),
    "a method of a class": ("{{ dict.fromkeys(range(100000)) }}", SECURITY),
    "bytes": ("{{ 'x'.encode() }}", SECURITY),
    "change": ("{{ messages.append(1) }}", SECURITY),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
}

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def check_refused(template: str, limit: str) -> None:
    """Fail unless a template is refused in one line that names a limit."""
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": template})
    with pytest.raises(DymoeError, match=rf"^the chat template failed: [^\n]*({limit})[^\n]*--prompt$"):
        tokenizer.chat(HELLO)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_ends_within_its_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "STEPS", 60_000)
    check_refused(*HOSTILE[name])


@pytest.mark.parametrize("name", KEPT)
def test_what_a_template_keeps_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% set ns = namespace(l=[], s='') %}" + MANY + KEPT[name] + END
    monkeypatch.setattr(meter, "CHARACTERS", 100_000)
    monkeypatch.setattr(meter, "STEPS", 100_000)
    check_refused(template, USED_UP)  # now it is compiled
    tracemalloc.start()
    try:
        check_refused(template, USED_UP)
        assert tracemalloc.get_traced_memory()[1] < 2 * 4 * 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_reaches_nothing_of_the_process(name: str) -> None:
    check_refused(*ESCAPES[name])


def test_the_limit_of_steps_is_reached_soon() -> None:
    check_refused(f"{MANY}{END}", "takes more than 1,[0-9]{3},[0-9]{3} steps")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_file_of_the_template_is_named(tmp_path: Path, file: str) -> None:
    template = f"{MANY}{END}"
    save(tmp_path, tokenizer_config={**CONFIG, "chat_template": template})
    if file == "chat_template.jinja":
        (tmp_path / file).write_text(template)
    with pytest.raises(DymoeError, match=f"^{tmp_path / file}: the chat template failed: it {STEPS}"):
        Tokenizer.load(tmp_path).chat(HELLO)


@pytest.mark.parametrize("variables", [{"tools": ["ab" * 500] * 300}, {"note": "ab" * 500_000}])
def test_limits_grow_with_what_a_template_is_given(variables: dict[str, Any]) -> None:
    # Each message looks at all before it, and the tools are added one by one to a text.
    template = (
        "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% for n in messages[:loop.index] %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}{{ ns.n }}{{ note | length }}"
        "{% for tool in tools or [] %}{% set ns.s = ns.s + tool | tojson %}{% endfor %}{{ ns.s | length }}"
    )
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": template})
    tools = "300600" if "tools" in variables else "0"
    assert tokenizer.chat(HELLO * 300, **variables) == f"45150{len(variables.get('note', ''))}{tools}"


def test_messages_nested_too_deeply_are_refused() -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": "{{ messages }}"})
    message: dict[str, Any] = {"role": "user"}
    message["content"] = [message]
    with pytest.raises(DymoeError, match=DEEP):
        tokenizer.chat([message])


@pytest.mark.parametrize("template", [*(entry[0] for entry in HOSTILE.values()), "{{ " + "(" * 9999])
def test_variables_of_any_template_are_found_or_none(template: str) -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": template})
    assert tokenizer.template_variables <= {"a", "s"}
