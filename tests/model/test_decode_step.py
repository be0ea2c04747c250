"""One token through the layers in compiled code equals the decoder's own mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle

import numpy as np
import pytest
from kernel_kit import COMPILED, kernels_of, random_input, reference
from layer_kit import ATTENTION, DELTA, MODELS, RandomDense, random_expert

from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.kernels.prepared import DecodeWeights, DeltaArrays, PreparedExpert
from dymoe_runtime.memory import address_of
from dymoe_runtime.model.decode_step import CompiledLayers, DecodeStep, DirectExperts, decode_weights
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.mixers.gated_delta import DeltaState
from dymoe_runtime.model.mixers.gqa import AttentionState
from dymoe_runtime.model.rope import rotary
from dymoe_runtime.model.routing import NoExperts, PromptRouting, Routing, in_groups
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import KV_BITS, LayerSpec, ModelSpec

pytestmark = pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")

every_isa = pytest.mark.parametrize("isa", COMPILED)
every_model = pytest.mark.parametrize("name", MODELS)


class Toy:
    """A random model whose dense matrices are quantized, as compiled code and as the decoder run it."""

    def __init__(self, isa: str, spec: ModelSpec) -> None:
        self.spec, self.kernels = spec, kernels_of(isa)
        self.dense = RandomDense(spec, self.kernels)
        # What the decoder does beside products of records is the reference's.
        self.decoder = Decoder(spec, self.dense, NoExperts(), reference)

    def layers(self, predictors: dict[int, np.ndarray] | None = None) -> CompiledLayers:
        layers = CompiledLayers.make(self.spec, self.dense, self.kernels, predictors)
        assert layers is not None
        return layers

    def step(self, direct: DirectExperts | None = None) -> DecodeStep:
        return DecodeStep(self.spec, self.layers(), direct)

    def state(self, capacity: int, kv_bits: int = 16) -> SequenceState:
        return SequenceState(self.spec, capacity, kv_bits)

    def weights(self) -> list[DecodeWeights | None]:
        return [decode_weights(self.spec, self.dense, layer) for layer in range(self.spec.num_layers)]


@cache
def toy(isa: str, name: str) -> Toy:
    return Toy(isa, MODELS[name])


@every_model
def test_compiled_code_knows_each_layer(name: str) -> None:
    made = toy(COMPILED[0], name)
    layers = made.layers()
    assert None not in made.weights()
    assert [layers.knows(layer) for layer in range(made.spec.num_layers)] == [
        made.spec.is_moe(layer) for layer in range(made.spec.num_layers)
    ]


def run_reference(
    decoder: Decoder, layer: int, x: np.ndarray, more: np.ndarray | None, state: SequenceState
) -> tuple[int, np.ndarray, np.ndarray]:
    """What `DecodeStep.run` does without experts: up to the router of a layer, or through the last layer.

    Returns the layer, the residual stream after its mixer, and the one that its router reads.
    """
    if more is not None:
        x = decoder.finish(layer - 1, x, more)
    read = x
    while layer < decoder.spec.num_layers:
        entered = x
        x, _ = decoder.mix(layer, x, state, state.length)
        read = decoder.read(layer, x, entered)
        if decoder.spec.is_moe(layer):
            break
        x = decoder.feed_forward(layer, x, read)
        layer += 1
    return layer, x, read


def arrays_of(state: SequenceState, layer: int) -> Sequence[np.ndarray]:
    """The state of a layer: keys and values, or the arrays of a delta rule."""
    of_layer = state.layers[layer]
    if isinstance(of_layer, DeltaState):
        return of_layer.arrays
    assert isinstance(of_layer, AttentionState)
    return of_layer.cache.read(state.length)


@every_isa
@pytest.mark.parametrize(
    ("name", "bits"), [*zip(MODELS, cycle(KV_BITS), strict=False), *(("plain", bits) for bits in KV_BITS[1:])]
)
def test_a_step_equals_the_decoder(isa: str, name: str, bits: int) -> None:
    """Layer by layer from the same input, over a context longer than the windows and chunks."""
    made = toy(isa, name)
    spec, decoder, step = made.spec, made.decoder, made.step()
    states = made.state(20, bits), made.state(20, bits)
    g = np.random.default_rng(3)
    for _ in range(17):
        for layer in range(spec.num_layers + 1):
            x, output = g.standard_normal((2, 1, spec.hidden_size), np.float32)
            more = output if layer and spec.is_moe(layer - 1) else None
            if layer == spec.num_layers and more is None:
                continue
            expected_layer, expected, read = run_reference(decoder, layer, x, more, states[0])
            reached, got, attended, asked = step.run(layer, x, more, states[1:])
            assert reached == expected_layer and attended
            # An activation on the edge between two int8 codes may fall to either side.
            assert np.abs(got - expected).max() <= 1e-2 * np.abs(expected - x).max()
            assert (asked is not None) == (reached < spec.num_layers)
            if asked is not None:
                after = decoder.spec.layers[reached]
                check_route(asked, decoder, reached, read if after.parallel else got)
                assert asked[1].residual is got
        for state in states:
            state.advance(1)
    for layer in range(spec.num_layers):
        for expected, got in zip(arrays_of(states[0], layer), arrays_of(states[1], layer), strict=True):
            assert got.dtype == expected.dtype
            assert np.allclose(got, expected, rtol=2e-2, atol=2e-2 * max(1, np.abs(expected).max()))


def check_route(got: tuple[np.ndarray, Routing], decoder: Decoder, layer: int, x: np.ndarray) -> None:
    h, routing = got
    expected, experts, weights = decoder.routers.route_residual(layer, x)
    assert (h.dtype, routing.weights.dtype, routing.experts.dtype) == (expected.dtype, weights.dtype, experts.dtype)
    assert np.allclose(h, expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(routing.weights, weights, rtol=1e-4, atol=1e-6)
    assert np.array_equal(routing.experts, experts)
    assert routing.of_token() == (routing.experts[0].tolist(), routing.weights[0].tolist())


@every_isa
@every_model
def test_a_guess_equals_the_decoder(isa: str, name: str) -> None:
    """With a predictor and without, and without touching what the step has returned."""
    made = toy(isa, name)
    spec, g = made.spec, np.random.default_rng(5)
    last = spec.moe_layers[-1]
    predictor = 0.3 * g.standard_normal((spec.num_experts, spec.hidden_size + 1), np.float32)
    layers = made.layers({last: predictor})
    step = DecodeStep(spec, layers)
    for _ in range(5):
        _, x, _, asked = step.run(0, g.standard_normal((1, spec.hidden_size), np.float32), None, [made.state(4)])
        assert asked is not None
        h, routing = asked
        before = h.copy(), routing.experts.copy()
        for layer in spec.moe_layers:
            experts, weights = layers.guess(layer, x)
            correction = predictor if layer == last else None
            expected, expected_weights = made.decoder.routers.guess(layer, x, correction)
            assert (experts.dtype, weights.dtype) == (expected.dtype, expected_weights.dtype)
            assert np.array_equal(experts, expected)
            assert np.allclose(weights, expected_weights, rtol=1e-4, atol=1e-6)
        assert np.array_equal(h, before[0]) and np.array_equal(routing.experts, before[1])


@every_isa
def test_a_step_turns_by_the_context_of_its_sequence(isa: str) -> None:
    """At the same positions of sequences that may become 12 tokens long, then longer, then 12 again."""
    made = toy(isa, "layer norm")
    step, (x,) = made.step(), random_input(1, 1, made.spec.hidden_size)
    keys = []
    for capacity in (12, 13, 12):
        states = made.state(capacity, 32), made.state(capacity, 32)
        for _ in range(2):
            made.decoder.mix(0, x, states[0], states[0].length)
            step.run(0, x, None, states[1:])
            for state in states:
                state.advance(1)
        expected, got = (arrays_of(state, 0)[0] for state in states)
        assert np.allclose(got, expected, rtol=2e-2, atol=2e-2)
        keys.append(got)
    assert np.array_equal(keys[0], keys[2]) and np.abs(keys[0] - keys[1]).max() > 0.1


class Resident:
    """Random quantized experts in a table, all but those of `missing`, (layer, expert); tier 4, then 2, then none.

    Asked for experts it runs the same ones, and notes of which layers.
    """

    def __init__(self, made: Toy, missing: Sequence[tuple[int, int]] = ()) -> None:
        spec, self._toy = made.spec, made
        self._experts: dict[tuple[int, int], PreparedExpert] = {}
        table = None
        for expert in range(spec.num_experts):
            layout, segments = random_expert(spec, (2, 4), expert)
            table = table or made.kernels.resident_table(spec.num_layers, spec.num_experts, layout.ladder)
            for tier in layout.ladder:
                self._experts[expert, tier] = made.kernels.prepare(layout, tier, segments[: layout.segments_of(tier)])
        assert table is not None
        self._table = table
        for layer in spec.moe_layers:
            self._table.set_rule(layer, [0.5, 0.9], [])
            for (expert, tier), prepared in self._experts.items():
                if (layer, expert) not in missing:
                    self._table.put(layer, expert, tier, prepared.views)
        self.uses: list[tuple[int, Sequence[int], Sequence[int]]] = []
        self.asked: list[int] = []

    def table(self) -> object:
        return self._table

    def used(self, uses: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> None:
        self.uses.extend(uses)

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        self.asked.append(layer)
        rows = zip(in_groups(h, 1), routing.experts.tolist(), in_groups(routing.weights, 1), strict=True)
        return np.concatenate([self._decode(layer, *row) for row in rows])

    def _decode(self, layer: int, h: np.ndarray, experts: list[int], weights: np.ndarray) -> np.ndarray:
        tiers = self._table.choose_tiers(layer, experts, weights[0].tolist())
        self.uses.append((layer, experts, tiers))
        kept = [rank for rank, tier in enumerate(tiers) if tier]
        prepared = [self._experts[experts[rank], tiers[rank]] for rank in kept]
        return self._toy.kernels.moe_token(prepared, h, weights[:, kept], self._toy.spec.activation)

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        raise AssertionError("a prompt")


@every_isa
@every_model
def test_decoding_by_steps_equals_the_decoder(isa: str, name: str) -> None:
    """A prompt by the decoder, then tokens by steps, also after the sequence has lost tokens."""
    made = toy(isa, name)
    ids = np.random.default_rng(2).integers(0, 97, 24)
    logits = []
    for step in (None, made.step()):
        decoder, state = Decoder(made.spec, made.dense, Resident(made), made.kernels, step), made.state(24)
        run = decode_with(decoder, state)
        found = [run(ids[:9], prompt=True), run(ids[9:13])]
        snapshot = state.snapshot()
        run(ids[20:24])
        state.rollback(snapshot)
        found.append(run(ids[13:17]))
        kept = state.truncate(11)
        assert kept in (0, 11)
        found.append(run(ids[kept:20]))
        assert state.length == 20
        logits.append(np.concatenate(found))
    assert np.abs(logits[0] - logits[1]).max() <= 2e-2 * np.abs(logits[0]).max()


def decode_with(decoder: Decoder, state: SequenceState) -> Callable[..., np.ndarray]:
    """A function that returns the logits of ids: of a prompt at once, or of one token after another."""

    def run(ids: np.ndarray, prompt: bool = False) -> np.ndarray:
        pieces = [ids] if prompt else in_groups(ids, 1)
        return np.concatenate([decoder.logits(decoder.forward(piece, state)) for piece in pieces])

    return run


@every_isa
def test_what_is_not_finite_stays_so(isa: str) -> None:
    made = toy(isa, "plain")
    x = np.ones((1, made.spec.hidden_size), np.float32)
    x[0, 3] = float("nan")
    _, y, _, asked = made.step().run(0, x, None, [made.state(4)])
    assert np.isnan(y).all() and asked is not None
    h, routing = asked
    assert np.isnan(h).all() and np.isnan(routing.weights).all()
    assert set(routing.experts[0].tolist()) <= set(range(made.spec.num_experts))


@every_isa
@every_model
def test_resident_experts_give_the_same_bits_as_experts_that_are_asked_for(isa: str, name: str) -> None:
    """And the same experts and tiers are noted; where one is not resident, its layer's are asked for."""
    made = toy(isa, name)
    ids = np.random.default_rng(4).integers(0, 97, 12)
    moe_layers = made.spec.moe_layers

    def decode(experts: Resident, direct: Resident | None) -> np.ndarray:
        decoder = Decoder(made.spec, made.dense, experts, made.kernels, made.step(direct))
        return decode_with(decoder, made.state(12))(ids)

    asked = Resident(made)
    expected = decode(asked, None)
    assert np.isfinite(expected).all() and asked.asked == 12 * list(moe_layers)
    assert len({tier for _, _, tiers in asked.uses for tier in tiers}) > 1 or made.spec.top_k == 1
    whole = Resident(made)
    assert np.array_equal(decode(whole, whole), expected)
    assert whole.asked == [] and whole.uses == asked.uses
    missing = Resident(made, [(moe_layers[-1], expert) for expert in range(0, made.spec.num_experts, 2)])
    assert np.array_equal(decode(missing, missing), expected)
    assert set(missing.asked) == {moe_layers[-1]} and missing.uses == asked.uses


