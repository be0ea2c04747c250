"""Construction of a model from a bundle, bottom-up: each part gets its dependencies when it is made."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dymoe_runtime.access import Access
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.records import read_predictors
from dymoe_runtime.engine import cost
from dymoe_runtime.engine.arena_sizing import ArenaSizer, LimitedExperts
from dymoe_runtime.engine.budget import Budget
from dymoe_runtime.engine.control import Control, Interruption
from dymoe_runtime.engine.cost import CostModel
from dymoe_runtime.engine.experts import DirectUse, ResidentTable, StoredExperts
from dymoe_runtime.engine.memory_plan import check_memory, plan_budget
from dymoe_runtime.engine.model import Model, ModelParts, Scorer, preload_requests
from dymoe_runtime.engine.options import RunOptions
from dymoe_runtime.engine.precision import LatencyTiers, Precision, RuleTiers, TokenTiers, choose_precision
from dymoe_runtime.engine.prefetch import Guess, Prefetcher, ranks_worth_reading
from dymoe_runtime.engine.trace import Decisions, TracedExperts, Tracer, read_trace
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.kernels.prepared import PreparedExpert
from dymoe_runtime.model.decode_step import CompiledLayers, DecodeStep
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.router import Routers
from dymoe_runtime.model.routing import Experts
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.model.weights import BundleDense
from dymoe_runtime.process import resident_bytes, return_large_blocks
from dymoe_runtime.store.record_reader import RecordReader
from dymoe_runtime.store.store import ExpertStore
from dymoe_runtime.store.warm_up import WarmUp

# Tokens of context if none are given.
DEFAULT_CONTEXT = 4096


def load_model(
    bundle: Bundle | str | os.PathLike[str], options: RunOptions | None = None, kernels: Kernels | None = None
) -> Model:
    """Load a bundle, or the bundle at a path, inside a memory budget.

    Use the model as a context manager, or close it, because it owns threads and files. By default `kernels` come from
    `load_kernels`.

    Returns the model, with an empty sequence and room for `options.context` tokens.

    Raises DymoeError if the bundle is damaged, the options do not fit it, or the memory is too little.

    >>> with load_model("build/demo.dymoe", RunOptions(tier=4, context=64)) as model:
    ...     logits = model.prefill([1, 2, 3])  # float32 [vocab]
    ...     logits = model.decode(int(logits.argmax()))
    ...     model.position, logits.shape == (model.spec.vocab_size,)
    (4, True)
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    loader = Loader(opened, options or RunOptions(), kernels)
    with ExitStack() as stack:  # the model takes over the resources on it
        return Model(loader.parts(stack))


