"""Tokenizer files, chat templates as in transformers, and streams that join to the decoded whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.stream import REPLACEMENT, StreamDecoder
from dymoe_runtime.text import Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog.  Two  spaces, a tab\tand a newline.\n",
    "Naïve café, e\u0301 (combining), \u0928\u092e\u0938\u094d\u0924\u0947, привет",
    "你好，世界！こんにちは、世界。안녕하세요",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷 😀😀 ok",
    "def f(x):\n    return x + 1\n" * 3,
]  # fmt: skip
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level_backend() -> tokenizers.Tokenizer:
    """As in Qwen and OLMoE: few merges, so that characters straddle tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    backend.add_tokens([AddedToken("<think>"), AddedToken("two words", normalized=False), AddedToken("½Ġ€")])
    return backend


def fallback_backend() -> tokenizers.Tokenizer:
    """As in Mixtral: words with ▁, everything else by bytes."""
    known = [*sorted(set(LINES[0]) - set(" \n\t")), "▁", "你", REPLACEMENT]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    merges = [("▁", "t"), ("h", "e"), ("▁", "▁"), ("q", "u"), ("▁", "a"), ("▁", "你")]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", *SPECIAL])
    return backend


def metaspace_backend() -> tokenizers.Tokenizer:
    """Unigram behind Metaspace, whose decoder drops every leading ▁ of the first token."""
    pieces = ["<unk>", *SPECIAL, "▁", "▁▁", "▁the", "he", "▁fox", "你", "好", *"thequickbrownfox ,.é"]
    backend = tokenizers.Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    return backend


def plain_backend() -> tokenizers.Tokenizer:
    """No decoder: tokens are joined by spaces."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "one", "two", "three", "<unk>"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(SPECIAL)
    return backend


def nested_byte_level_backend() -> tokenizers.Tokenizer:
    backend = byte_level_backend()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return backend


BACKENDS = [
    byte_level_backend, fallback_backend, metaspace_backend, plain_backend, nested_byte_level_backend,
]  # fmt: skip
CONFIG: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}


def save(directory: Path, backend: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    """Writes tokenizer.json and `files`, whose names lack their .json."""
    (backend or byte_level_backend()).save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config": CONFIG, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def make_tokenizer(build: Callable[[], tokenizers.Tokenizer] = byte_level_backend) -> Tokenizer:
    return Tokenizer(build(), CONFIG, {})


# Streaming


def assert_stream_joins(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)
    assert decoder.flush() == ""
    return parts


@pytest.mark.parametrize("build", BACKENDS)
def test_streams_of_random_ids_join_to_the_whole(build: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer, dice = make_tokenizer(build), random.Random(0)
    assert_stream_joins(tokenizer, [])
    for _ in range(1500):
        ids = [dice.randrange(tokenizer.vocab_size + 2) for _ in range(dice.randrange(1, 25))]
        assert_stream_joins(tokenizer, ids)


@pytest.mark.parametrize("build", [byte_level_backend, fallback_backend, nested_byte_level_backend])
def test_streams_of_random_bytes_join_to_the_whole(build: Callable[[], tokenizers.Tokenizer]) -> None:
    """Mostly the bytes around which UTF-8 decoders disagree: overlong, surrogate, too large, cut."""
    tokenizer, dice = make_tokenizer(build), random.Random(1)
    spelling = byte_spelling(tokenizer)
    difficult = [
        0x41,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC2,
        0xE0,
        0xE4,
        0xED,
        0xEF,
        0xF0,
        0xF4,
        0xF5,
    ]
    for _ in range(3000):
        ids = [spelling[dice.choice(difficult)] for _ in range(dice.randrange(1, 12))]
        assert_stream_joins(tokenizer, ids)


def byte_spelling(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte → id of the token that is only that byte."""
    from dymoe_runtime.stream import _BYTE_OF_CHAR

    names = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
    if tokenizer.decoder_types[0] != "ByteLevel":
        names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    return {byte: token_id(tokenizer, name) for byte, name in names.items()}


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer._backend.token_to_id(token)
    assert found is not None
    return found


