"""Tokenizer files: special tokens, and the ids and texts that transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text_kit import (
    CONFIG,
    LINES,
    SPECIAL,
    assert_stream_joins,
    byte_level_backend,
    fallback_backend,
    make_tokenizer,
    metaspace_backend,
    save,
)
from tokenizers import models, pre_tokenizers, processors

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.tokenizer import Tokenizer


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
    assert (Tokenizer.load(tmp_path).bos_id, Tokenizer.load(tmp_path).eos_ids) == (0, {1})


@pytest.mark.parametrize("entry", ["", {"content": "", "special": True, "__type": "AddedToken"}, None])
@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_an_empty_special_token_is_none(tmp_path: Path, name: str, entry: Any) -> None:
    """Unlike one that is null, it is a text to chat templates."""
    template = "{{ " + name + " is defined }}{{ " + name + " }}"
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config={**CONFIG, name: entry, "chat_template": template}))
    none = Tokenizer.load(save(tmp_path, tokenizer_config={**CONFIG, name: None}))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size) == (
        (none.bos_id, none.eos_ids, none.special_ids, none.vocab_size)
    )  # fmt: skip
    assert tokenizer.encode("<s>a</s>") == none.encode("<s>a</s>")
    assert tokenizer.chat([]) == ("False" if entry is None else "True")


@pytest.mark.parametrize(("build", "config", "refused"), [
    (byte_level_backend, {"clean_up_tokenization_spaces": True}, False),
    (metaspace_backend, {"clean_up_tokenization_spaces": False}, False),
    (metaspace_backend, {"clean_up_tokenization_spaces": True}, True),
    (byte_level_backend, {"clean_up_tokenization_spaces": True,
                          "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}, True),
])  # fmt: skip
def test_spaces_are_never_cleaned_up(build: Any, config: dict[str, bool], refused: bool, tmp_path: Path) -> None:
    save(tmp_path, build(), tokenizer_config={**CONFIG, **config})
    if refused:
        with pytest.raises(DymoeError, match=r"clean_up_tokenization_spaces is not supported .*; set it to false"):
            Tokenizer.load(tmp_path)
    else:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
        ids = theirs.encode("the fox , the fox .")
        assert Tokenizer.load(tmp_path).decode(ids) == theirs.decode(ids, skip_special_tokens=True)


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
def test_bos_is_added_where_the_post_processor_does(tmp_path: Path, post_processor: bool, add_bos: bool | None) -> None:
    """As in transformers, whose tokenizers with a tokenizer.json do not read `add_bos_token`."""
    backend = with_bos(byte_level_backend()) if post_processor else byte_level_backend()
    tokenizer = Tokenizer.load(save(tmp_path, backend, tokenizer_config={**CONFIG, "add_bos_token": add_bos}))
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert 0 not in bare
    assert tokenizer.encode("hello") == ([0, *bare] if post_processor else bare)
    assert tokenizer.encode("") == ([0] if post_processor else [])


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
    ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token is neither a text nor an object .*; copy it"),
    ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is not a text or a list"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "chat_template is not a text or a list"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "x", "template": 1}]}', "chat_template is not a text or"),
    ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "a text has half of a surrogate pair; copy it"),
    ("special_tokens_map.json", b'{"pad_token": {"content": "\\uD800"}}', "a text has half of a surrogate pair"),
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
