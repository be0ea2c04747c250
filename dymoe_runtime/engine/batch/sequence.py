"""One of the sequences of a batch: its tokens, its state, and how much of it another prompt may begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dymoe_runtime.model.state import SequenceState, Snapshot
from dymoe_runtime.prefix import shared_prefix


@dataclass(frozen=True)
class Known:
    """The tokens of a state, and how they were computed."""

    ids: list[int]
    whole: int  # tokens at the beginning that were computed as whole chunks of a prompt
    prompt_end: int  # tokens up to the end of the last prompt; those after it are of an answer

    def shared(self, ids: Sequence[int], chunk_tokens: int) -> int:
        """Return how many tokens of a prompt `ids` may begin with the state, if it can be cut there.

        These are all of it, if an answer ends it and the prompt goes on, or else whole chunks that both begin with.
        """
        shared = shared_prefix(self.ids, ids[: len(ids) - 1])
        if shared == len(self.ids) > self.prompt_end:
            return shared
        return min(shared, self.whole) // chunk_tokens * chunk_tokens


class BatchSequence:
    """The tokens and the state of one sequence.

    A prompt that begins with the same tokens may begin with this state, at three kinds of position. The first tokens
    of a sequence that were computed as whole chunks of a prompt have the state that any other prompt would give them,
    bit for bit. So has the end of a prompt for an equal one, whose logits are kept. And a sequence that ends with an
    answer is continued by a prompt that begins with all of it, as the next turn of a conversation.
    """

    def __init__(self, state: SequenceState, chunk_tokens: int) -> None:
        """Begin with an empty state; tiers of prompts are chosen for chunks of `chunk_tokens`."""
        self.state = state
        self._chunk = chunk_tokens
        self._ids: list[int] = []  # those from the state's length on are of a pass that failed
        self._whole = 0  # tokens at the beginning that were computed as whole chunks
        self._prompt_end = 0  # tokens up to the end of the last prompt
        self._aligned = True  # whether the prompt that runs began at the end of whole chunks
        self._logits: np.ndarray | None = None  # [vocab], of the last prompt, if it was computed as any equal one would
        # A state that cannot be cut keeps a snapshot of the end of its whole chunks or, without any, of its prompt.
        self.is_recurrent = any(seen is not None for seen in state.snapshot().layers)
        self._snapshot: Snapshot | None = None

    @property
    def tokens(self) -> list[int]:
        """Return the ids of the tokens in the sequence."""
        return self._ids[: self.state.length]

    @property
    def length(self) -> int:
        """Return the number of tokens in the sequence."""
        return self.state.length

    @property
    def known(self) -> Known:
        """Return the tokens in the sequence, and how they were computed."""
        return Known(self.tokens, self._whole, self._prompt_end)

    def reusable(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt need not be computed if it begins with this state."""
        end = self._prompt_end
        if self._logits is not None and list(ids) == self._ids[:end] and self._can_cut(end):
            return end
        shared = self.known.shared(ids, self._chunk)
        return shared if self._can_cut(shared) else 0

    def next_tokens(self, left: int) -> int:
        """Return how many of the `left` tokens of a prompt may run in one pass.

        The end of the whole chunks of a recurrent state is the end of a pass, so that its snapshot can be taken.
        """
        return left // self._chunk * self._chunk if self.is_recurrent and left > self._chunk else left

    def append(self, ids: Sequence[int]) -> None:
        """Take the ids that run next."""
        self._ids[self.state.length :] = ids

    def begin_prompt(self) -> None:
        """Note that a prompt begins."""
        self._aligned = self.state.length == self._whole

    def note_prompt(self, logits: np.ndarray | None) -> None:
        """Note that tokens of a prompt have run; `logits` are those after it, if all of it has run."""
        length = self.state.length
        if self._aligned:
            self._whole = length // self._chunk * self._chunk
            if self.is_recurrent and (self._whole == length or not self._whole):
                self._snapshot = self.state.snapshot()
        self._prompt_end, self._logits = length, logits if self._aligned else None

    def logits_after(self, ids: Sequence[int]) -> np.ndarray | None:
        """Return the logits [vocab] after a prompt of which the sequence has all tokens."""
        return self._logits if len(ids) == self.state.length == self._prompt_end else None

    def cut(self, position: int) -> int:
        """Forget the tokens from `position` on; return how many are kept, fewer if the state cannot be cut there."""
        state, seen = self.state, self._snapshot if self.is_recurrent else None
        if seen is not None and seen.valid and seen.length <= position < state.length:
            state.rollback(seen)
        else:
            state.truncate(position)
        self._note_cut()
        return state.length

    def begin_with(self, other: BatchSequence, position: int) -> None:
        """Take over the first `position` tokens of another sequence, which `reusable` has returned for it."""
        seen = other._snapshot if other.is_recurrent and position != other.length else None
        with self.state.replaced(position):
            for n, (source, target) in enumerate(zip(other.state.layers, self.state.layers, strict=True)):
                if seen is not None and seen.layers[n] is not None:
                    target.rollback(seen.layers[n])
                else:
                    for old, new in zip(source.used(position), target.used(position), strict=True):
                        np.copyto(new, old)
        self._ids = other._ids[:position]
        self._whole = min(other._whole, position)
        self._prompt_end = min(other._prompt_end, position)
        self._logits = other._logits if self._prompt_end == other._prompt_end else None
        ends = self._whole == position or (not self._whole and self._prompt_end == position)
        self._snapshot = self.state.snapshot() if self.is_recurrent and ends else None

    def restored(self, known: Known) -> None:
        """Take the tokens of a state that was read from a file."""
        self._ids = known.ids
        self._whole, self._prompt_end, self._logits = known.whole, known.prompt_end, None
        self._snapshot = self.state.snapshot() if self.is_recurrent and known.whole == len(known.ids) else None

    def recovered(self) -> None:
        """Note that a pass has failed, which may have emptied the state."""
        self._note_cut()

    def _note_cut(self) -> None:
        length = self.state.length
        self._whole = min(self._whole, length)
        if length < self._prompt_end:
            self._prompt_end, self._logits = length, None

    def _can_cut(self, position: int) -> bool:
        """Return whether the state can be cut at a position."""
        seen = self._snapshot
        return (
            not self.is_recurrent
            or position in (0, self.state.length)
            or (seen is not None and seen.valid and seen.length == position)
        )
