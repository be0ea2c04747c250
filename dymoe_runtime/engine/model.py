"""Loaded bundles: a language model that generates text, and a scorer of whole windows of a text."""

from __future__ import annotations

import atexit
import operator
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dymoe_runtime.access import Access
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.policy import OperatingPoint
from dymoe_runtime.engine import cost
from dymoe_runtime.engine.arena_sizing import ArenaSizer
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.control import Control, Interruption
from dymoe_runtime.engine.cost import CostModel
from dymoe_runtime.engine.precision import Precision
from dymoe_runtime.engine.saved import state_file
from dymoe_runtime.engine.saved.origin import Origin, digest_of
from dymoe_runtime.engine.stats import RunStats
from dymoe_runtime.engine.trace import Tracer
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.kernels.prepared import PreparedExpert
from dymoe_runtime.model.decode_step import CompiledLayers, DecodeStep
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.routing import NoExperts
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.model.tier_counts import TierCounts
from dymoe_runtime.model.tier_rule import TierRule
from dymoe_runtime.model.weights import BundleDense
from dymoe_runtime.process import peak_resident_bytes
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.store.record_reader import RecordReader
from dymoe_runtime.store.request import ExpertRequest
from dymoe_runtime.store.store import ExpertStore
from dymoe_runtime.store.warm_up import WarmUp