@every_isa
@every_model
def test_sequences_together_give_the_bits_of_each_alone(isa: str, name: str) -> None:
    """With experts that are asked for, resident, and partly missing; sequences of other lengths join and leave."""
    made = toy(isa, name)
    g = np.random.default_rng(6)
    ids = g.integers(0, 97, (3, 9))
    starts = (1, 2, 4)  # tokens that a sequence has before it joins
    bits: list[np.ndarray] = []
    for missing in (None, (), [(made.spec.moe_layers[-1], expert) for expert in range(0, made.spec.num_experts, 3)]):
        experts = Resident(made, missing or ())
        decoder = Decoder(made.spec, made.dense, experts, made.kernels, made.step(None if missing is None else experts))
        alone = np.stack([decode_with(decoder, made.state(9))(row) for row in ids])
        states = tuple(made.state(capacity) for capacity in (9, 16, 30))
        if name == "layer norm":  # the context changes its rotations
            states = tuple(made.state(9) for _ in ids)
        for row, state, start in zip(ids, states, starts, strict=True):
            decode_with(decoder, state)(row[:start])
        for _ in range(4):
            joined = tuple(state for state in states if state.length < 7)
            now = [(n, state.length) for n, state in enumerate(states) if state.length < 7]
            hidden = decoder.decode_each(np.array([ids[n, at] for n, at in now]), joined)
            for (n, at), logits in zip(now, decoder.logits(hidden), strict=True):
                assert np.array_equal(logits, alone[n, at])
        assert [state.length for state in states] == [5, 6, 7]
        bits.append(alone)
    assert np.array_equal(bits[0], bits[1]) and np.array_equal(bits[0], bits[2])


