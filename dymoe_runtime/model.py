"""A bundle loaded inside a memory budget: the language model that is generated from."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dymoe_runtime import cost, kernels
from dymoe_runtime.budget import CHUNK, Budget, check_budget, plan_budget
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.cost import CostModel
from dymoe_runtime.decoder import Decoder
from dymoe_runtime.dense import BundleDense
from dymoe_runtime.device import (
    cgroup_limits,
    default_threads,
    format_size,
    peak_resident_bytes,
    return_large_blocks,
)
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.experts import StoredExperts
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.look_ahead import LookAhead, ranks_worth_reading, read_predictors
from dymoe_runtime.options import RunOptions, choose_rule
from dymoe_runtime.pace import Pace
from dymoe_runtime.policy import OperatingPoint, TierRule
from dymoe_runtime.reader import RecordReader
from dymoe_runtime.room import Room
from dymoe_runtime.run_stats import RunStats
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.store import ExpertStore
from dymoe_runtime.trace import Decisions, Tracer, read_trace
from dymoe_runtime.trial import Trial
from dymoe_runtime.warm_up import (
    expected_uses,
    make_eviction,
    preload_order,
    read_warm_set,
    write_warm_set,
)

if TYPE_CHECKING:
    from dymoe_runtime.step import DecodeStep


class Model:
    """A language model out of a bundle. Use as a context manager: it owns threads and files."""

    def __init__(self, bundle: Bundle, options: RunOptions | None = None, window: int | None = None) -> None:
        """Load `bundle`; with `window` to score texts of so many tokens at once, by `hidden` alone."""
        options = options or RunOptions()
        kernels.set_threads(options.threads or default_threads())
        if options.pin_threads and not kernels.pin_threads():
            raise DymoeError("--pin-threads needs Linux and the compiled kernels; leave it out")
        if kernels.isa() == kernels.REFERENCE:
            return_large_blocks()
        self.bundle = bundle
        self.spec = bundle.spec
        self.max_context = min(options.context or bundle.spec.max_context, bundle.spec.max_context)
        self._decisions: Decisions | None = None
        if options.decisions is not None:  # before memory is divided, of which it takes some
            self._decisions = Decisions(read_trace(options.decisions, bundle), str(options.decisions))
        memory, beside = options.memory_bytes, options.beside_bytes
        budget = plan_budget(bundle, self.max_context, memory, beside, window=window, kv_bits=options.kv_bits)
        if options.arena_bytes is None:
            check_budget(budget)
        if options.memory_bytes is not None and options.memory_bytes > (
            most := min(cgroup_limits(), default=sys.maxsize)
        ):
            raise DymoeError(
                f"--memory {format_size(options.memory_bytes)} is more than the {format_size(most)} that this process "
                "may have by its cgroup; give less, or raise the limit"
            )
        self.point, self.rule = choose_rule(bundle, options, budget)
        self.stats = RunStats()
        if options.arena_bytes is not None:
            budget = budget.with_arena(options.arena_bytes)
        self._trial = Trial()  # of looking ahead
        self._warm_set = options.warm_set
        known = None if options.warm_set is None else read_warm_set(options.warm_set, bundle)
        self._expected = expected_uses(bundle) if known is None else known
        self._pace: Pace | None = None
        self._paced: tuple[OperatingPoint, ...] = ()
        self._parts = ExitStack()  # threads and files, closed with the model
        try:
            self._open_store(options, budget)
            self._load(options)
            self._cache = KVCache(bundle.spec, window or self.max_context, options.kv_bits, one_layer=bool(window))
        except BaseException:
            self.close()
            raise

    def _open_store(self, options: RunOptions, budget: Budget) -> None:
        """The experts, none of which is in memory yet."""
        bundle, parts = self.bundle, self._parts
        self.reader = parts.enter_context(closing(RecordReader(bundle)))
        self._eviction = make_eviction(bundle, options.fade, options.eviction, self._expected)
        self.store = ExpertStore(
            bundle.layout,
            (bundle.spec.num_layers, bundle.spec.num_experts),
            self.reader,
            budget.arena,
            self._eviction,
            len(bundle.manifest.layers) * bundle.spec.num_experts,
            partial(kernels.prepare_at, bundle.layout),
            options.overlap,
        )
        parts.pop_all()
        parts.callback(self._close_store)
        self._room = Room(budget, self.store, heeds_limit=options.arena_bytes is None)
        self.experts = StoredExperts(self.store, self.rule, bundle.spec.activation)
        self.experts.latency = options.latency
        if self._decisions is not None:
            self.experts.decided = self._decisions.tiers
        if options.look_ahead and not self.store.roomy and kernels.isa() != kernels.REFERENCE:
            self.experts.cost = self.measure_cost((1,), cost.QUICK_SWEEP_BYTES)
        self._tracer = None if options.trace is None else Tracer(options.trace, self.store)
        if self._tracer is not None:
            parts.callback(self._tracer.close)

    def _close_store(self) -> None:
        if self.store.close():  # else a thread still reads
            self.reader.close()

    def _load(self, options: RunOptions) -> None:
        """Everything but the experts, and these meanwhile."""
        bundle = self.bundle
        if options.preload:
            self.preload()
        dense = BundleDense(bundle)
        self._locked_bytes = dense.lock()
        step = _step(bundle.spec, dense)
        if step is not None and self._tracer is None:
            from dymoe_runtime.at_hand import AtHand  # needs the compiled kernels to be there

            step.direct = AtHand(bundle.spec, self.experts)
        experts = self.experts if self._tracer is None else self._tracer.around(self.experts)
        self.decoder = Decoder(bundle.spec, dense, self._room.heeding(experts), step)
        if options.look_ahead:
            predictors = read_predictors(bundle)
            if step is not None:
                for layer, predictor in predictors.items():
                    step.correct(layer, predictor)

            def guess(layer: int, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                return self.decoder.look_ahead(layer, residual, predictors.get(layer))

            self.experts.look_ahead = LookAhead(guess, ranks_worth_reading(bundle), 2 * bundle.spec.top_k)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._parts.close()

    def remember(self) -> None:
        """Write the warm set, if there is to be one and what is used was counted: not where everything fits."""
        if self._warm_set is not None and not self.store.roomy:
            write_warm_set(self._warm_set, self._eviction.rates())

    @property
    def budget(self) -> Budget:
        """How the process's memory is divided."""
        return self._room.budget

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._cache.length

    def measure_cost(self, counts: Sequence[int] = cost.COUNTS, sweep_bytes: int = cost.SWEEP_BYTES) -> CostModel:
        """What a layer's experts cost, measured in the arena; before anything is read into it."""
        experts = len(self.bundle.manifest.layers) * self.spec.num_experts
        layout, spec = self.bundle.layout, self.spec
        return cost.measure(
            layout, spec.top_k, experts, self.store.scratch(), spec.activation, counts, sweep_bytes=sweep_bytes
        )

    def hold_pace(self, points: Sequence[OperatingPoint], start: int, target_s: float) -> None:
        """Run one of `points`, by rising time, as the clock of decoded tokens says; first that with index `start`."""
        self._paced, self._pace = tuple(points), Pace(len(points), start, target_s)
        self._run_point(self._paced[start])

    def _run_point(self, point: OperatingPoint) -> None:
        self.point, self.rule = point.name, TierRule.of(point, self.bundle.policy)
        self.experts.rule = self.rule
        self._trial.changed()

    def _prompt_bytes(self) -> int:
        """Of the experts that a long prompt uses, about all at the highest tier that it may choose."""
        layout, experts = self.bundle.layout, self.spec.num_experts
        tiers = [self.rule.highest[layer] for layer in self.spec.moe_layers]
        return experts * sum(sum(layout.segment_spans[: layout.segments_of(tier)]) for tier in tiers)

    def _follow_decisions(self, tokens: int, prompt: bool) -> None:
        if self._decisions is None:
            return
        name = self._decisions.begin(tokens, prompt)
        if name != self.point:
            points = {point.name: point for point in self.bundle.policy.points}
            point = points.get(name)
            if point is None or self.point not in points:
                raise DymoeError(f"--decisions: the trace was made at {name}, this is {self.point}; give the same")
            self._run_point(point)

    def preload(self) -> None:
        """Start to read the experts that will be used most, as many as fit; once nothing is measured any more."""
        bits = next((p.bits_mean for p in self.bundle.policy.points if p.name == self.point), max(self.rule.highest))
        room = self.budget.arena - self.budget.lent(CHUNK)
        self.store.preload(preload_order(self.bundle, self._expected, bits, room))

    def reset(self, position: int = 0) -> None:
        """Forget the tokens from `position` on."""
        self._cache.length = max(0, min(position, self._cache.length))

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Append a prompt in chunks; logits of its last token, float32 [vocab]."""
        self._check(ids)
        started = time.perf_counter()
        self.experts.looks_ahead = True
        try:
            x = self._pass_by_pass(ids)
            logits = self.decoder.logits(x)[0]
        finally:
            self._room.take_back()
        self.stats.prefill.took(len(ids), time.perf_counter() - started)
        return logits

    def _pass_by_pass(self, ids: Sequence[int]) -> np.ndarray:
        """The last hidden state [1, H] of a prompt."""
        x = np.empty((0, 0), np.float32)
        left = list(ids)
        while left:
            self._room.heed_limit()
            tokens = self._room.make_for_pass(len(left), self._prompt_bytes())
            part, left, begun = np.array(left[:tokens]), left[tokens:], time.perf_counter()
            self._follow_decisions(tokens, prompt=True)
            x = self.decoder.forward(part, self._cache, self.rule.weighs_tokens, CHUNK)[-1:].copy()
            self.store.tick(tokens)
            if self._tracer is not None:
                self._tracer.passed(tokens, time.perf_counter() - begun, self.point, prompt=True)
        return x

    def hidden(self, ids: np.ndarray, weigh_tokens: bool = False) -> np.ndarray:
        """Hidden states [T, H] of a window of tokens [T], as one chunk of a prompt that starts anew."""
        self._cache.length = 0
        return self.decoder.forward(ids, self._cache, weigh_tokens)

    def decode(self, token_id: int) -> np.ndarray:
        """Append one token; logits of the next, float32 [vocab]."""
        self._check([token_id])
        started = time.perf_counter()
        self._room.heed_limit()
        self.experts.looks_ahead = self._trial.on
        self._follow_decisions(1, prompt=False)
        x = self.decoder.forward(np.array([token_id]), self._cache)
        self.store.tick()
        logits = self.decoder.logits(x)[0]
        seconds = time.perf_counter() - started
        self._trial.took(seconds)
        if self._tracer is not None:
            self._tracer.passed(1, seconds, self.point, prompt=False)
        if self._pace is not None and self._pace.took(seconds):
            self._run_point(self._paced[self._pace.index])
        self.stats.decode.took(1, seconds)
        return logits

    def _check(self, ids: Sequence[int]) -> None:
        """DymoeError where `ids` do not fit the context or the vocabulary."""
        check_ids(ids, self.spec)
        if self.position + len(ids) > self.max_context:
            raise DymoeError(
                f"{self.position + len(ids)} tokens do not fit a context of {self.max_context}; "
                "give fewer, or a larger --context if the model has it"
            )

    def reset_stats(self) -> None:
        self.stats = RunStats()
        self.store.reset_stats()
        if self._tracer is not None:
            self._tracer.stats_were_reset()
        self.experts.stats.used.clear()

    def statistics(self) -> dict[str, Any]:
        """What the run cost so far; the keys are a contract."""
        return {
            "point": self.point,
            "bits_mean": self.experts.stats.bits_mean,
            "tier_shares": self.experts.stats.shares(),
            **self.stats.to_json(self.store.stats),
            "arena_bytes": self.store.arena_bytes,
            "resident_bytes": self.store.resident_bytes(),
            "locked_bytes": self._locked_bytes,
            "floor_bytes": self.budget.floor,
            "memory_bytes": self.budget.memory,
            "peak_rss_bytes": peak_resident_bytes(),
            "kernels": kernels.isa(),
        }


def check_ids(ids: Sequence[int], spec: ModelSpec) -> None:
    """DymoeError where the tokenizer gives a token that the model does not know."""
    if ids and max(ids) >= spec.vocab_size:
        raise DymoeError(
            f"tokenizer.json: gives token {max(ids)}, the model knows {spec.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


def _step(spec: ModelSpec, dense: BundleDense) -> DecodeStep | None:
    """The compiled step, where there are compiled kernels."""
    if kernels.isa() == kernels.REFERENCE:
        return None
    from dymoe_runtime.step import DecodeStep  # needs the compiled kernels to be there

    return DecodeStep.make(spec, dense, kernels.isa())
