"""The transcript of a conversation: which tokens stand for which text, so that no turn computes them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.text.detokenizer import StreamDecoder
from dymoe_runtime.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A piece of text, and the tokens that a model has seen of it."""

    text: str
    ids: tuple[int, ...]


class Transcript:
    """The text that a model has seen, in pieces.

    A model does not always write the tokens that a tokenizer would make of its text. If a later prompt began with other
    tokens for an old answer, the model would have to compute all that follows once more. Hence a prompt takes the
    tokens of the pieces that its text begins with, and those of the tokenizer for the rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: list[Piece] = []
        self._prompt: list[Piece] = []

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, which `add_answer` may follow."""
        self._prompt = self._divide(text)
        return [token_id for piece in self._prompt for token_id in piece.ids]

    def count(self, text: str) -> int:
        """Return the number of ids that `encode` would return; the prompt of the last `encode` stays."""
        return sum(len(piece.ids) for piece in self._divide(text))

    def add_answer(self, ids: Sequence[int]) -> None:
        """Take the ids that the model answered to the prompt of the last `encode`."""
        self._pieces = [*self._prompt, *_pieces_of(ids, self._tokenizer)]

    def to_json(self) -> list[list[Any]]:
        """Return the pieces as lists [text, ids]."""
        return [[piece.text, list(piece.ids)] for piece in self._pieces]

    def restore(self, pieces: Any) -> None:
        """Take pieces that `to_json` returned; raise DymoeError if they are none."""
        sound = isinstance(pieces, list) and all(
            isinstance(piece, list)
            and len(piece) == 2
            and isinstance(piece[0], str)
            and isinstance(piece[1], list)
            and all(type(token_id) is int and 0 <= token_id < 1 << 31 for token_id in piece[1])
            for piece in pieces
        )
        if not sound:
            raise DymoeError("the tokens of the conversation are damaged; start a new session")
        self._pieces = [Piece(text, tuple(ids)) for text, ids in pieces]

    def _divide(self, text: str) -> list[Piece]:
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        count, start = self._known(text, offsets)
        kept = self._pieces[:count]
        begun = sum(len(piece.text) for piece in kept)
        return [*kept, Piece(text[begun:], tuple(ids[start:]))]

    def _known(self, text: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return how many pieces `text` begins with, and the first of its own tokens that follow them.

        The tokens of the text must be divided where the last of these pieces ends.
        """
        starts = {start: index for index, (start, _) in reversed(list(enumerate(offsets)))}
        starts[len(text)] = len(offsets)
        ends = [0, *(end for _, end in offsets)]
        # A tokenizer that leaves characters out, such as spaces, does not say to which side they belong.
        if any(start > end for (start, _), end in zip(offsets, ends, strict=False)) or ends[-1] != len(text):
            return 0, 0
        best, position = (0, 0), 0
        for count, piece in enumerate(self._pieces, 1):
            if not text.startswith(piece.text, position):
                break
            position += len(piece.text)
            index = starts.get(position)
            if index is not None and ends[index] <= position:
                best = (count, index)
        return best


def _pieces_of(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield an answer in the smallest pieces that are whole characters; special tokens are spelled out."""
    special = {token_id: text for text, token_id in tokenizer.special_ids.items()}
    decoder = StreamDecoder(tokenizer)
    text, pending = "", list[int]()
    for token_id in ids:
        if token_id in special:
            if pending:
                yield Piece(text + decoder.flush(), tuple(pending))
                decoder, text, pending = StreamDecoder(tokenizer), "", []
            yield Piece(special[token_id], (token_id,))
            continue
        text += decoder.push(token_id)
        pending.append(token_id)
        if not decoder.pending:
            yield Piece(text, tuple(pending))
            text, pending = "", []
    if pending:
        yield Piece(text + decoder.flush(), tuple(pending))