class Partly(RandomDense):
    """Dense weights of which those whose names begin with `unquantized` are not quantized."""

    unquantized: tuple[str, ...] = ()

    def record(self, name: str) -> tuple[RecordLayout, np.ndarray] | None:
        return None if name.startswith(self.unquantized) else super().record(name)


@every_isa
@pytest.mark.parametrize(("name", "matrix"), [("plain", "attn.o"), ("dense layers", ""), ("own norms", "shared.up")])
def test_layers_with_a_matrix_that_is_not_quantized_are_the_decoders(isa: str, name: str, matrix: str) -> None:
    """Each of them among others that compiled code knows; the step stops before one that it does not know."""
    made = toy(isa, name)
    spec, ids = made.spec, np.random.default_rng(2).integers(0, 97, 9)
    for layer in range(spec.num_layers):
        dense = Partly(spec, made.kernels)
        dense.unquantized = (f"layers.{layer}.{matrix}",)
        layers = CompiledLayers.make(spec, dense, made.kernels)
        assert layers is not None
        others = [spec.is_moe(other) and other != layer for other in range(spec.num_layers)]
        assert [layers.knows(other) for other in range(spec.num_layers)] == others
        step = DecodeStep(spec, layers)
        (x,) = random_input(1, 1, spec.hidden_size)
        reached, got, attended, asked = step.run(layer, x, None, [made.state(4)])
        assert (reached, attended, asked) == (layer, False, None) and np.array_equal(got, x)
        hidden = []
        for given in (None, step):
            decoder, state = Decoder(spec, dense, NoExperts(), reference, given), made.state(9)
            hidden.append(np.concatenate([decoder.forward(one, state) for one in in_groups(ids, 1)]))
        assert np.abs(hidden[0] - hidden[1]).max() <= 2e-2 * np.abs(hidden[0]).max()


