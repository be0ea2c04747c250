"""Slots: the sequences of a model, what runs in them, and which one a new prompt gets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dymoe_runtime.prefix import shared_prefix

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.engine.batch.model import BatchPrompt
    from dymoe_runtime.engine.batch.sequence import BatchSequence
    from dymoe_runtime.serving.service.batching.answer import QueuedAnswer
    from dymoe_runtime.text.generate import AnswerWriter


@dataclass(eq=False)
class Slot:
    """A sequence, and the job that runs in it."""

    sequence: BatchSequence
    job: Job | None = None
    used: int = 0  # a number that rises with each use
    saving: bool = False  # whether a thread writes its state to a file

    @property
    def is_free(self) -> bool:
        """Return whether a job can begin here."""
        return self.job is None and not self.saving


@dataclass(eq=False)
class Job:
    """A request that runs."""

    answer: QueuedAnswer
    slot: Slot
    prompt: BatchPrompt | None  # None once all of it has run
    writer: AnswerWriter
    token: int = -1  # the last token of the answer, which runs next
    served: int = 0  # a number that rises with each pass that ran a part of the prompt
    begun: float = field(default=0.0)  # time, in seconds of `time.monotonic`

    @property
    def next_id(self) -> int:
        """Return the one token that runs next."""
        return self.token if self.prompt is None else self.prompt.left[0]


@dataclass(frozen=True)
class Place:
    """Where a prompt begins: a free slot, and how many tokens of another or the same sequence it begins with."""

    slot: Slot
    source: Slot
    reused: int


class Slots:
    """All slots of a model."""

    def __init__(self, sequences: Sequence[BatchSequence], chunk_tokens: int) -> None:
        """Begin with empty slots; prompts are computed in chunks of `chunk_tokens`."""
        self.all = [Slot(sequence) for sequence in sequences]
        self._chunk = chunk_tokens
        self._uses = itertools.count(1)

    @property
    def jobs(self) -> list[Job]:
        """Return the jobs that run, in the order of their slots."""
        return [slot.job for slot in self.all if slot.job is not None]

    def has_free(self) -> bool:
        """Return whether a job can begin."""
        return any(slot.is_free for slot in self.all)

    def place(self, ids: Sequence[int]) -> Place:
        """Return the place of a prompt that computes the fewest tokens; there must be a free slot.

        The state of a busy slot is copied. So is that of a free one that would lose more than half of its tokens while
        another slot has been used less lately.
        """
        free = sorted((slot for slot in self.all if slot.is_free), key=lambda slot: slot.used)
        reused, source = max(
            ((slot.sequence.reusable(ids), slot) for slot in self.all), key=lambda pair: (pair[0], pair[1].is_free)
        )
        if not reused:
            return Place(free[0], free[0], 0)
        if source.is_free and (2 * reused >= source.sequence.length or free[0] is source):
            return Place(source, source, reused)
        return Place(free[0], source, reused)

    def worth_waiting_for(self, ids: Sequence[int], reused: int) -> Job | None:
        """Return a job whose prompt is the same, or shares at least a chunk more with this one than `reused`."""
        for job in self.jobs:
            if job.prompt is not None and reused < len(ids):
                if job.answer.request.ids == ids:
                    return job
                shared = shared_prefix(job.answer.request.ids, ids[: len(ids) - 1])
                if shared // self._chunk * self._chunk >= reused + self._chunk:
                    return job
        return None

    def begin(self, place: Place, job_of: Callable[[Slot, int], Job]) -> Job:
        """Begin a job at a place; `job_of` makes it of the slot and the number of tokens that it reuses."""
        slot = place.slot
        slot.used = next(self._uses)
        if place.source is not slot:
            slot.sequence.cut(0)
            slot.sequence.begin_with(place.source.sequence, place.reused)
        slot.job = job_of(slot, slot.sequence.cut(place.reused))
        return slot.job

    def end(self, job: Job) -> None:
        """Free the slot of a job."""
        job.slot.used = next(self._uses)
        job.slot.job = None
