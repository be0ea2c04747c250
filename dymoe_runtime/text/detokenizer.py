"""Decoding of a growing sequence of tokens: text is returned as soon as no later token can change it."""

from __future__ import annotations

import codecs
from typing import Protocol

from dymoe_runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _Stream(Protocol):
    @property
    def pending(self) -> bool:
        """Return whether text is held back."""

    def push(self, token_id: int, token: str) -> str:
        """Return the text that this token makes certain."""

    def settle(self) -> str:
        """Return the text held back, unless it ends within a character."""

    def flush(self) -> str:
        """Return the remaining text."""


class StreamDecoder:
    """A decoder of one token at a time: the texts of all pushes and the flush join to `tokenizer.decode` of all ids.

    A push costs O(1), amortized over the text. Special tokens are skipped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.special_ids.values())
        byte_level = tokenizer.decoder_types == ["ByteLevel"]
        self._stream: _Stream = _ByteLevelStream() if byte_level else _WindowStream(tokenizer)

    @property
    def pending(self) -> bool:
        """Return whether the last tokens end within a character, or their text is not certain yet."""
        return self._stream.pending

    def push(self, token_id: int) -> str:
        """Return the text that this token makes certain; it never ends within a character."""
        token = None if token_id in self._skipped else self._tokenizer.token(token_id)
        return "" if token is None else self._stream.push(token_id, token)

    def settle(self) -> str:
        """Return the text that is held back, unless it ends within a character.

        Call it before a special token that is spelled out.
        """
        return self._stream.settle()

    def flush(self) -> str:
        """Return the remaining text, with U+FFFD for incomplete characters; call it once, at the end."""
        return self._stream.flush()


def _byte_of_char() -> dict[str, int]:
    """Return the byte that each printable character stands for in GPT-2's spelling of bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def bytes_of_spelling(token: str) -> bytes:
    """Return the bytes of a token of byte-level BPE; an added token is spelled as plain text."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return token.encode()


class _ByteLevelStream:
    """A decoder of byte-level BPE, whose tokens are bytes that concatenate to UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def push(self, token_id: int, token: str) -> str:
        return self._decoder.decode(bytes_of_spelling(token))

    def settle(self) -> str:
        return ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """A decoder for all other tokenizers: it decodes a short window twice, without and with the pending tokens.

    The window starts with tokens whose text has been returned, because a tokenizer may decode the first token of a text
    differently (leading spaces).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_fallback = "ByteFallback" in tokenizer.decoder_types
        self._context: list[int] = []
        self._pending: list[int] = []

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def push(self, token_id: int, token: str) -> str:
        self._pending.append(token_id)
        # The byte fallback decoder replaces a whole run of byte tokens if any part of it is not UTF-8, so even complete
        # characters are uncertain until the run ends.
        if self._byte_fallback:
            return "" if _is_byte(token) else self.flush()
        text = self._pending_text()
        return "" if text.endswith(REPLACEMENT) and not token.endswith(REPLACEMENT) else self._give_out(text)

    def settle(self) -> str:
        return "" if self._pending_text().endswith(REPLACEMENT) else self.flush()

    def flush(self) -> str:
        return self._give_out(self._pending_text())

    def _pending_text(self) -> str:
        known = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(known) :]

    def _give_out(self, text: str) -> str:
        if self._pending:
            self._context, self._pending = self._pending, []
        return text


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
