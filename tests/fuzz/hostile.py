"""Parts of tokenizers and chat templates that somebody made to end, fill or hold up the process that reads them."""

from __future__ import annotations

import base64
import struct
from typing import Any

Part = dict[str, Any]


def replaced(pattern: Part, content: str) -> Part:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(regex: str) -> Part:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def added(content: str, token: int, **options: bool) -> Part:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token, "content": content, **dict.fromkeys(names, False), **options}


def template(*pieces: Part, ids: tuple[int, ...] = (1,)) -> Part:
    special = {"a": {"id": "a", "ids": list(ids), "tokens": ["a"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": special}


def bpe(**changes: Any) -> Part:
    return {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **changes}


def unigram(*pieces: str) -> Part:
    vocab = [[piece, -1.0] for piece in (*pieces, *map(chr, range(32, 127)))]
    return {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}


def charsmap(units: tuple[int, ...], texts: bytes, size: int | None = None) -> Part:
    """A map of SentencePiece: a tree of at least 256 units, all of whose bytes from 1 on lead nowhere, and texts."""
    padded = struct.pack("<256I", *units, *[0] * (256 - len(units)))
    data = struct.pack("<I", len(padded) if size is None else size) + padded + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


BYTES: Part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TEXT: Part = {"Sequence": {"id": "A", "type_id": 0}}
SPECIAL: Part = {"SpecialToken": {"id": "a", "type_id": 0}}
DEEP: Part = {"type": "NFC"}
for _ in range(200):
    DEEP = {"type": "Sequence", "normalizers": [DEEP]}


def normalizers(*parts: Part) -> Part:
    return {"normalizer": {"type": "Sequence", "normalizers": list(parts)}}


def pre_tokenizers(*parts: Part) -> Part:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}}


# Changes of tokenizer.json that nothing may accept.
TOKENIZERS: dict[str, Part] = {
    "texts that grow a thousand times, ten times": normalizers(*[replaced({"String": "e"}, "ee" * 1000)] * 10),
    "texts that double": normalizers(*[replaced({"String": "e"}, "ee")] * 22),
    "characters that double": normalizers(*[replaced({"Regex": "."}, "xx")] * 26),
    "bytes of bytes": normalizers(*[{"type": "ByteLevel"}] * 22),
    "bytes of bytes of words": pre_tokenizers(*[BYTES] * 22),
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "x" * 1_000_000}},
    "an empty pattern": {"normalizer": replaced({"String": ""}, "x")},
    "an empty expression": {"normalizer": replaced({"Regex": ""}, "x")},
    "an expression that matches nothing": {"normalizer": replaced({"Regex": "x*"}, "y")},
    "a long expression": pre_tokenizers(split("a|" * 200_000 + "b"), BYTES),
    "an expression in itself": pre_tokenizers(split(r"(?<n>(?:\g<n>|a)*)x"), BYTES),
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a deep sequence": {"normalizer": DEEP},
    "many parts": normalizers(*[{"type": "NFC"}] * 10_000),
    "an unknown part": {"normalizer": {"type": "Unknown"}},
    "a part that is none": {"decoder": {"type": []}},
    "a sequence that is none": {"decoder": {"type": "Sequence", "decoders": 1}},
    "a map without a tree": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a map of 8 GB": {"normalizer": charsmap((), b"x\0", 0xFFFFFFFC)},
    "a map that leads out of itself": {"normalizer": charsmap((1 << 30,), b"x\0")},
    "a map of texts that are not there": {"normalizer": charsmap((1 << 8 | 1 << 10, 1 << 31 | 99), b"x\0")},
    "a prompt without its text": {"post_processor": template(SPECIAL)},
    "a prompt with its text twice": {"post_processor": template(TEXT, TEXT)},
    "a prompt with another text": {"post_processor": template({"Sequence": {"id": "B", "type_id": 0}})},
    "many tokens before a prompt": {"post_processor": template(*[SPECIAL] * 100_000, TEXT)},
    "a token of many": {"post_processor": template(SPECIAL, TEXT, ids=(1,) * 100_000)},
    "the end stripped": {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 5}},
    "answers that grow": {"decoder": {"type": "Sequence", "decoders": [replaced({"String": "a"}, "a" * 1000)] * 6}},
    "a long piece": {"model": unigram("a" * 200_000), "pre_tokenizer": None, "decoder": None},
    "a prefix of pieces": {"model": bpe(continuing_subword_prefix="x" * 10)},
    "a suffix of words": {"model": bpe(end_of_word_suffix="x" * 100_000)},
    "a merge of no token": {"model": bpe(merges=[["a", "c"]])},
    "a model that is none": {"model": {"type": "Markov", "vocab": {}}},
    "no model": {"model": None},
    "a long added token": {"added_tokens": [added("z" * 8_000_000, 256)]},
    "an added token of 33 bits": {"added_tokens": [added("z", 1 << 32)]},
}
# Changes that are odd, and can be accepted or refused.
ODD: dict[str, Part] = {
    "an expression that tries all ways": pre_tokenizers(split("(?:a+)+$"), BYTES),
    "an expression of many": pre_tokenizers(split("(?:(?:a{1000}){1000}){1000}"), BYTES),
    "an expression that looks back": pre_tokenizers(split(r"(a*)*\1\1\1\1\1\1b"), BYTES),
    "an added token without text": {"added_tokens": [added("", 256)]},
    "an added token of 32 bits": {"added_tokens": [added("e", (1 << 32) - 1)]},
    "an added token twice": {"added_tokens": [added("e", 3), added("e", 4), added("r", 3)]},
    "an added token of a word": {"added_tokens": [added("e", 256, single_word=True, lstrip=True, normalized=True)]},
    "texts cut": {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}},
    "texts padded": {
        "padding": {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0}
    },
    "answers of classes": {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}},
    "an empty suffix": {"decoder": {"type": "BPEDecoder", "suffix": ""}},
    "an unknown token that is not there": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "z"}},
    "another unknown token": {"model": bpe(unk_token="z", fuse_unk=True)},
    "no unknown token": {"model": {**unigram(), "unk_id": None}, "pre_tokenizer": None},
    "a token of 32 bits": {"model": bpe(vocab={"a": (1 << 32) - 1, "b": 1, "ab": 2})},
    "tokens without text": {"model": bpe(vocab={"": 0, "a": 1}, merges=[["", ""], ["", "a"], ["a", ""]])},
}

# Templates that never end, or that fill the memory.
TEMPLATES = (
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ ('x' * 10**6).center(10**10) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
    "{{ 10**10**9 }}",
    "{{ range(10**9) | list | length }}",
    "{{ messages[0].__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' | indent(10**10) }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
    "{{ '\x1b[31m' }}{{ undefined.thing }}",
)