def load_scorer(
    bundle: Bundle | str | os.PathLike[str],
    options: RunOptions | None = None,
    window: int | None = None,
    kernels: Kernels | None = None,
) -> Scorer:
    """Load a bundle, or the bundle at a path, to score texts in windows of at most `window` tokens.

    `window` is by default the context of the options, as `load_model` takes it. Use the scorer as a context manager,
    or close it. Raises DymoeError as `load_model` does, and for a window of another length than 1 to the model's
    context.

    >>> with load_scorer("build/demo.dymoe", RunOptions(tier=4), window=64) as scorer:
    ...     logits = scorer.logits(scorer.hidden([1, 2, 3]))  # float32 [3, vocab]
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    options = options or RunOptions()
    loader = Loader(opened, options, kernels, _context_of(opened, options) if window is None else window)
    with ExitStack() as stack:
        return loader.scorer(stack)


@dataclass(frozen=True, eq=False)
class _Experts:
    """The routed experts of a model, and the parts that serve them."""

    stored: StoredExperts
    seen: Experts  # what the decoder calls: `stored` with tracing and checks of the memory limit
    prefetcher: Prefetcher | None
    token_tiers: TokenTiers


class Loader:
    """The steps of loading, in their order: memory is divided before any part allocates some."""

    def __init__(
        self,
        bundle: Bundle,
        options: RunOptions,
        kernels: Kernels | None = None,
        window: int | None = None,
        sequences: int | None = None,
    ) -> None:
        self._bundle, self._options, self._window, self._sequences = bundle, options, window, sequences
        self._kernels = kernels or load_kernels(threads=options.threads)
        if options.pin_threads and not self._kernels.pin_threads():
            raise DymoeError("--pin-threads needs Linux and the compiled kernels; leave it out")
        if self._kernels.frees_large_blocks:
            return_large_blocks()
        self._context = _context_of(bundle, options)
        if window is not None and not 1 <= window <= bundle.spec.max_context:
            raise DymoeError(
                f"a window of {window} tokens: expected 1 to the model's context, {bundle.spec.max_context}"
            )
        self._decisions = _read_decisions(bundle, options)  # read before _plan, which counts the memory in use
        self._budget = self._plan()
        choice = choose_precision(bundle, options, self._budget.arena_bytes)
        self._note = choice.note
        self._precision = Precision(choice.name, choice.rule, is_requested=options.point != "auto")
        self._warm_up = WarmUp(bundle, options.warm_set)
        self._interruption = Interruption()
        self._resources = ExitStack()
        self._access = Access("model" if window is None else "scorer", self._resources.close)
        self._control = Control(self._precision, bundle.policy, self._decisions)

    def parts(self, stack: ExitStack) -> ModelParts:
        """Build the parts of a model that generates text; their resources go onto `stack`."""
        options = self._options
        reader = RecordReader(self._bundle)
        table = self._resident_table()
        store = self._store(reader, table)
        stack.callback(_close, store, reader)
        cost_model = self._measure_cost(store)
        tracer = None if options.trace is None else Tracer(options.trace, store, self._budget)
        if tracer is not None:
            stack.callback(tracer.close)
        sizer = ArenaSizer(
            self._budget, store, self._kernels.batch_invariant, follows_limit=options.arena_bytes is None
        )
        if options.preload:
            store.preload(preload_requests(self._bundle, self._warm_up, self._precision, self._budget))
        dense = BundleDense(self._bundle, self._kernels)
        locked_bytes = dense.lock()
        predictors = read_predictors(self._bundle) if options.prefetch else {}
        layers = CompiledLayers.make(self._bundle.spec, dense, self._kernels, predictors)
        guess = self._guess(layers, dense, predictors)
        experts = self._experts(store, guess, cost_model, tracer, sizer)
        step = None
        if layers is not None:
            direct = None
            if table is not None and tracer is None:
                prefetches = experts.prefetcher.has_work if experts.prefetcher else lambda: False
                direct = DirectUse(table, self._precision, experts.token_tiers, prefetches, experts.stored.note_direct)
            step = DecodeStep(self._bundle.spec, layers, direct)
        sequences = range(self._sequences or 1)
        states = tuple(SequenceState(self._bundle.spec, self._context, options.kv_bits) for _ in sequences)
        parts = ModelParts(
            bundle=self._bundle,
            kernels=self._kernels,
            context=self._context,
            kv_bits=options.kv_bits,
            precision=self._precision,
            note=self._note,
            control=self._control,
            interruption=self._interruption,
            access=self._access,
            reader=reader,
            store=store,
            sizer=sizer,
            tracer=tracer,
            warm_up=self._warm_up,
            counts=experts.stored.counts,
            dense=dense,
            layers=layers,
            decoder=Decoder(self._bundle.spec, dense, experts.seen, self._kernels, step),
            states=states,
            locked_bytes=locked_bytes,
        )
        self._resources.enter_context(stack.pop_all())
        return parts

    def scorer(self, stack: ExitStack) -> Scorer:
        """Build a scorer of whole windows; its resources go onto `stack`."""
        assert self._window is not None
        spec, reader = self._bundle.spec, RecordReader(self._bundle)
        store = self._store(reader, None)
        stack.callback(_close, store, reader)
        dense = BundleDense(self._bundle, self._kernels)
        predictors = read_predictors(self._bundle) if self._options.prefetch else {}
        guess = self._guess(None, dense, predictors)
        sizer = ArenaSizer(self._budget, store, self._kernels.batch_invariant, follows_limit=True)
        experts = self._experts(store, guess, None, None, sizer)
        decoder = Decoder(spec, dense, experts.seen, self._kernels)
        state = SequenceState(spec, self._window, self._options.kv_bits, shared=True)
        counts = experts.stored.counts
        self._resources.enter_context(stack.pop_all())
        return Scorer(self._bundle, self._precision, counts, decoder, state, self._budget, self._access)

    def _plan(self) -> Budget:
        options = self._options
        if options.memory_bytes is not None:
            check_memory(options.memory_bytes)
        budget = plan_budget(
            self._bundle,
            self._kernels,
            self._context,
            options.memory_bytes,
            options.uncounted_bytes if options.count_program else resident_bytes(),
            window=self._window,
            kv_bits=options.kv_bits,
            sequences=self._sequences,
        )
        if options.arena_bytes is not None:
            return budget.with_arena(options.arena_bytes)
        budget.check()
        return budget

    def _resident_table(self) -> ResidentTable | None:
        spec = self._bundle.spec
        native = self._kernels.resident_table(spec.num_layers, spec.num_experts, self._bundle.layout.ladder)
        return None if native is None else ResidentTable(native)

    def _store(self, reader: RecordReader, table: ResidentTable | None) -> ExpertStore[PreparedExpert]:
        bundle, options = self._bundle, self._options
        try:
            return ExpertStore(
                bundle.layout,
                (bundle.spec.num_layers, bundle.spec.num_experts),
                reader,
                self._budget.arena_bytes,
                partial(self._kernels.prepare_at, bundle.layout),
                self._warm_up.eviction(options.decay, options.eviction),
                bundle.spec.total_experts,
                table,
                self._kernels.reads,
                options.overlap,
            )
        except BaseException:
            reader.close()
            raise

    def _measure_cost(self, store: ExpertStore[PreparedExpert]) -> CostModel | None:
        """Return the measured cost that limits prefetching, or None if it is not needed or slow to measure."""
        if not self._options.prefetch or store.all_fit or not self._kernels.timed_at_start:
            return None
        return cost.measure_for(self._bundle, self._kernels, store.empty_memory, (1,), cost.QUICK_SWEEP_BYTES)

    def _guess(
        self, layers: CompiledLayers | None, dense: BundleDense, predictors: dict[int, np.ndarray]
    ) -> Guess | None:
        """Return the function that asks a layer's router early, or None without prefetching."""
        if not self._options.prefetch:
            return None
        routers = Routers(self._bundle.spec, dense, self._kernels)

        def guess(layer: int, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if layers is not None and len(residual) == 1 and layers.knows(layer):
                return layers.guess(layer, residual)
            return routers.guess(layer, residual, predictors.get(layer))

        return guess

    def _experts(
        self,
        store: ExpertStore[PreparedExpert],
        guess: Guess | None,
        cost_model: CostModel | None,
        tracer: Tracer | None,
        sizer: ArenaSizer,
    ) -> _Experts:
        spec, prefetcher = self._bundle.spec, None
        if guess is not None:
            ranks, width = ranks_worth_reading(self._bundle), 2 * spec.top_k
            enabled = self._control.prefetching
            prefetcher = Prefetcher(store, self._precision, guess, ranks, width, enabled, cost_model)
        tiers = self._token_tiers(store)
        observer = None if tracer is None else tracer.note_requests
        stored = StoredExperts(store, self._kernels, spec.activation, self._precision, tiers, prefetcher, observer)
        traced = stored if tracer is None else TracedExperts(stored, tracer)
        return _Experts(stored, LimitedExperts(traced, sizer, self._check_going_on), prefetcher, tiers)

    def _check_going_on(self) -> None:
        """Raise what is to end the pass that runs."""
        self._access.check()
        self._interruption.check()

    def _token_tiers(self, store: ExpertStore[PreparedExpert]) -> TokenTiers:
        if self._decisions is not None:
            return self._decisions
        waits = not self._options.latency or self._window is not None
        return RuleTiers(self._precision) if waits else LatencyTiers(self._precision, store)


def _context_of(bundle: Bundle, options: RunOptions) -> int:
    """Return the context in tokens; raise DymoeError if it is longer than the model's."""
    longest = bundle.spec.max_context
    if options.context is None:
        return min(longest, DEFAULT_CONTEXT)
    if options.context > longest:
        raise DymoeError(f"--context {options.context}: the model's context is {longest}; give at most that")
    return options.context


def _read_decisions(bundle: Bundle, options: RunOptions) -> Decisions | None:
    path = options.decisions
    return None if path is None else Decisions(read_trace(path, bundle), str(path))


def _close(store: ExpertStore[PreparedExpert], reader: RecordReader) -> None:
    if store.close():  # otherwise a thread still reads from its file
        reader.close()
