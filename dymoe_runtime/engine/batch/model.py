"""A model with several sequences, which run together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dymoe_runtime.engine.batch.sequence import BatchSequence, Known
from dymoe_runtime.engine.model import LoadedModel, ModelParts
from dymoe_runtime.engine.saved import state_file
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.routing import chunk_lengths


@dataclass(eq=False)
class BatchPrompt:
    """A prompt that is being computed: its sequence, the ids that are left, and at the end the logits [vocab]."""

    sequence: BatchSequence
    left: list[int]
    logits: np.ndarray | None = None
    begun: bool = field(default=False, init=False)


class BatchModel(LoadedModel):
    """A language model with the states of several sequences. Use it as a context manager, like `Model`.

    Only one thread may use it, within `running`.
    """

    def __init__(self, parts: ModelParts) -> None:
        """Take the parts, with one state for each sequence."""
        super().__init__(parts)
        chunk = parts.sizer.budget.chunk_tokens
        self.sequences = tuple(BatchSequence(state, chunk) for state in parts.states)
        self._borrowing = 0  # tokens of the prompt passes that run now, one of which may run in a pause of the other
        self._states = tuple(sequence.state for sequence in self.sequences)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Return a context in which this thread uses the model.

        Raises DymoeError if another thread does, the model is closed, or in a process that was forked after loading.
        """
        with self._access:
            yield

    @property
    def chunk_tokens(self) -> int:
        """Return how many tokens of a prompt choose their tiers together."""
        return self.budget.chunk_tokens

    @property
    def is_recurrent(self) -> bool:
        """Return whether a layer keeps a state that cannot be cut at every position."""
        return self.sequences[0].is_recurrent

    def prompt(self, sequence: BatchSequence, ids: Sequence[int]) -> BatchPrompt:
        """Return a prompt of `ids`, with which the tokens of `sequence` begin; what it lacks is left to run.

        If it lacks nothing, the prompt has its logits. Raises DymoeError if an id is outside the vocabulary.
        """
        self.spec.check_ids(ids)
        return BatchPrompt(sequence, list(ids[sequence.length :]), sequence.logits_after(ids))

    def pass_tokens(self, left: int) -> int:
        """Return how many of the `left` tokens of some prompts run in one pass, so that the fewest bytes are read."""
        return self._parts.sizer.pass_tokens(left, self._prompt_bytes())

    def is_token(self, prompt: BatchPrompt) -> bool:
        """Return whether what is left of a prompt runs like a decoded token, because it is one and is not weighed."""
        return len(prompt.left) == 1 and not self.rule.weighs_tokens

    def prefill(self, prompts: Sequence[BatchPrompt], tokens: int, pause: Callable[[], None]) -> None:
        """Run the next of the tokens of prompts in one pass, `tokens` of all together, in their order.

        Each prompt runs whole chunks, or all that is left of it. `logits` are set where nothing is left. A prompt for
        which `is_token` is true does not run here. `pause` is called often; other sequences may run in it. With kernels
        that are not `batch_invariant`, a pass runs one chunk of one prompt.

        Raises DymoeError if the memory limit has been lowered too far or an expert cannot be read, and what `pause`
        raises. The sequences then have the tokens of the passes before.
        """
        parts, started = self._parts, time.perf_counter()
        parts.sizer.check_limit()
        taken = self._taken(prompts, tokens)
        total = sum(count for _, count in taken)
        paused = 0.0

        def between() -> None:
            nonlocal paused
            begun = time.perf_counter()
            pause()
            parts.control.before_prompt(total)
            paused += time.perf_counter() - begun

        self._borrowing += total
        try:
            parts.sizer.lend(self._borrowing)
            parts.control.before_prompt(total)
            rows = [(np.array(prompt.left[:count]), prompt.sequence.state) for prompt, count in taken]
            for prompt, count in taken:
                if not prompt.begun:
                    prompt.sequence.begin_prompt()
                    prompt.begun = True
                prompt.sequence.append(prompt.left[:count])
            group = parts.sizer.budget.chunk_tokens
            with parts.dense.pausing(between):
                hidden = parts.decoder.prefill_each(rows, group, self.rule.weighs_tokens, between)
        except BaseException:
            for prompt, _ in taken:
                prompt.sequence.recovered()
            raise
        finally:
            self._borrowing -= total
            parts.sizer.lend(self._borrowing)
        self.store.tick(total)
        for (prompt, count), x in zip(taken, hidden, strict=True):
            del prompt.left[:count]
            if not prompt.left:
                prompt.logits = parts.decoder.logits(x[-1:])[0]
            prompt.sequence.note_prompt(prompt.logits)
        self.stats.prefill.add(total, time.perf_counter() - started - paused)

    def decode(self, sequences: Sequence[BatchSequence], ids: Sequence[int]) -> np.ndarray:
        """Append one token to each of some sequences; return the logits float32 [T, vocab] after them.

        The logits equal those that `Model.decode` would return for each sequence. Raises DymoeError as `prefill` does.
        """
        parts, started = self._parts, time.perf_counter()
        parts.sizer.check_limit()
        parts.control.before_token()
        for sequence, token_id in zip(sequences, ids, strict=True):
            sequence.append([token_id])
        states = tuple(sequence.state for sequence in sequences)
        if states == self._states:
            states = self._states  # the same object, so that the decoder need not look at it again
        self._states = states
        try:
            logits = self._decoded(np.array(ids))
        except BaseException:
            for sequence in sequences:
                sequence.recovered()
            raise
        self.store.tick(len(ids))
        seconds = time.perf_counter() - started
        parts.control.after_token(seconds)
        self.stats.decode.add(len(ids), seconds)
        return logits

    def save_state(self, sequence: BatchSequence, path: Path) -> None:
        """Write the state of a sequence to a file, as `Model.save_state` does; raise DymoeError if that fails.

        Any thread may do so while nobody changes the sequence.
        """
        known = sequence.known
        state_file.save(path, self._origin(), known.ids, f"{known.whole} {known.prompt_end}", sequence.state)

    def load_state(self, sequence: BatchSequence, path: Path) -> None:
        """Continue a sequence that `save_state` has written, as `Model.load_state` does.

        Raises DymoeError as that does; the sequence may then be empty.
        """
        try:
            ids, note = state_file.load(path, self._origin(), self.spec, sequence.state)
        except BaseException:
            sequence.recovered()
            raise
        sequence.restored(_known(ids, note))

    def saved_tokens(self, path: Path) -> Known:
        """Return the tokens of a state that `save_state` has written.

        Raises DymoeError if this model cannot continue it.
        """
        return _known(*state_file.read_tokens(path, self._origin(), self.spec))

    def _decoded(self, ids: np.ndarray) -> np.ndarray:
        parts, states = self._parts, self._states
        if self.kernels.batch_invariant:
            with parts.dense.pausing(None):  # this may run in a pause itself
                return parts.decoder.logits(parts.decoder.decode_each(ids, states))
        rows = zip(np.split(ids, len(ids)), states, strict=True)
        return np.concatenate([parts.decoder.logits(parts.decoder.forward(row, state)) for row, state in rows])

    def _taken(self, prompts: Sequence[BatchPrompt], tokens: int) -> list[tuple[BatchPrompt, int]]:
        """Return the prompts that run in a pass of `tokens`, and how many tokens of each."""
        chunk, taken = self._parts.sizer.budget.chunk_tokens, list[tuple[BatchPrompt, int]]()
        for prompt in prompts:
            left = prompt.sequence.next_tokens(len(prompt.left))
            if left % chunk == 1 and left > 1 and not self.rule.weighs_tokens:
                left -= 1
            count = 0
            for length in chunk_lengths(left, chunk):
                if count + length > tokens:
                    break
                count += length
            if count:
                taken.append((prompt, count))
                tokens -= count
            if not self.kernels.batch_invariant and taken:
                break
        if not taken:
            raise DymoeError("a prompt pass without tokens")
        return taken


def _known(ids: list[int], note: str) -> Known:
    """Return the tokens of a saved state, whose note says how they were computed; otherwise nothing of it is whole."""
    numbers = [int(word) for word in note.split() if word.isascii() and word.isdecimal()]
    if len(numbers) != 2 or not max(numbers) <= len(ids):
        return Known(ids, 0, len(ids))
    return Known(ids, *numbers)
