"""The tokenizer of a model in a GGUF file: tokens, merges, special tokens and the chat template.

llama.cpp has no field for how text is split before merging; it knows the splits of well-known models by their names. So
a tokenizer.json is matched with the regular expressions that llama.cpp has under a name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from dymoe_compile.export.gguf.splits import split_name, steps_of
from dymoe_runtime.bundle.bundle import TOKENIZER, Bundle
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.tokenizer import Tokenizer

# Spaces in a merge, which separates its halves by a space: byte-level tokens spell them so.
SPACE, SPELLED_SPACE = " ", "Ġ"
# llama.cpp wants a merge where there is none; no byte-level text has this character.
NO_MERGES = ["▁ ▁"]
# Normalizers that leave text as it is but for how characters are composed; llama.cpp has none.
COMPOSING = {"NFC", "NFKC", "NFD", "NFKD"}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; lists have one entry for each token of the model."""

    split: str  # llama.cpp's name
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    special_ids: Mapping[str, int]  # bos, eos, eot, pad, unk -> id
    adds: Mapping[str, bool]  # bos, eos -> whether it is added to each text
    template: str | None
    notes: tuple[str, ...] = ()

    def write(self, writer: GGUFWriter) -> None:
        """Add the vocabulary to `writer`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges or NO_MERGES)
        for name, token in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        for name, added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(added)
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary_of(bundle: Bundle) -> Vocabulary:
    """Return the vocabulary of a bundle's tokenizer.

    Raises DymoeError if a file is damaged, or if llama.cpp does not have such a tokenizer.
    """
    tokenizer = Tokenizer.load(bundle.path, bundle.spec.eos_ids)
    values = json.loads(bundle.read(TOKENIZER) or b"{}")
    model = values["model"]
    _check_model(model, values)
    merges = [merge if isinstance(merge, str) else _joined(merge) for merge in model.get("merges", ())]
    split = split_name(values, bool(merges))
    tokens, types = _tokens(tokenizer, model["vocab"], values.get("added_tokens") or (), bundle.spec.vocab_size)
    adds = _added(tokenizer)
    special = dict(_special_ids(tokenizer))
    notes = tuple(_notes(values, tokenizer))
    return Vocabulary(split, tokens, types, merges, special, adds, tokenizer.chat_template, notes)


def _check_model(model: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    steps = steps_of(values.get("pre_tokenizer"))
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if model.get("type") != "BPE" or not byte_level or model.get("byte_fallback"):
        raise DymoeError(
            f"tokenizer.json: not a byte-level BPE, but {model.get('type')}, which an export to GGUF does not write; "
            "export with --format onnx"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise DymoeError(f"tokenizer.json: '{name}' has no form in GGUF; export with --format onnx")


def _joined(merge: list[str]) -> str:
    return " ".join(half.replace(SPACE, SPELLED_SPACE) for half in merge)


def _tokens(
    tokenizer: Tokenizer, vocab: Mapping[str, int], added: Iterable[Mapping[str, Any]], count: int
) -> tuple[list[str], list[TokenType]]:
    """Return the texts and types of `count` tokens; those that the tokenizer does not have are unused."""
    tokens = [f"[PAD{index}]" for index in range(count)]
    types = [TokenType.UNUSED] * count
    for text, index in vocab.items():
        if index < count:
            tokens[index], types[index] = text, TokenType.NORMAL
    for token in added:
        if (index := token["id"]) < count:
            is_special = token.get("special") or token["content"] in tokenizer.special_ids
            tokens[index] = token["content"]
            types[index] = TokenType.CONTROL if is_special else TokenType.USER_DEFINED
    return tokens, types


def _added(tokenizer: Tokenizer) -> dict[str, bool]:
    """Return whether the named first and last tokens are added to each text.

    Raises DymoeError if others are.
    """
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    ends = sorted(tokenizer.eos_ids)
    for first in ([], [tokenizer.bos_id]):
        for last in ([], *([index] for index in ends)):
            if whole == [*first, *plain, *last]:
                return {"bos": bool(first), "eos": bool(last)}
    raise DymoeError(
        "tokenizer.json: adds other tokens to each text than that of its begin and that of its end, which GGUF cannot "
        "say; export with --format onnx"
    )


def _special_ids(tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """Yield special tokens by name; an end of text besides the named one is an end of turn."""
    ids = {name: tokenizer.id_of(text) for name, text in tokenizer.special_tokens.items() if text}
    for name in ("bos", "pad", "unk"):
        if (index := ids.get(f"{name}_token")) is not None:
            yield name, index
    ends = sorted(tokenizer.eos_ids)
    if ends:
        eos = ids.get("eos_token")
        first = ends[0] if eos is None else eos
        yield "eos", first
        if others := [index for index in ends if index != first]:
            yield "eot", others[0]


def _notes(values: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
    kinds = {step["type"] for step in steps_of(values.get("normalizer"), "normalizers")}
    if kinds - COMPOSING:
        raise DymoeError(
            f"tokenizer.json: the normalizer {', '.join(sorted(kinds - COMPOSING))} has no form in GGUF; "
            "export with --format onnx"
        )
    if kinds:
        yield f"llama.cpp does not normalize text ({', '.join(sorted(kinds))}); composed characters are the same"
    if len(tokenizer.eos_ids) > 2:
        count = len(tokenizer.eos_ids)
        yield f"of {count} tokens that end a text, the file names two; llama.cpp knows others by their text alone"
