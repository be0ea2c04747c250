"""A tokenizer.json from anywhere: refused in one sentence where the library that reads it would crash or never end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzz.hostile import ODD, TOKENIZERS, charsmap
from helpers import MODEL, save_byte_tokenizer

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text import tokenizer_check
from dymoe_runtime.text.tokenizer import Tokenizer

PROMPTS = ("The river", "a" * 200, "e\u00e9\U0001f600\0 ", "")


def changed(directory: Path, part: dict[str, Any]) -> Path:
    save_byte_tokenizer(directory)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | part))
    (directory / "tokenizer_config.json").unlink()
    return directory


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_part_is_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match=r"tokenizer.json: not a valid tokenizer \(.*\); copy it"):
        Tokenizer.load(changed(tmp_path, TOKENIZERS[case]))


@pytest.mark.parametrize("case", ODD)
def test_an_odd_part_is_refused_or_works(case: str, tmp_path: Path) -> None:
    try:
        tokenizer = Tokenizer.load(changed(tmp_path, ODD[case]))
        for prompt in PROMPTS:
            tokenizer.decode(tokenizer.encode(prompt))
    except DymoeError as error:
        assert "tokenizer.json: " in str(error)


def test_a_panic_of_the_library_is_a_sentence(tmp_path: Path) -> None:
    """This expression takes more steps than the library allows, and only for some texts."""
    split = {"type": "Split", "pattern": {"Regex": r"(.*)*\d"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer.load(changed(tmp_path, {"pre_tokenizer": split}))
    tokenizer.encode("short")
    with pytest.raises(DymoeError, match=r"tokenizer.json: cannot encode the text \(.*retry"):
        tokenizer.encode("a" * 40)


def test_a_key_that_is_there_twice_cannot_hide_a_part(tmp_path: Path) -> None:
    path = changed(tmp_path, {}) / "tokenizer.json"
    hidden = json.dumps(TOKENIZERS["a map of 8 GB"])[1:-1]
    path.write_text("{" + hidden + "," + path.read_text().lstrip()[1:])
    assert Tokenizer.load(tmp_path).encode("ab") == Tokenizer.load(changed(tmp_path, {})).encode("ab")
    path.write_text(path.read_text().replace('"type": "BPE"', '"type": "BPE", "vocab": {"a": 1}'))
    assert Tokenizer.load(tmp_path).vocab_size == 256
    path.write_text(path.read_text().replace('"type": "ByteLevel"', '"type": "ByteLevel", "type": "Sequence"'))
    with pytest.raises(DymoeError, match="twice"):
        Tokenizer.load(tmp_path)


def test_a_sound_map_of_sentencepiece_works(tmp_path: Path) -> None:
    """The unit 0 leads to 1 ^ "a"; that is a leaf, and leads to its value, the text at 0."""
    label = ord("a")
    at = 1 ^ label
    units = [0] * 256
    units[0] = 1 << 10
    units[at] = label | 1 << 8 | 2 << 10
    units[at ^ 2] = 1 << 31
    tokenizer = Tokenizer.load(changed(tmp_path, {"normalizer": charsmap(tuple(units), b"bc\0")}))
    assert tokenizer.encode("ab") == tokenizer.encode("bcb")


def test_what_is_checked_is_what_the_file_says() -> None:
    text = (MODEL / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(tokenizer_check.checked(text)) == json.loads(text)


@pytest.mark.parametrize("entry", ["many", "long"])
def test_added_tokens_of_other_files_have_the_same_limit(entry: str, tmp_path: Path) -> None:
    contents = [f"{i:0100d}" for i in range(45_000)] if entry == "many" else ["z" * 8_000_000]
    tokens = {text: 256 + i for i, text in enumerate(contents)}
    directory = changed(tmp_path, {})
    (directory / "added_tokens.json").write_text(json.dumps(tokens))
    with pytest.raises(DymoeError, match="added tokens: they are too long"):
        Tokenizer.load(directory)


def test_an_id_of_thousands_of_digits_is_no_id(tmp_path: Path) -> None:
    directory = changed(tmp_path, {})
    decoder = {"9" * 5000: {"content": "z"}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(DymoeError, match="added_tokens_decoder does not map ids"):
        Tokenizer.load(directory)
