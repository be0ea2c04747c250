"""Tokens that other files than tokenizer.json add: what transformers makes of them, or a refusal that names them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from text_kit import CONFIG, byte_level_backend, fallback_backend, metaspace_backend, save

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.added_tokens import whole_tokenizer
from dymoe_runtime.text.detokenizer import StreamDecoder
from dymoe_runtime.text.tokenizer import Tokenizer

FIRST = 423  # the next id of `byte_level_backend`
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
Files = dict[str, Any]


def token(content: str, *flags: str) -> dict[str, Any]:
    """An entry as tokenizers are saved with."""
    return {"content": content, **{flag: flag in flags for flag in FLAGS}}


def by_id(*tokens: dict[str, Any], **config: Any) -> Files:
    """The files of a model whose tokenizer_config.json adds tokens after those of tokenizer.json."""
    entries = {str(FIRST + i): entry for i, entry in enumerate(tokens)}
    return {"tokenizer_config": {**CONFIG, "added_tokens_decoder": entries, **config}}


def with_config(**config: Any) -> Files:
    return {"tokenizer_config": {**CONFIG, **config}}


CASES: dict[str, Files] = {
    **{
        "+".join(flags) or "plain": by_id(token("<|x|>", *flags), token("word", *flags), token("Éx", *flags))
        for size in range(3)
        for flags in itertools.combinations(FLAGS, size)
    },
    "in the vocabulary": {"tokenizer_config": {**CONFIG, "added_tokens_decoder": {"82": token("o"), "69": token("b")}}},
    "other flags": {
        "tokenizer_config": {
            **CONFIG,
            "added_tokens_decoder": {"420": token("<think>", "special", "lstrip"), "421": token("two words", "rstrip")},
        }
    },
    "eos that is not special": by_id(token("<|x|>"), eos_token="<|x|>"),
    "eos of tokenizer.json that is not special": with_config(eos_token="<think>"),
    "the same, with others by id": by_id(token("<|x|>"), eos_token="<think>"),
    "with a type": by_id({**token("<|x|>", "special"), "__type": "AddedToken"}),
    "without flags": by_id({"content": "<|x|>"}),
    "none by id": {**by_id(), "added_tokens": {"<|x|>": FIRST}, "special_tokens_map": {"pad_token": "<|y|>"}},
    "by text": {"added_tokens": {"<|x|>": FIRST + 1, "word": FIRST}},
    "by text, one of tokenizer.json": {"added_tokens": {"<think>": 420, "<|x|>": FIRST}},
    "by text, and special": {
        **with_config(additional_special_tokens=["<|x|>"], pad_token="word"),
        "added_tokens": {"<|x|>": FIRST, "word": FIRST + 1, "<|y|>": FIRST + 2},
    },
    "by text, and special by the map": {
        "added_tokens": {"<|x|>": FIRST, "word": FIRST + 1},
        "special_tokens_map": {"additional_special_tokens": ["<|x|>"], "pad_token": "word"},
    },
    "the map's own": {
        "special_tokens_map": {
            "bos_token": {**token("<think>", "lstrip"), "normalized": True},
            "pad_token": token("<|x|>", "lstrip"),
            "eos_token": "<|im_end|>",
        }
    },
    "the map beside a configuration": {
        **with_config(eos_token=None, bos_token="<|im_start|>"),
        "special_tokens_map": {"eos_token": "</s>", "bos_token": "<s>"},
    },
    "a map that says less": {"special_tokens_map": {"eos_token": None}},
    "further ones": with_config(additional_special_tokens=["<|x|>", "<think>", "word"]),
    "further ones by the newer key": with_config(extra_special_tokens=["<|x|>"], additional_special_tokens=["word"]),
    "further ones of the map": {"special_tokens_map": {"additional_special_tokens": ["<|x|>", "word"]}},
    "further ones of both": {
        **with_config(additional_special_tokens=["<|x|>"]),
        "special_tokens_map": {"additional_special_tokens": ["word"], "extra_special_tokens": ["<|y|>"]},
    },
    "further ones with flags": with_config(
        additional_special_tokens=[{**token("<|x|>", "lstrip", "special"), "__type": "AddedToken"}]
    ),
    "names of their own": with_config(image_token="<|x|>", extra_special_tokens={"audio_token": "word"}),
    "padding outside the vocabulary": with_config(pad_token="<|x|>", unk_token="<|y|>"),
    "special tokens are text": with_config(split_special_tokens=True),
    "empty": with_config(bos_token="", eos_token="", pad_token="", additional_special_tokens=[""]),
    "empty with flags": with_config(bos_token={**token("", "special"), "__type": "AddedToken"}),
    "empty by id": by_id(token("")),
    "empty in the map": {"special_tokens_map": {"bos_token": "", "eos_token": token("")}},
    "spaces to clean": with_config(clean_up_tokenization_spaces=True),
    "asked to add": with_config(add_bos_token=True, add_eos_token=True),
}
PIECES = [
    "<|x|>",
    "<|y|>",
    "word",
    "words",
    "É",
    "é",
    "E\u0301",
    "<think>",
    "two words",
    "<s>",
    "</s>",
    " ",
    "  ",
    "\n",
]
PIECES += ["a", "b", "o", ",", " .", "the", "你", "<|im_end|>", "<|", "|>"]


def texts(seed: str) -> list[str]:
    """Random texts in which the tokens touch each other, spaces and words."""
    generator = random.Random(seed)
    return ["".join(generator.choices(PIECES, k=generator.randint(1, 8))) for _ in range(60)]


def reference(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))


def assert_like(ours: Tokenizer, theirs: Any, name: str) -> None:
    """Both give the same ids and texts; a stream gives the text of the whole."""
    assert theirs.special_tokens_map == ours.special_tokens
    for text in texts(name):
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
        stream = StreamDecoder(ours)
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)


@pytest.mark.parametrize("name", CASES)
def test_added_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    save(tmp_path, **CASES[name])
    ours = Tokenizer.load(tmp_path)
    assert_like(ours, reference(tmp_path), name)


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_needs_no_other_file_for_them(name: str, tmp_path: Path) -> None:
    """Its tokenizer.json has all, and the other files that it has add nothing once more."""
    ours = Tokenizer.load(save(tmp_path, **CASES[name]))
    data = whole_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "added_tokens.json").unlink(missing_ok=True)
    bundled = Tokenizer.load(tmp_path)
    alone = tokenizers.Tokenizer.from_str(data.decode())
    alone.encode_special_tokens = CASES[name].get("tokenizer_config", {}).get("split_special_tokens", False)
    assert (bundled.special_ids, bundled.eos_ids, bundled.bos_id) == (ours.special_ids, ours.eos_ids, ours.bos_id)
    assert whole_tokenizer(tmp_path) == data
    for text in texts(name):
        ids = ours.encode(text)
        assert ids == bundled.encode(text) == alone.encode(text).ids
        assert ours.decode(ids) == bundled.decode(ids) == alone.decode(ids)


@pytest.mark.parametrize("build", [fallback_backend, metaspace_backend])
@pytest.mark.parametrize("flags", [(), ("lstrip",), ("rstrip", "normalized"), ("special",)])
def test_other_kinds_of_tokenizers(build: Callable[[], tokenizers.Tokenizer], flags: Any, tmp_path: Path) -> None:
    size = build().get_vocab_size()
    entries = {str(size): token("<|x|>", *flags), str(size + 1): token("word", *flags)}
    save(tmp_path, build(), tokenizer_config={**CONFIG, "added_tokens_decoder": entries})
    assert_like(Tokenizer.load(tmp_path), reference(tmp_path), str(flags))


def test_a_tokenizer_that_has_all_is_copied_as_it_is(tmp_path: Path) -> None:
    save(tmp_path, **by_id(token("<|x|>", "special")))
    whole = whole_tokenizer(tmp_path)
    text = json.dumps(json.loads(whole), ensure_ascii=True, separators=(",", ":")) + "\n\n"
    (tmp_path / "tokenizer.json").write_text(text)
    assert whole_tokenizer(tmp_path) == text.encode() != whole


REFUSED: list[tuple[Files, str]] = [
    (by_id(token("<think>")), r"tokenizer_config.json: token '<think>' has the id 423, but 420 by tokenizer.json; use"),
    ({"tokenizer_config": {"added_tokens_decoder": {"500": token("<|x|>")}}}, r"'<\|x\|>' has the id 500, but 423 by"),
    (by_id(token("<|x|>"), token("<|x|>")), r"token '<\|x\|>' has the id 424, but 423"),
    ({"tokenizer_config": {"added_tokens_decoder": {"0": token("<|x|>")}}}, r"'<\|x\|>' has the id 0, but 423"),
    ({"added_tokens": {"<|x|>": 420}}, r"added_tokens.json: token '<\|x\|>' has the id 420, but 423 by"),
    ({"added_tokens": {"<|x|>": 900}}, r"added_tokens.json: token '<\|x\|>' has the id 900, but 423 by"),
    ({"added_tokens": {"<|x|>": 423, "<|y|>": 423}}, r"added_tokens.json: tokens '<\|x\|>' and '<\|y\|>' have one id"),
    ({"added_tokens": {"<|x|>": "423"}}, r"added_tokens.json: token '<\|x\|>' has the id '423'; copy it"),
    ({"added_tokens": {"<|x|>": True}}, r"token '<\|x\|>' has the id True; copy it"),
    (with_config(added_tokens_decoder=[]), r"added_tokens_decoder does not map ids to tokens; copy it"),
    (with_config(added_tokens_decoder={"x": token("y")}), r"added_tokens_decoder does not map ids to tokens; copy"),
    (with_config(added_tokens_decoder={"423": 3}), r"added_tokens_decoder: 423 is neither a text nor an object"),
    (by_id({**token("x"), "lstrip": "no"}), r"added_tokens_decoder: 423 is neither a text nor an object"),
    (by_id({"lstrip": True}), r"added_tokens_decoder: 423 is neither a text nor an object"),
    (with_config(additional_special_tokens="<|x|>"), r"extra_special_tokens is neither a list nor an object; copy it"),
    (with_config(additional_special_tokens=[3]), r"extra_special_tokens: an entry is neither a text nor an object"),
    (with_config(extra_special_tokens={"x_token": 3}), r"x_token is neither a text nor an object"),
    ({"special_tokens_map": {"pad_token": []}}, r"special_tokens_map.json: pad_token is neither a text nor an object"),
    (with_config(eos_token=["</s>"]), r"tokenizer_config.json: eos_token is neither a text nor an object"),
    (with_config(eos_token="<gone>"), r"tokenizer.json: no token is the eos_token '<gone>'; copy it"),
    ({"special_tokens_map": {"bos_token": "<gone>"}}, r"tokenizer.json: no token is the bos_token '<gone>'; copy it"),
]


@pytest.mark.parametrize(("files", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_contradictions_are_refused_by_name(files: Files, message: str, tmp_path: Path) -> None:
    save(tmp_path, byte_level_backend(), **files)
    for load in (Tokenizer.load, whole_tokenizer):
        with pytest.raises(DymoeError, match=message):
            load(tmp_path)
