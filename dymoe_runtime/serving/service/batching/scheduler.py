"""The thread that runs a model: tokens of all answers in one step, and prompts between the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.serving.service.batching.slots import Job, Place, Slot, Slots
from dymoe_runtime.text.generate import AnswerWriter
from dymoe_runtime.text.sampling import Sampler

if TYPE_CHECKING:  # long chains of imports, for annotations alone
    from dymoe_runtime.engine.batch.model import BatchModel
    from dymoe_runtime.serving.service.batching.answer import QueuedAnswer
    from dymoe_runtime.serving.service.batching.inbox import Inbox
    from dymoe_runtime.serving.service.batching.prompt_cache import PromptCache
    from dymoe_runtime.text.tokenizer import Tokenizer

# Longest time between two looks at what is to be done besides requests, such as saving states.
LOOK_S = 1.0
# How often to look whether a slot has been saved, if a request waits for it.
SAVING_S = 0.01
FAULT = "the answer failed by a fault of the server, which its log has"

log = logging.getLogger(__name__)


class Abandoned(Exception):
    """Ends a prompt pass whose answers nobody wants any more."""


class Scheduler:
    """Runs the requests of an inbox in the slots of a model, in one thread.

    Each step decodes one token of all answers together. A prompt runs in passes, and a pass pauses often. In a pause
    the answers have a step, as soon as the prompt has had as much time as a step takes; so a prompt at most doubles
    the time between the tokens of others. In the pause of a pass of several chunks, prompts of a single chunk have a
    pass of their own, so that a short prompt does not wait for a long one.
    """

    def __init__(
        self,
        model: BatchModel,
        tokenizer: Tokenizer,
        inbox: Inbox,
        cache: PromptCache | None = None,
    ) -> None:
        """Take a model that nobody else uses."""
        self.slots = Slots(model.sequences, model.chunk_tokens)
        self._model, self._tokenizer, self._inbox, self._cache = model, tokenizer, inbox, cache
        self._passes = 0
        self._stepped = self._step_s = 0.0  # when the last step ended, and how long it took
        self._aside_end = self._aside_s = 0.0  # the same of the last pass in a pause
        self._in_pass: list[Job] = []  # whose prompts run now; their states must not change
        self._one_by_one = False  # whether prompts run alone, to find the one that fails

    def run(self) -> None:
        """Run requests until the service ends."""
        with self._model.running():
            while self.slots.jobs or self._inbox.wait(None if self._cache is None else LOOK_S):
                try:
                    self._turn()
                except Exception:  # a fault of this program must not leave those that wait without an answer
                    log.exception("the answers that ran have failed")
                    for job in self.slots.jobs:
                        self._end(job, DymoeError(FAULT))
            if self._cache is not None:
                self._cache.save_all(self.slots.all)

    def _turn(self) -> None:
        """Run one step, and one pass of prompts."""
        self._drop_cancelled()
        self._admit()
        if self._decoding():
            self._step()
        if prompts := self._prompts():
            self._pass(prompts[:1] if self._one_by_one else prompts)
        else:
            self._one_by_one = False
        if not self.slots.jobs and not self.slots.has_free():
            time.sleep(SAVING_S)
        if self._cache is not None:
            self._cache.save_idle(self.slots.all)

    def _decoding(self) -> list[Job]:
        """Return the jobs whose next token a step runs."""
        return [job for job in self.slots.jobs if job.prompt is None or self._model.is_token(job.prompt)]

    def _prompts(self) -> list[Job]:
        """Return the jobs whose prompts have not run, those first that have waited longest."""
        jobs = [job for job in self.slots.jobs if job.prompt is not None and not self._model.is_token(job.prompt)]
        return sorted(jobs, key=lambda job: job.served)

    # Beginnings and ends

    def _admit(self) -> None:
        while self.slots.has_free() and (answer := self._inbox.take()) is not None:
            ids = answer.request.ids
            place = self.slots.place(ids)
            if self._cache is not None:
                place = self._restored(ids, place)
            if (job := self.slots.worth_waiting_for(ids, place.reused)) is not None:
                self._inbox.put_back(answer, job)
                continue
            started = time.monotonic()
            try:
                job = self.slots.begin(place, lambda slot, kept: self._job(answer, slot, kept))
                if job.prompt is not None and job.prompt.logits is not None:
                    logits, job.prompt = job.prompt.logits, None
                    self._answer(job, logits)
            except Exception as error:
                answer.add(_as_known(error))
                answer.add(None)
                self._inbox.end(answer, time.monotonic() - started)

    def _restored(self, ids: Sequence[int], place: Place) -> Place:
        """Return a better place if a file has more of the prompt than the slots have."""
        assert self._cache is not None
        slot = place.slot
        if not self._cache.restore(slot.sequence, ids, place.reused):
            return place
        return Place(slot, slot, slot.sequence.reusable(ids))

    def _job(self, answer: QueuedAnswer, slot: Slot, kept: int) -> Job:
        request = answer.request
        writer = AnswerWriter(
            self._tokenizer,
            request.ids,
            Sampler(request.params),
            request.ending,
            logprobs=request.logprobs,
            splitter=None if request.prompt is None else self._tokenizer.splitter(request.prompt),
            constraint=request.constraint,
        )
        answer.reused_tokens = kept
        prompt = self._model.prompt(slot.sequence, request.ids)
        return Job(answer, slot, prompt, writer, served=self._passes, begun=time.monotonic())

    def _end(self, job: Job, error: DymoeError | None = None) -> None:
        if job.slot.job is not job:
            return
        self.slots.end(job)
        if error is not None:
            job.answer.add(error)
        job.answer.add(None)
        self._inbox.end(job.answer, time.monotonic() - job.begun)
        self._inbox.released(job)

    def _drop_cancelled(self) -> None:
        """Free the slots of answers that nobody wants, unless a pass runs there."""
        for job in self.slots.jobs:
            if job.answer.cancelled.is_set() and job not in self._in_pass:
                self._end(job)

    # Tokens

    def _step(self) -> None:
        begun = time.perf_counter()
        self._decode(self._decoding())
        self._stepped = time.perf_counter()
        self._step_s = self._stepped - begun

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Run the next token of some jobs. If that fails, each runs alone, so that only those fail that must."""
        before = [job.slot.sequence.length for job in jobs]
        for job in jobs:
            if job.prompt is not None and not job.prompt.begun:
                job.slot.sequence.begin_prompt()
        try:
            logits = self._model.decode([job.slot.sequence for job in jobs], [job.next_id for job in jobs])
        except DymoeError as error:
            for job, length in zip(jobs, before, strict=True):
                if len(jobs) == 1 or job.slot.sequence.length != length:
                    self._end(job, error)
                else:
                    self._decode([job])
            return
        for job, row in zip(jobs, logits, strict=True):
            if job.prompt is not None:
                job.slot.sequence.note_prompt(row.copy())
                self._end_prompt(job)
            self._answer(job, row)

    def _answer(self, job: Job, logits: np.ndarray) -> None:
        """Add the token to an answer that follows by its logits [vocab]."""
        sequence, most = job.slot.sequence, self._model.max_context
        try:
            token = job.writer.next(logits, lambda: sequence.length >= most)
        except Exception as error:
            self._end(job, _as_known(error))
            return
        job.token = token.id
        job.answer.add(token)
        if token.finish:
            self._end(job)

    def _end_prompt(self, job: Job) -> None:
        job.prompt = None
        self._inbox.released(job)

    # Prompts

    def _pass(self, jobs: Sequence[Job], aside: bool = False) -> None:
        """Run the next pass of some prompts; `aside` in a pause of another pass."""
        prompts = [job.prompt for job in jobs if job.prompt is not None]
        left = [len(prompt.left) for prompt in prompts]
        tokens = self._model.pass_tokens(sum(left))
        self._passes += 1
        self._in_pass += jobs
        try:
            self._model.prefill(prompts, tokens, lambda: self._pause(jobs, tokens, aside))
        except Abandoned:
            self._begin_again(jobs)
        except DymoeError as error:
            if len(jobs) == 1:
                self._end(jobs[0], error)
            self._one_by_one = True
            self._begin_again(jobs)
        finally:
            del self._in_pass[-len(jobs) :]
        for job, prompt, before in zip(jobs, prompts, left, strict=True):
            if len(prompt.left) < before:
                job.served = self._passes
            if prompt.logits is not None:
                self._end_prompt(job)
                self._answer(job, prompt.logits)

    def _pause(self, running: Sequence[Job], tokens: int, aside: bool) -> None:
        """Let the others go on, in a pause of a pass of so many tokens of the `running` prompts."""
        self._drop_cancelled()
        wanted = sum(not job.answer.cancelled.is_set() for job in running)
        if 2 * wanted < len(running) or not wanted:
            raise Abandoned
        self._admit()
        if self._decoding() and time.perf_counter() - self._stepped >= self._step_s:
            self._step()
        if aside or tokens <= self._model.chunk_tokens or time.perf_counter() - self._aside_end < self._aside_s:
            return
        short = [job for job in self._prompts() if job not in self._in_pass and self._is_short(job)]
        if short:
            begun = time.perf_counter()
            self._pass(short, aside=True)
            self._aside_end = time.perf_counter()
            self._aside_s = self._aside_end - begun

    def _is_short(self, job: Job) -> bool:
        return job.prompt is not None and len(job.prompt.left) <= self._model.chunk_tokens

    def _begin_again(self, jobs: Sequence[Job]) -> None:
        """Let prompts whose pass has failed go on from what their sequences still have."""
        for job in jobs:
            if job.prompt is not None and job.slot.job is job:
                job.prompt = self._model.prompt(job.slot.sequence, job.answer.request.ids)


def _as_known(error: Exception) -> DymoeError:
    """Return an error for a client; log it if it is a fault of this program."""
    if isinstance(error, DymoeError):
        return error
    log.error("an answer failed", exc_info=error)
    return DymoeError(FAULT)