@every_isa
def test_a_model_without_quantized_matrices_has_no_compiled_layers(isa: str) -> None:
    made = toy(isa, "plain")
    dense = Partly(made.spec, made.kernels)
    dense.unquantized = ("layers.",)
    assert CompiledLayers.make(made.spec, dense, made.kernels) is None


def test_the_reference_has_no_compiled_layers() -> None:
    made = toy(COMPILED[0], "plain")
    assert CompiledLayers.make(made.spec, made.dense, reference) is None
    assert reference.resident_table(3, 6, (2, 4)) is None


# What a layer says of itself, and a change that its tensors do not follow.
MISTAKES: list[tuple[str, Callable[[LayerSpec], LayerSpec]]] = [
    ("plain", lambda layer: replace(layer, mixer=replace(ATTENTION, heads=2))),
    ("plain", lambda layer: replace(layer, mixer=replace(ATTENTION, sinks=True))),
    ("plain", lambda layer: replace(layer, mixer=replace(ATTENTION, qk_norm="none"))),
    ("plain", lambda layer: replace(layer, mixer=replace(ATTENTION, bias=True))),
    ("plain", lambda layer: replace(layer, mixer=DELTA)),
    ("plain", lambda layer: replace(layer, post_norms=True)),
    ("delta", lambda layer: replace(layer, mixer=replace(DELTA, taps=2))),
    ("delta", lambda layer: replace(layer, feed_forward=MODELS["plain"].moe)),
    ("own norms", lambda layer: replace(layer, pre_norms=False)),
    ("groups", lambda layer: replace(layer, mixer=replace(ATTENTION, rope=None, qk_norm="full"))),
]


