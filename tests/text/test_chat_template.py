"""Chat templates render as in transformers, and what is wrong with them is told."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from text_kit import CONFIG, byte_level_backend, make_tokenizer, save

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.tokenizer import Tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & \"exact\"."},
    {"role": "user", "content": "  你好 👋 "},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {"é": [1, 2.5, None]}}]},
    {"role": "user", "content": "bye"},
]  # fmt: skip
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "specials": "{{ bos_token }}{% for m in messages %}{{ m.role + eos_token }}{% endfor %}{{ pad_token }}",
    "tojson": "{{ messages | tojson }}{{ messages[2] | tojson(indent=2, sort_keys=true) }}",
    "tools": "{% if tools is not none %}{{ tools | tojson }}{% else %}none{% endif %}{{ documents is none }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
    "generation": "{% for m in messages %}\n  {% generation %}\n{{ m.content }}\n  {% endgeneration %}\n{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "filters": "{% for m in messages %}{{ m.content|upper|trim }}{{ m.content|replace('b', '<b>')|title|indent(2) }}"
    "{{ m|items|list }}{{ m|dictsort }}{{ m.content|e ~ 1 }}{{ m.content|list|unique|sort|join('-')|truncate(9) }}"
    "{{ m.content|center(40)|wordwrap(9)|wordcount }}{{ m.content|urlencode|capitalize }}{% endfor %}"
    "{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', 'eq', 'user')|list|length }}"
    "{{ messages|groupby('role')|length }}{{ [3, 1]|sum }}{{ [3, 1]|max }}{{ 2.5|round|int }}{{ '7'|int + 1 }}"
    "{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}{{ '%s-%03d'|format('x', 7) }}{{ 'a'|striptags }}"
    "{{ messages|reject('mapping')|first|default('none', true) }}{{ 'abc'|reverse }}{{ [1, 2]|reverse|list|last }}",
    "a filter that finds nothing is true": "{% if messages|selectattr('role', 'eq', 'x') %}true{% endif %}",
    "methods": "{% for m in messages %}{% set c = m['content'] %}{{ c.strip().split(' ', 1)[0].upper() }}"
    "{{ c.rsplit('e') }}"
    "{{ c.startswith(('B', ' ')) }}{{ c.find('e') }}{{ c.replace('B', 'b', 1).title() }}{{ m.get('x', 'y') }}"
    "{% for k, v in m.items() %}{{ k }}{% endfor %}{{ ', '.join(m.keys()) }}{{ c.splitlines() }}{{ c.partition('e') }}"
    "{{ '{0!r:>9}|{x[role]}'.format(c, x=m) }}{{ '%-5s|%r' % (m.role, c) }}{{ c.zfill(30).lstrip('0') }}{% endfor %}",
    "operators": "{% for m in messages %}{{ m.role == 'user' and 'e' in m.content }}{{ m.role in ['user', 'tool'] }}"
    "{{ m != messages[0] }}{{ 1 < loop.index <= 3 }}{{ m.content[1:-1:2] ~ (loop.index * 2 - 7 // 2 ** 2 % 3 / 4) }}"
    "{{ (m.content * 2)[:5] }}{{ [m.role] + [1] * 2 }}{{ -loop.index }}{{ 'tool_calls' in m }}{{ m.content < 'C' }}"
    "{{ loop.changed(m.role) }}{{ loop.cycle(1, 2) }}{{ loop.last }}{{ loop.nextitem is defined }}{% endfor %}"
    "{{ messages[1:]|length }}{{ messages[::-1][0].role }}{{ (messages, {'a': messages[0].role}) }}{{ {1: 2}[1] }}",
    "blocks": "{% macro m(x, y=2) %}{{ x }}{{ y }}{{ caller() if caller else varargs }}{% endmacro %}{{ m(1) }}"
    "{{ m(1, 2, 3) }}{% call m('a') %}<b>{% endcall %}{% set s %}{{ m(3) }}!{% endset %}{{ s|length }}"
    "{% filter upper %}x{{ s }}{% endfilter %}"
    "{% block b %}{{ messages|length }}{% endblock %}{{ self.b() }}{% with z = 3 %}{{ z }}{% endwith %}"
    "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% else %}{{ messages }}{% endfor %}"
    "{% for m in messages if m.role != 'user' %}{{ loop.length }}{% endfor %}{{ 'a' if false }}",
    "markup": "{% for m in messages %}{{ m.content|safe + '<' + m.content }}{% endfor %}"
    "{% autoescape true %}{{ messages[0].content ~ '<' }}&lt;{% endautoescape %}{{ ('<%s>'|safe) % '&' }}",
    "kwargs": "{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}.{{ absent }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("extra", [{}, {"enable_thinking": False, "tools": [{"name": "é", "type": "function"}]}])
def test_chat_equals_transformers(name: str, prompt: bool, extra: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(byte_level_backend(), CONFIG, {"default": TEMPLATES[name]})
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), chat_template=TEMPLATES[name], **CONFIG
    )
    rendered = ours.chat(MESSAGES, add_generation_prompt=prompt, **extra)
    assert rendered
    assert rendered == theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False, **extra)
    assert ours.encode(rendered, add_special_tokens=False) == theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=prompt, return_dict=False, **extra
    )


def test_the_date_is_today() -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": TEMPLATES["date"]})
    assert tokenizer.chat([]) == str(datetime.now().year)


@pytest.mark.parametrize(("entry", "tools", "expected"), [
    ("one", [], "one"),
    ([{"name": "rag", "template": "rag"}, {"name": "default", "template": "two"}], [], "two"),
    ([{"name": "default", "template": "two"}, {"name": "tool_use", "template": "use"}], ["f"], "use"),
    ([{"name": "default", "template": "two"}, {"name": "tool_use", "template": "use"}], None, "two"),
    ({"default": "two", "tool_use": "use"}, ["f"], "use"),
    ([{"name": "default", "template": "one"}, {"name": "default", "template": "two"}], None, "two"),
    ("", None, ""),
])  # fmt: skip
def test_templates_come_from_the_config(tmp_path: Path, entry: Any, tools: list[Any] | None, expected: str) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config={**CONFIG, "chat_template": entry}))
    assert tokenizer.has_chat_template
    assert tokenizer.chat(MESSAGES, tools=tools) == expected


def test_a_template_file_comes_first(tmp_path: Path) -> None:
    save(tmp_path, tokenizer_config={**CONFIG, "chat_template": "config"})
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }} é", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat(MESSAGES) == "file <s> é"


def test_no_template_is_an_error_with_the_remedy() -> None:
    tokenizer = make_tokenizer()
    assert not tokenizer.has_chat_template
    with pytest.raises(DymoeError, match=r"no chat template; .* --prompt"):
        tokenizer.chat(MESSAGES)
    with pytest.raises(DymoeError, match=r"named 'default' .found: rag.; use --prompt"):
        Tokenizer(byte_level_backend(), CONFIG, {"rag": "x"}).chat(MESSAGES)


@pytest.mark.parametrize(("template", "message"), [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for m in messages %}", "Unexpected end of template"),
    ("{{ messages[0].content + 1 }}", "str"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{% set ns = namespace(_x=1) %}", "a namespace may not hold '_x'"),
    ("{% set ns = namespace([['_x', 1]] | map('list')) %}", "a namespace may not hold '_x'"),
    ("{% set ns = namespace() %}{% set ns._x = 1 %}", "a namespace may not hold '_x'"),
    (None, "template"),
])  # fmt: skip
def test_a_failing_template_is_an_error(template: Any, message: str) -> None:
    tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": template})
    with pytest.raises(DymoeError, match=f"^the chat template failed: .*({message}).*--prompt$"):
        tokenizer.chat([dict(m) for m in MESSAGES])
