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