@pytest.mark.parametrize(("name", "change"), MISTAKES)
def test_weights_that_do_not_fit_their_layer_are_refused(name: str, change: Callable[[LayerSpec], LayerSpec]) -> None:
    made = toy(COMPILED[0], name)
    weights = made.weights()
    assert weights[0] is not None
    wrong = replace(weights[0], layer=change(weights[0].layer))
    with pytest.raises(ValueError):
        made.kernels.decode_stack([wrong, *weights[1:]], made.spec.activation)


def test_tensors_that_do_not_fit_are_refused() -> None:
    made = toy(COMPILED[0], "biases")
    first, *others = made.weights()
    assert first is not None
    q = first.quantized["attn.q"]
    assert q.bias is not None
    norm = first.plain["attn_norm"]
    for changed in (
        replace(first, quantized={**first.quantized, "attn.q": q._replace(bias=q.bias[1:].copy())}),
        replace(first, quantized={**first.quantized, "attn.q": q._replace(bias=None)}),
        replace(first, quantized={name: matrix for name, matrix in first.quantized.items() if name != "attn.k"}),
        replace(first, quantized={**first.quantized, "attn.other": q}),
        replace(first, plain={**first.plain, "other": norm}),
        replace(first, plain={**first.plain, "attn_norm": norm[1:].copy()}),
        replace(first, plain={**first.plain, "attn_norm": norm.astype(np.float64)}),
        replace(first, plain={**first.plain, "router": first.plain["router"].T.copy()}),
        replace(first, plain={name: tensor for name, tensor in first.plain.items() if name != "mlp_norm"}),
        replace(first, hidden=first.hidden + 1),
    ):
        with pytest.raises(ValueError):
            made.kernels.decode_stack([changed, *others], made.spec.activation)


def test_states_and_positions_that_do_not_fit_are_refused() -> None:
    made = toy(COMPILED[0], "delta")
    stack, state = made.layers().stack, made.state(4)
    x, more = random_input(2, 1, made.spec.hidden_size)
    arrays = state.layers[0]
    cache = state.layers[1]
    assert isinstance(arrays, DeltaState) and isinstance(cache, AttentionState)
    short = DeltaArrays(arrays.arrays.tail[:-1], arrays.arrays.memory)
    good = [arrays.arrays, cache.cache, arrays.arrays]
    for wrong in (good[:2], [None, *good[1:]], [short, *good[1:]], [good[1], *good[1:]], [good[0], good[0], good[2]]):
        with pytest.raises(ValueError):
            stack.set_states([wrong])
    with pytest.raises(ValueError):
        stack.run(None, 0, x, None, [(0, [])])  # no states yet
    stack.set_states([good])
    assert ATTENTION.rope is not None
    tables = rotary(ATTENTION.rope, ATTENTION.head_dim).table(0, 1, 4)
    rotations = [(address_of(tables[0]), address_of(tables[1]))]
    for first, added, position in (
        (0, None, (0, [])),
        (0, None, (4, rotations)),
        (0, more, (0, rotations)),
        (3, None, (0, rotations)),
        (4, more, (0, rotations)),
        (-1, None, (0, rotations)),
    ):
        with pytest.raises(ValueError):
            stack.run(None, first, x, added, [position])
    for tokens, wrong in ((x, [(0, rotations)] * 2), (x, []), (np.concatenate([x, x]), [(0, rotations)])):
        with pytest.raises(ValueError):
            stack.run(None, 0, tokens, None, wrong)
    assert stack.run(None, 3, x, more, [(0, rotations)])[0] == 3
