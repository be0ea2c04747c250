"""One token through the layers in compiled code equals the decoder's own mathematics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from helpers import tiny_model
from kernel_kit import COMPILED, kernels_of, random_input, random_record, reference
from model_kit import VARIANTS

from dymoe_compile.checkpoint.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.checkpoint.original import CheckpointExperts
from dymoe_compile.policy.dense_bits import records_of
from dymoe_compile.quantize import load_descent
from dymoe_runtime.bundle.tiers import RecordLayout
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.kernels.prepared import PreparedExpert
from dymoe_runtime.model.decode_step import CompiledLayers, DecodeStep, DirectExperts
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.mixers.gqa import AttentionState
from dymoe_runtime.model.routing import NoExperts, PromptRouting, Routing, in_groups
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import KV_BITS

pytestmark = pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")


class QuantizedAttention:
    """A checkpoint's dense weights with the attention's matrices at 8 bits."""

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels) -> None:
        self._dense = CheckpointDense(checkpoint)
        self._kernels = kernels
        self._records = records_of(checkpoint, "attn", 8, load_descent(kernels))
        names = checkpoint.spec.tensor_shapes()
        self._tensors = {name: checkpoint.tensor(name).float().numpy() for name in names if name not in self._records}
        self.embed = self._dense.embed

    def vector(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def optional(self, name: str) -> np.ndarray | None:
        return self._tensors.get(name)

    def record(self, name: str) -> tuple[RecordLayout, np.ndarray] | None:
        return self._records.get(name)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        if name not in self._records:
            return self._dense.linear(name, x)
        layout, data = self._records[name]
        y = self._kernels.linear(layout, 8, [data], x)
        bias = self._tensors.get(f"{name}_bias")
        return y if bias is None else y + bias


class Tiny:
    """A tiny random model with quantized attention, as compiled code and as the decoder run it."""

    def __init__(self, isa: str, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.spec, self.kernels = checkpoint.spec, kernels_of(isa)
        self.dense = QuantizedAttention(self.checkpoint, self.kernels)
        # What the decoder does beside products of records is the reference's.
        self.decoder = Decoder(self.spec, self.dense, CheckpointExperts(self.checkpoint), reference)

    def layers(self, predictors: dict[int, np.ndarray] | None = None) -> CompiledLayers:
        layers = CompiledLayers.make(self.spec, self.dense, self.kernels, predictors)
        assert layers is not None
        return layers

    def step(self, direct: DirectExperts | None = None) -> DecodeStep:
        return DecodeStep(self.spec, self.layers(), direct)

    def state(self, capacity: int, kv_bits: int = 16) -> SequenceState:
        return SequenceState(self.spec, capacity, kv_bits)


MakeTiny = Callable[..., Tiny]


@pytest.fixture(scope="module")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """Makes the tiny model of an instruction set, a family and its changes; the same one is made once."""

    @cache
    def checkpoint(family: str, changes: str) -> Checkpoint:
        path = tmp_path_factory.mktemp("tiny")
        tiny_model(family, **json.loads(changes)).save_pretrained(path)
        return Checkpoint.open(path)

    @cache
    def tiny(isa: str, family: str, changes: str) -> Tiny:
        return Tiny(isa, checkpoint(family, changes))

    return lambda isa, family, **changes: tiny(isa, family, json.dumps(changes))


def rows_of(state: SequenceState, layer: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a layer before position `stop`."""
    of_layer = state.layers[layer]
    assert isinstance(of_layer, AttentionState)
    return of_layer.cache.read(stop)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_a_step_equals_the_decoder(isa: str, bits: int, family: str, changes: dict, make_tiny: MakeTiny) -> None:
    """Layer by layer from the same input, over a context longer than the sliding windows."""
    tiny = make_tiny(isa, family, **changes)
    spec, decoder, step = tiny.spec, tiny.decoder, tiny.step()
    states = tiny.state(30, bits), tiny.state(30, bits)
    g = np.random.default_rng(3)
    for position in range(25):
        for layer in range(spec.num_layers):
            x, more = g.standard_normal((2, 1, spec.hidden_size), np.float32)
            expected, _ = decoder.mix(layer, x + more, states[0], position)
            reached, got, attended, asked = step.run(layer, x, more, states[1])
            assert reached == layer and attended
            # An activation on the edge between two int8 codes may fall to either side.
            assert np.abs(got - expected).max() <= 1e-2 * np.abs(expected - x - more).max()
            assert (asked is not None) == spec.is_moe(layer)
            if asked is not None:
                check_route(asked, decoder, layer, got)
        for state in states:
            state.advance(1)
    for layer in range(spec.num_layers):
        for expected, got in zip(rows_of(states[0], layer, 25), rows_of(states[1], layer, 25), strict=True):
            assert got.dtype == expected.dtype and np.allclose(got, expected, rtol=2e-2, atol=2e-2)


