"""Streams of tokens join to the decoded whole, and never show part of a character."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from text_kit import (
    BACKENDS,
    CONFIG,
    LINES,
    assert_stream_joins,
    byte_level_backend,
    byte_spelling,
    fallback_backend,
    ids_by_token,
    make_tokenizer,
    metaspace_backend,
    nested_byte_level_backend,
)

from dymoe_runtime.text.detokenizer import REPLACEMENT, StreamDecoder
from dymoe_runtime.text.tokenizer import Tokenizer


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
    difficult = bytes.fromhex("41 80 8F 90 9F A0 BF C0 C2 E0 E4 ED EF F0 F4 F5")
    for _ in range(3000):
        ids = [spelling[dice.choice(difficult)] for _ in range(dice.randrange(1, 12))]
        assert_stream_joins(tokenizer, ids)


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
    word = ids_by_token(tokenizer)["▁a"]
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
