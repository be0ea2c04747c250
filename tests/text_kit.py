"""What the tests of texts share: small tokenizers of each kind, and how to check and spell what they stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from dymoe_runtime.text.detokenizer import REPLACEMENT, StreamDecoder
from dymoe_runtime.text.tokenizer import Tokenizer

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
    """Bytes by a decoder that is not only ByteLevel."""
    backend = byte_level_backend()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return backend


BACKENDS = [
    byte_level_backend, fallback_backend, metaspace_backend, plain_backend, nested_byte_level_backend,
]  # fmt: skip
CONFIG: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}


def save(directory: Path, backend: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    """Write tokenizer.json and `files`, whose names lack their .json."""
    (backend or byte_level_backend()).save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config": CONFIG, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def make_tokenizer(build: Callable[[], tokenizers.Tokenizer] = byte_level_backend) -> Tokenizer:
    return Tokenizer(build(), CONFIG, {})


def assert_stream_joins(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return what each push gave out; all of it joins to the decoded whole."""
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)
    assert decoder.flush() == ""
    return parts


def byte_spelling(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte -> id of the token that is only that byte: GPT-2's spelling, or that of byte fallback."""
    if tokenizer.decoder_types[0] == "ByteLevel":
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    else:
        names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    ids = ids_by_token(tokenizer)
    return {byte: ids[name] for byte, name in names.items()}


def ids_by_token(tokenizer: Tokenizer) -> dict[str, int]:
    """The vocabulary."""
    tokens = {tokenizer.token(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return {token: token_id for token, token_id in tokens.items() if token is not None}