M = TypeVar("M", bound="LoadedModel")


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The parts of a model, which `load_model` puts together."""

    bundle: Bundle
    kernels: Kernels
    context: int  # tokens
    kv_bits: int
    precision: Precision
    note: str  # tells the user how the point differs from the requested one, or ""
    control: Control
    interruption: Interruption
    access: Access
    reader: RecordReader
    store: ExpertStore[PreparedExpert]
    sizer: ArenaSizer
    tracer: Tracer | None
    warm_up: WarmUp
    counts: TierCounts
    dense: BundleDense
    layers: CompiledLayers | None
    decoder: Decoder
    states: tuple[SequenceState, ...]  # of the sequences
    locked_bytes: int


class LoadedModel:
    """A loaded bundle: what a model has whatever the number of its sequences."""

    def __init__(self, parts: ModelParts) -> None:
        """Take the parts."""
        self.bundle = parts.bundle
        self.spec: ModelSpec = parts.bundle.spec
        self.max_context = parts.context
        self.kernels = parts.kernels
        self.reader, self.store = parts.reader, parts.store
        self.note = parts.note
        self.stats = RunStats()
        self._parts, self._access = parts, parts.access
        atexit.register(self._access.end)

    def __enter__(self: M) -> M:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End threads and files. Running the model afterwards raises DymoeError.

        A pass that runs in another thread ends first, with DymoeError if it is a long one.
        """
        atexit.unregister(self._access.end)
        self._access.close()

    @property
    def point(self) -> str:
        """Return the name of the current operating point or tier."""
        return self._parts.precision.name

    @property
    def rule(self) -> TierRule:
        """Return the current tier rule."""
        return self._parts.precision.rule

    @property
    def budget(self) -> Budget:
        """Return the current division of the process's memory."""
        return self._parts.sizer.budget

    def use(self, name: str, rule: TierRule) -> None:
        """Use another tier rule from the next pass on; `name` becomes `point`."""
        with self._access:
            self._parts.precision.set(name, rule)

    def hold_tpot(self, points: Sequence[OperatingPoint], start: int, target_s: float) -> None:
        """Run the best of `points` at which a decoded token takes at most `target_s`, from measured times.

        `points` are ordered by rising time; the one with index `start` runs first.
        """
        self._parts.control.hold_tpot(points, start, target_s)

    def preload(self) -> None:
        """Start reading the experts that will be used most, as many as fit.

        Call it after all measurements, which overwrite the arena.
        """
        parts = self._parts
        with self._access:
            self.store.preload(preload_requests(self.bundle, parts.warm_up, parts.precision, self.budget))

    def remember(self) -> None:
        """Write the warm set if the options name one, unless all experts fit, because then uses are not counted."""
        if not self.store.all_fit:
            self._parts.warm_up.write(self.store.rates())

    def decoder_without_experts(self) -> Decoder:
        """Return a decoder without routed experts, to measure everything else."""
        parts = self._parts
        step = None if parts.layers is None else DecodeStep(self.spec, parts.layers)
        return Decoder(self.spec, parts.dense, NoExperts(), self.kernels, step)

    def measure_cost(self, counts: Sequence[int] = cost.COUNTS, sweep_bytes: int = cost.SWEEP_BYTES) -> CostModel:
        """Measure the compute time of experts in the arena's memory; call it before anything is read into the arena."""
        return cost.measure_for(self.bundle, self.kernels, self.store.empty_memory, counts, sweep_bytes)

    def reset_stats(self) -> None:
        """Reset all statistics to 0."""
        self.stats = RunStats()
        self.store.reset_stats()
        if self._parts.tracer is not None:
            self._parts.tracer.reset_stats()
        self._parts.counts.clear()

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of the run so far. The keys are a contract."""
        counts = self._parts.counts
        return {
            "point": self.point,
            "bits_mean": counts.bits_mean,
            "tier_shares": counts.shares(),
            "last_token_tiers": {str(layer): list(tiers) for layer, tiers in sorted(counts.last.copy().items())},
            **self.stats.to_json(self.store.stats),
            "arena_bytes": self.store.arena_bytes,
            "resident_bytes": self.store.resident_bytes(),
            "locked_bytes": self._parts.locked_bytes,
            "floor_bytes": self.budget.floor_bytes,
            "memory_bytes": self.budget.memory_bytes,
            "peak_rss_bytes": peak_resident_bytes(),
            "kernels": self.kernels.name,
        }

    def _prompt_bytes(self) -> int:
        """Return the bytes of the experts that a long prompt uses: all experts, at the highest tier of each layer."""
        layout, highest = self.bundle.layout, self.rule.highest
        return self.spec.num_experts * sum(layout.prefix_bytes(highest[layer]) for layer in self.spec.moe_layers)

    def _origin(self) -> Origin:
        """Return what a state that is saved now belongs to."""
        parts, manifest = self._parts, self.bundle.manifest
        if parts.control.changes_points or not parts.precision.is_requested:
            return Origin(manifest.digest, self.max_context, parts.kv_bits, "", "")
        return Origin(manifest.digest, self.max_context, parts.kv_bits, self.point, digest_of(self.rule))


class Model(LoadedModel):
    """A language model with the state of one sequence. Use it as a context manager, because it owns threads and files.

    Only one thread may use it at a time. What reads or changes the sequence raises DymoeError if another thread's call
    runs, if the model is closed, and in a process that was forked after loading.
    """

    def __init__(self, parts: ModelParts) -> None:
        """Take the parts, with one state."""
        super().__init__(parts)
        (self._state,) = parts.states
        self._ids: list[int] = []  # of the sequence; those from `position` on are of a pass that failed
        self._changes = 0

    @property
    def position(self) -> int:
        """Return the number of tokens in the sequence."""
        return self._state.length

    @property
    def changes(self) -> int:
        """Return how often the sequence was changed since loading, whoever did it."""
        return self._changes

    @property
    def tokens(self) -> list[int]:
        """Return the ids of the tokens in the sequence."""
        return self._ids[: self.position]

    def interrupt_when(self, asked: Callable[[], bool]) -> None:
        """End a pass with KeyboardInterrupt, before the experts of its next layer, once `asked()` is true.

        The sequence then has the tokens of the passes before it, or none if a layer cannot go back that far, and goes
        on from there. After an interrupt at any other point every call raises DymoeError.
        """
        self._parts.interruption.when(asked)

    def reset(self, position: int = 0) -> int:
        """Forget the tokens from `position` on; return how many are kept, 0 if a layer cannot go back that far."""
        position = operator.index(position)
        with self._access:
            self._changes += 1
            return self._state.truncate(position)

    def save_state(self, path: str | os.PathLike[str], note: str = "") -> None:
        """Write the state of the sequence and a note to a file, which only its owner may read.

        The old file stays until the new one is complete. Raises DymoeError if it cannot be written, or the model is
        closed.
        """
        with self._access.reading():
            state_file.save(Path(path), self._origin(), self.tokens, note, self._state)

    def load_state(self, path: str | os.PathLike[str]) -> str:
        """Continue the sequence that `save_state` has written; return the note.

        What follows equals, bit for bit, what would have followed in the run that saved it, with the same kernels,
        whatever the memory and the threads; unless that run or this one chooses tiers by memory or time, as
        `--point auto`, `--tpot` and `--latency` do.

        Raises DymoeError if the file is no saved state or is damaged, another bundle, other `kv_bits` or another point
        have made it, it does not fit the context, or the model is closed. The sequence is then as before, or empty if
        the damage showed too late.
        """
        with self._access:
            self._changes += 1
            self._ids, note = state_file.load(Path(path), self._origin(), self.spec, self._state)
        return note

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Append a prompt; return the logits float32 [vocab] after its last token.

        Raises DymoeError if there is no id or one outside the vocabulary, the prompt does not fit the context, the
        memory limit has been lowered too far, or the model is closed.
        """
        ids = [operator.index(token_id) for token_id in ids]
        if not ids:
            raise DymoeError("the prompt is empty; give it at least one token of text")
        with self._access:
            self._append(ids)
            started, parts = time.perf_counter(), self._parts
            try:
                logits: np.ndarray = parts.decoder.logits(self._pass_by_pass(ids))[0]
            finally:
                parts.sizer.lend(0)
            self.stats.prefill.add(len(ids), time.perf_counter() - started)
        return logits

    def decode(self, token_id: int) -> np.ndarray:
        """Append one token; return the logits float32 [vocab] after it. Raises DymoeError as `prefill` does."""
        with self._access:
            self._append([token_id])
            started, parts = time.perf_counter(), self._parts
            parts.sizer.check_limit()
            parts.control.before_token()
            x = parts.decoder.forward(np.array([token_id]), self._state)
            self.store.tick()
            logits: np.ndarray = parts.decoder.logits(x)[0]
            seconds = time.perf_counter() - started
            if parts.tracer is not None:
                parts.tracer.end_pass(1, seconds, self.point, prompt=False)
            parts.control.after_token(seconds)
            self.stats.decode.add(1, seconds)
        return logits

    def _pass_by_pass(self, ids: Sequence[int]) -> np.ndarray:
        """Run a prompt in one or more passes; return the hidden state [1, H] of its last token."""
        parts, left = self._parts, list(ids)
        x = np.empty((0, 0), np.float32)
        while left:
            parts.sizer.check_limit()
            tokens = parts.sizer.pass_tokens(len(left), self._prompt_bytes())
            parts.sizer.lend(tokens)
            chunk, left, begun = np.array(left[:tokens]), left[tokens:], time.perf_counter()
            parts.control.before_prompt(tokens)
            if tokens == 1 and not self.rule.weighs_tokens:
                x = parts.decoder.forward(chunk, self._state)
            else:
                group = parts.sizer.budget.chunk_tokens
                x = parts.decoder.prefill(chunk, self._state, group, self.rule.weighs_tokens)[-1:].copy()
            self.store.tick(tokens)
            if parts.tracer is not None:
                parts.tracer.end_pass(tokens, time.perf_counter() - begun, self.point, prompt=True)
        return x

    def _append(self, ids: list[int]) -> None:
        """Take the ids that run next; raise DymoeError if they cannot."""
        self.spec.check_ids(ids)
        if self.position + len(ids) > self.max_context:
            raise DymoeError(
                f"{self.position + len(ids)} tokens do not fit a context of {self.max_context}; "
                "give fewer, or a larger --context if the model has it"
            )
        self._ids[self.position :] = ids
        self._changes += 1


