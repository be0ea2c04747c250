"""The bytes that each token of a tokenizer stands for."""

from __future__ import annotations

import re
import string

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.detokenizer import REPLACEMENT, bytes_of_spelling
from dymoe_runtime.text.tokenizer import Tokenizer

_BYTE = re.compile("<0x([0-9A-F]{2})>")
# Characters without which a tokenizer cannot write JSON.
NEEDED = string.ascii_letters + string.digits + '{}[]":,'
# How many tokens are tried to find one that others can follow.
MAX_TRIES = 2000


class Vocabulary:
    """Tokens as the grammar library wants them: their bytes, which ids are special, and an encoder of texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the tokens of a tokenizer; raise DymoeError if it has no end token, or tokens that are no texts."""
        if not tokenizer.eos_ids:
            raise DymoeError("the model has no end token, so no grammar can end its answers; use a model that has one")
        self._tokenizer = tokenizer
        self.eos_token_ids = sorted(tokenizer.eos_ids)
        self.eos_token_id, self.bos_token_id = self.eos_token_ids[0], tokenizer.bos_id
        self.tokens = token_bytes(tokenizer)
        self.tokens += [b""] * (self.eos_token_ids[-1] + 1 - len(self.tokens))
        special = {*tokenizer.special_ids.values(), *self.eos_token_ids}
        for text, token_id in tokenizer.special_ids.items():
            self.tokens[token_id] = text.encode()
        for token_id in self.eos_token_ids:
            self.tokens[token_id] = self.tokens[token_id] or f"<end {token_id}>".encode()
        single = {token for token in self.tokens if len(token) == 1}
        missing = next((char for char in NEEDED if char.encode() not in single), None)
        if missing is not None:
            raise DymoeError(
                f"the tokenizer has no token for {missing!r} alone, so no grammar fits it; use another one"
            )
        self._special = special
        self.special_token_ids = sorted(special)

        self._ids = {token: i for i, token in reversed(list(enumerate(self.tokens))) if i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, data: bytes) -> list[int]:
        """Return ids of tokens that join to `data`: those of the tokenizer, unless it would add a space before them."""
        ids = self._tokenizer.encode(data.decode(errors="replace"), add_special_tokens=False)
        if b"".join(self.tokens[token_id] for token_id in ids) == data and not self._special.intersection(ids):
            return ids
        ids, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), None)
            if end is None:  # a byte that no token has
                return ids
            ids.append(self._ids[data[at:end]])
            at = end
        return ids

    def ways(self, mark: str) -> list[list[int]]:
        """Return for each byte of `mark` the ids that go on with it from there, and after which it can be completed."""
        whole = mark.encode()
        by_bytes: dict[bytes, list[int]] = {}
        parts = {whole[i:j] for i in range(len(whole)) for j in range(i + 1, len(whole) + 1)}
        for token_id, token in enumerate(self.tokens):
            if token in parts:
                by_bytes.setdefault(token, []).append(token_id)
        ways: list[list[int]] = [[] for _ in range(len(whole) + 1)]
        complete = {len(whole)}
        for at in reversed(range(len(whole))):
            for end in range(at + 1, len(whole) + 1):
                if end in complete:
                    ways[at] += by_bytes.get(whole[at:end], [])
            if ways[at]:
                complete.add(at)
        return ways


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes that each id adds to a text; none for special tokens and ids without a token."""
    special = {*tokenizer.special_ids.values()}
    spelled = [None if i in special else tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    types = tokenizer.decoder_types
    if "ByteLevel" in types:
        return [b"" if token is None else bytes_of_spelling(token) for token in spelled]
    by_byte = "ByteFallback" in types
    ids = [i for i, token in enumerate(spelled) if token is not None]
    tokens = [b""] * tokenizer.vocab_size
    anchor, before = _anchor(tokenizer, ids)
    for token_id, text in zip(ids, tokenizer.decode_each([[anchor, i] for i in ids]), strict=True):
        byte = _BYTE.fullmatch(spelled[token_id] or "") if by_byte else None
        if byte:
            tokens[token_id] = bytes([int(byte[1], 16)])
        elif text.startswith(before) and (REPLACEMENT not in text or REPLACEMENT in (spelled[token_id] or "")):
            tokens[token_id] = text[len(before) :].encode()
    return tokens


def _anchor(tokenizer: Tokenizer, ids: list[int]) -> tuple[int, str]:
    """Return a token after which others keep their text, because a tokenizer may change the first one of a text."""
    for token_id in ids[:MAX_TRIES]:
        text = tokenizer.decode([token_id])
        if text.isalpha() and tokenizer.decode([token_id, token_id]).startswith(text):
            return token_id, text
    raise DymoeError("the tokenizer has no token that is a plain word, so no grammar fits it; use another model")