@pytest.mark.parametrize("build", [byte_level_backend, fallback_backend, nested_byte_level_backend])
def test_streams_of_text_never_show_part_of_a_character(build: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer, dice = make_tokenizer(build), random.Random(2)
    characters = "".join(LINES) + "𝒳🀄ø\u200d\u0301"
    for _ in range(500):
        text = "".join(dice.choices(characters, k=dice.randrange(1, 40)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not any(REPLACEMENT in part for part in assert_stream_joins(tokenizer, ids))


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = make_tokenizer()
    spelling = byte_spelling(tokenizer)
    parts = assert_stream_joins(tokenizer, [spelling[byte] for byte in "a😀é".encode()])
    assert parts == ["a", "", "", "", "😀", "", "é"]


def test_a_run_of_fallback_bytes_appears_when_it_ends() -> None:
    tokenizer = make_tokenizer(fallback_backend)
    spelling = byte_spelling(tokenizer)
    word = token_id(tokenizer, "▁a")
    parts = assert_stream_joins(tokenizer, [word, *(spelling[byte] for byte in "é".encode()), word])
    assert parts == ["a", "", "", "é a"]
    # The fallback decoder takes back é when a byte that is not UTF-8 follows.
    broken = [word, *(spelling[byte] for byte in "é".encode()), spelling[0xFF], word]
    assert assert_stream_joins(tokenizer, broken)[-1] == 3 * REPLACEMENT + " a"


def test_a_cut_character_is_flushed_as_in_decode() -> None:
    tokenizer = make_tokenizer()
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(byte_spelling(tokenizer)[0xF0]) == ""
    assert decoder.flush() == REPLACEMENT


def test_special_tokens_are_skipped_even_inside_a_character() -> None:
    tokenizer = make_tokenizer()
    spelling = byte_spelling(tokenizer)
    first, second = (spelling[byte] for byte in "é".encode())
    assert assert_stream_joins(tokenizer, [0, first, 1, second, 1]) == ["", "", "", "é", ""]


class CountingTokenizer(Tokenizer):
    decoded = 0

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("build", [byte_level_backend, fallback_backend, metaspace_backend])
def test_a_push_decodes_a_bounded_number_of_tokens(build: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = CountingTokenizer(build(), CONFIG, {})
    decoder = StreamDecoder(tokenizer)
    word = tokenizer.encode("the")[-1]
    byte = byte_spelling(tokenizer)[0x80] if build is not metaspace_backend else word
    ids = ([word] * 10 + [byte] * 200) * 10
    for i in ids:
        decoder.push(i)
    decoder.flush()
    assert tokenizer.decoded <= 5 * len(ids)


# Files


def test_load_reads_ids_and_sizes(tmp_path: Path) -> None:
    backend = byte_level_backend()
    tokenizer = Tokenizer.load(save(tmp_path, backend))
    assert tokenizer.bos_id == 0
    assert tokenizer.eos_ids == {1}
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.special_ids == {text: i for i, text in enumerate(SPECIAL)}
    assert tokenizer.decode([0, *tokenizer.encode("hello"), 1]) == "hello"
    assert tokenizer.decode([0, 1], skip_special_tokens=False) == "<s></s>"
    assert tokenizer.token(tokenizer.vocab_size) is None


@pytest.mark.parametrize(("entry", "expected"), [(3, {1, 3}), ([2, 3], {1, 2, 3}), (None, {1})])
def test_eos_ids_are_the_union_of_all_sources(tmp_path: Path, entry: Any, expected: set[int]) -> None:
    save(tmp_path, generation_config={"eos_token_id": entry})
    assert Tokenizer.load(tmp_path).eos_ids == expected
    assert Tokenizer.load(tmp_path, eos_ids=[7]).eos_ids == expected | {7}


def test_special_tokens_may_be_objects_or_come_from_the_map(tmp_path: Path) -> None:
    save(tmp_path, tokenizer_config={"eos_token": {"content": "</s>", "lstrip": False}})
    assert (Tokenizer.load(tmp_path).bos_id, Tokenizer.load(tmp_path).eos_ids) == (None, {1})
    save(tmp_path, tokenizer_config={"eos_token": None}, special_tokens_map=CONFIG)
    assert (Tokenizer.load(tmp_path).bos_id, Tokenizer.load(tmp_path).eos_ids) == (0, frozenset())


def test_a_named_special_token_is_skipped_even_if_listed_as_a_word(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"one": 0, "END": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer.load(save(tmp_path, backend, tokenizer_config={"eos_token": "END"}))
    assert tokenizer.decode([0, 1]) == "one"
    assert_stream_joins(tokenizer, [0, 1, 0])


def with_bos(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@pytest.mark.parametrize("post_processor", [False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_bos_is_added_once_where_asked(tmp_path: Path, post_processor: bool, add_bos: bool | None) -> None:
    backend = with_bos(byte_level_backend()) if post_processor else byte_level_backend()
    tokenizer = Tokenizer.load(save(tmp_path, backend, tokenizer_config={**CONFIG, "add_bos_token": add_bos}))
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert 0 not in bare
    assert tokenizer.encode("hello") == ([0, *bare] if post_processor or add_bos else bare)
    assert tokenizer.encode("") == ([0] if post_processor or add_bos else [])


def test_add_bos_does_not_double_the_one_in_the_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config={**CONFIG, "add_bos_token": True}))
    assert tokenizer.encode("<s>hello") == tokenizer.encode("hello")


def test_truncation_and_padding_of_the_training_are_off(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.load(save(tmp_path, backend))
    text = "The quick brown fox"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_encode_and_decode_equal_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for build in (byte_level_backend, fallback_backend, metaspace_backend):
        backend = with_bos(build())
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        ours = Tokenizer.load(save(tmp_path, backend))
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **CONFIG)
        for line in [*LINES, "", "<|im_start|>user</s>"]:
            for special in (True, False):
                ids = ours.encode(line, add_special_tokens=special)
                assert ids == theirs.encode(line, add_special_tokens=special)
                assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokenizer.json", None, "missing; copy it from the model's repository or recompile"),
    ("tokenizer.json", b"{", "not a valid tokenizer .*; copy it"),
    ("tokenizer.json", b"\xff", "cannot be read .*; copy it"),
    ("tokenizer_config.json", b'{"a": ', "not valid JSON .*line 1.*; copy it"),
    ("tokenizer_config.json", b"[]", "not a JSON object; copy it"),
    ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token is not a text; copy it"),
    ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is not a text or a list"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "chat_template is not a text or a list"),
    ("generation_config.json", b"x", "not valid JSON .*; copy it"),
    ("generation_config.json", b'{"eos_token_id": "2"}', "eos_token_id '2' is neither an id nor a list"),
    ("special_tokens_map.json", b"x", "not valid JSON .*; copy it"),
    ("chat_template.jinja", b"\xff", "cannot be read .*; copy it"),
])  # fmt: skip
def test_bad_files_are_named_with_the_remedy(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = save(tmp_path) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DymoeError, match=f"^{path}: {message}"):
        Tokenizer.load(tmp_path)


def test_an_eos_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, tokenizer_config={"eos_token": "<nowhere>"})
    with pytest.raises(DymoeError, match=r"tokenizer\.json: no token is the eos_token '<nowhere>'; copy it"):
        Tokenizer.load(tmp_path)


def test_text_that_is_not_unicode_is_an_error() -> None:
    with pytest.raises(DymoeError, match="not valid Unicode; save or pass it as UTF-8"):
        make_tokenizer().encode("caf\udce9")


# Chat

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
])  # fmt: skip
def test_templates_come_from_the_config(tmp_path: Path, entry: Any, tools: list[Any], expected: str) -> None:
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
