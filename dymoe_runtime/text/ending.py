"""What ends an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dymoe_runtime.errors import DymoeError

if TYPE_CHECKING:  # a long chain of imports, for annotations alone
    from dymoe_runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ending:
    """What ends an answer, besides a full context."""

    max_tokens: int | None
    strings: tuple[str, ...]
    ids: frozenset[int]

    @staticmethod
    def of(
        tokenizer: Tokenizer,
        max_tokens: int | None,
        stop: str | Sequence[str],
        stop_ids: Collection[int],
        ignore_eos: bool,
    ) -> Ending:
        """Gather the conditions; raise DymoeError if one is not possible."""
        strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise DymoeError(f"--max-tokens {max_tokens}: must be at least 1, and a whole number")
        for string in strings:
            if not isinstance(string, str):
                raise DymoeError(f"a stop string is {string!r}, which is no text; give texts")
        if "" in strings:
            raise DymoeError("a stop string is empty; give it at least one character")
        if not isinstance(stop_ids, Iterable) or not all(map(is_id, stop_ids)):
            raise DymoeError(f"stop_ids {stop_ids!r}: expected the ids of tokens")
        named = {tokenizer.special_ids[text] for text in strings if text in tokenizer.special_ids}
        return Ending(
            max_tokens, strings, frozenset(named | {*stop_ids} | (set() if ignore_eos else tokenizer.eos_ids))
        )


def is_id(value: object) -> bool:
    """Return whether a value can be the id of a token."""
    return hasattr(value, "__index__") and not isinstance(value, bool)