def check_route(got: tuple[np.ndarray, Routing], decoder: Decoder, layer: int, x: np.ndarray) -> None:
    h, routing = got
    expected, experts, weights = decoder.routers.route_residual(layer, x)
    assert (h.dtype, routing.weights.dtype, routing.experts.dtype) == (expected.dtype, weights.dtype, experts.dtype)
    assert np.allclose(h, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(routing.weights, weights, rtol=1e-4, atol=1e-6)
    assert np.array_equal(routing.experts, experts)
    assert routing.of_token() == (routing.experts[0].tolist(), routing.weights[0].tolist())
    assert routing.residual is x


@pytest.mark.parametrize("isa", COMPILED)
def test_a_guess_equals_the_decoder(isa: str, make_tiny: MakeTiny) -> None:
    """With a predictor and without, and without touching what the step has returned."""
    tiny = make_tiny(isa, "olmoe")
    spec, g = tiny.spec, np.random.default_rng(5)
    predictor = g.standard_normal((spec.num_experts, spec.hidden_size + 1), np.float32)
    layers = tiny.layers({1: predictor})
    step = DecodeStep(spec, layers)
    for _ in range(5):
        _, x, _, asked = step.run(0, g.standard_normal((1, spec.hidden_size), np.float32), None, tiny.state(4))
        assert asked is not None
        h, routing = asked
        before = h.copy(), routing.experts.copy()
        for layer, correction in ((0, None), (1, predictor)):
            experts, weights = layers.guess(layer, x)
            expected, expected_weights = tiny.decoder.routers.guess(layer, x, correction)
            assert (experts.dtype, weights.dtype) == (expected.dtype, expected_weights.dtype)
            assert np.array_equal(experts, expected)
            assert np.allclose(weights, expected_weights, rtol=1e-4, atol=1e-6)
        assert np.array_equal(h, before[0]) and np.array_equal(routing.experts, before[1])


@pytest.mark.parametrize("isa", COMPILED)
def test_decoding_by_steps_equals_the_decoder(isa: str, make_tiny: MakeTiny) -> None:
    """A prompt by the decoder, then tokens by steps."""
    tiny = make_tiny(isa, "qwen3_moe", mlp_only_layers=[1])
    ids = np.random.default_rng(2).integers(0, 97, 20)
    logits = []
    for step in (None, tiny.step()):
        decoder = Decoder(tiny.spec, tiny.dense, CheckpointExperts(tiny.checkpoint), reference, step)
        state = tiny.state(20)
        decoder.forward(ids[:9], state)
        logits.append(np.concatenate([decoder.logits(decoder.forward(one, state)) for one in in_groups(ids[9:], 1)]))
        assert state.length == 20
    assert np.abs(logits[0] - logits[1]).max() <= 2e-2 * np.abs(logits[0]).max()


@pytest.mark.parametrize("isa", COMPILED)
def test_what_is_not_finite_stays_so(isa: str, make_tiny: MakeTiny) -> None:
    tiny = make_tiny(isa, "mixtral")
    x = np.ones((1, tiny.spec.hidden_size), np.float32)
    x[0, 3] = float("nan")
    _, y, _, asked = tiny.step().run(0, x, None, tiny.state(4))
    assert np.isnan(y).all() and asked is not None
    h, routing = asked
    assert np.isnan(h).all() and np.isnan(routing.weights).all()
    assert set(routing.experts[0].tolist()) <= set(range(tiny.spec.num_experts))


class Resident:
    """Random quantized experts in a table, all but those of `missing`, (layer, expert); tier 4, then 2, then none.

    Asked for experts it runs the same ones, and notes of which layers.
    """

    def __init__(self, tiny: Tiny, missing: Sequence[tuple[int, int]] = ()) -> None:
        spec, self._tiny = tiny.spec, tiny
        shapes = tuple((name, *shape) for name, shape in spec.expert_shapes.items())
        layout, segments = random_record(shapes, (2, 4), 200.0)  # so that they add about as much as there is
        self._experts: dict[int, PreparedExpert] = {
            tier: tiny.kernels.prepare(layout, tier, segments[: layout.segments_of(tier)]) for tier in layout.ladder
        }
        found = tiny.kernels.resident_table(spec.num_layers, spec.num_experts, layout.ladder)
        assert found is not None
        self._table, self._is_open = found, True
        for layer in spec.moe_layers:
            self._table.set_rule(layer, [0.5, 0.9], [])
            for expert in range(spec.num_experts):
                for tier, prepared in self._experts.items():
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
        experts, weights = routing.of_token()
        tiers = self._table.choose_tiers(layer, experts, weights)
        self.uses.append((layer, experts, tiers))
        kept = [rank for rank, tier in enumerate(tiers) if tier]
        prepared = [self._experts[tiers[rank]] for rank in kept]
        return self._tiny.kernels.moe_token(prepared, h, routing.weights[:, kept], self._tiny.spec.activation)

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        raise AssertionError("a prompt")


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_resident_experts_give_the_same_bits_as_experts_that_are_asked_for(
    isa: str, family: str, changes: dict, make_tiny: MakeTiny
) -> None:
    """And the same experts and tiers are noted; where one is not resident, its layer's are asked for."""
    tiny = make_tiny(isa, family, **changes)
    ids = np.random.default_rng(4).integers(0, 97, 12)
    moe_layers = tiny.spec.moe_layers

    def decode(experts: Resident, direct: Resident | None) -> np.ndarray:
        decoder = Decoder(tiny.spec, tiny.dense, experts, tiny.kernels, tiny.step(direct))
        state = tiny.state(12)
        return np.concatenate([decoder.forward(one, state) for one in in_groups(ids, 1)])

    asked = Resident(tiny)
    expected = decode(asked, None)
    assert asked.asked == 12 * list(moe_layers)
    assert len({tier for _, _, tiers in asked.uses for tier in tiers}) > 1 or tiny.spec.top_k == 1
    whole = Resident(tiny)
    assert np.array_equal(decode(whole, whole), expected)
    assert whole.asked == [] and whole.uses == asked.uses
    missing = Resident(tiny, [(moe_layers[-1], expert) for expert in range(0, tiny.spec.num_experts, 2)])
    assert np.array_equal(decode(missing, missing), expected)
    assert set(missing.asked) == {moe_layers[-1]} and missing.uses == asked.uses


@pytest.mark.parametrize("isa", COMPILED)
def test_a_model_without_quantized_attention_has_no_compiled_layers(isa: str, make_tiny: MakeTiny) -> None:
    class Unquantized(QuantizedAttention):
        def record(self, name: str) -> None:
            return None

    tiny = make_tiny(isa, "olmoe")
    dense = Unquantized(tiny.checkpoint, tiny.kernels)
    assert CompiledLayers.make(tiny.spec, dense, tiny.kernels) is None


def test_the_reference_has_no_compiled_layers(make_tiny: MakeTiny) -> None:
    tiny = make_tiny(COMPILED[0], "olmoe")
    assert CompiledLayers.make(tiny.spec, tiny.dense, reference) is None
    assert reference.resident_table(3, 6, (2, 4)) is None


@pytest.mark.parametrize("isa", COMPILED)
def test_layers_that_compiled_code_does_not_know_are_the_decoders(isa: str, make_tiny: MakeTiny) -> None:
    """Known and unknown ones by turns; the step stops before one that it does not know."""

    class Mixed(QuantizedAttention):
        def record(self, name: str) -> tuple[RecordLayout, np.ndarray] | None:
            return None if name.startswith("layers.1.") else super().record(name)

    tiny = make_tiny(isa, "olmoe")
    dense = Mixed(tiny.checkpoint, tiny.kernels)
    layers = CompiledLayers.make(tiny.spec, dense, tiny.kernels)
    assert layers is not None
    assert [layers.knows(layer) for layer in range(3)] == [True, False, True]
    step = DecodeStep(tiny.spec, layers)
    x, more = random_input(2, 1, tiny.spec.hidden_size)
    reached, got, attended, asked = step.run(1, x, more, tiny.state(4))
    assert (reached, attended, asked) == (1, False, None) and np.array_equal(got, x + more)
    ids = np.random.default_rng(2).integers(0, 97, 9)
    hidden = []
    for given in (None, step):
        decoder, state = Decoder(tiny.spec, dense, NoExperts(), reference, given), tiny.state(9)
        hidden.append(np.concatenate([decoder.forward(one, state) for one in in_groups(ids, 1)]))
    assert np.abs(hidden[0] - hidden[1]).max() <= 2e-2 * np.abs(hidden[0]).max()