class Scorer:
    """A loaded bundle that scores windows of text, each as a new sequence. Use it as a context manager."""

    def __init__(
        self,
        bundle: Bundle,
        precision: Precision,
        counts: TierCounts,
        decoder: Decoder,
        state: SequenceState,
        budget: Budget,
        access: Access,
    ) -> None:
        """Take the parts; `access` has the resources to free at the end."""
        self.bundle, self.spec, self.budget = bundle, bundle.spec, budget
        self.counts = counts
        self.logits = decoder.logits
        self._precision, self._decoder, self._state = precision, decoder, state
        self._access = access
        atexit.register(access.end)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End threads and files. Scoring afterwards raises DymoeError."""
        atexit.unregister(self._access.end)
        self._access.close()

    @property
    def point(self) -> str:
        """Return the name of the current operating point or tier."""
        return self._precision.name

    @property
    def rule(self) -> TierRule:
        """Return the current tier rule."""
        return self._precision.rule

    def use(self, name: str, rule: TierRule) -> None:
        """Use another tier rule from the next window on; `name` becomes `point`."""
        self._precision.set(name, rule)

    def hidden(self, ids: np.ndarray | Sequence[int], by_prefill: bool = False) -> np.ndarray:
        """Return hidden states [T, H] of a window of token ids [T].

        Tiers follow the decode rule or, with `by_prefill`, the prefill rule with the window as one chunk. Raises
        DymoeError if there is no id or one outside the vocabulary, or the window is longer than the scorer's.
        """
        if not 1 <= len(ids) <= self._state.capacity:
            raise DymoeError(f"{len(ids)} tokens: this scorer takes windows of 1 to {self._state.capacity}")
        ids = np.asarray(ids)
        self.spec.check_ids(ids.tolist())
        with self._access:
            self._state.truncate(0)
            if by_prefill:
                return self._decoder.prefill(ids, self._state, len(ids))
            return self._decoder.forward(ids, self._state)


def preload_requests(bundle: Bundle, warm_up: WarmUp, precision: Precision, budget: Budget) -> list[ExpertRequest]:
    """Return requests for the most used experts that fit the arena while a prompt of one chunk borrows from it."""
    return warm_up.order(
        precision.bits_mean(bundle.policy), budget.arena_bytes - budget.borrowed_bytes(budget.chunk_tokens)
    )
