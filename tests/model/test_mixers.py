"""A kind of mixer is one file and one row in a table: a convolution with a state goes every way that attention goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from kernel_kit import COMPILED, kernels_of
from layer_kit import RandomDense
from short_convolution import ShortConvolution, ShortConvolutionSpec

from dymoe_runtime.kernels import REFERENCE
from dymoe_runtime.model.decode_step import CompiledLayers, DecodeStep
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.mixers import MIXERS
from dymoe_runtime.model.routing import PromptRouting, Routing, in_groups
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, Rope, RouterSpec

HIDDEN, VOCABULARY, TOKENS = 48, 61, 40
ATTENTION = AttentionSpec(heads=4, kv_heads=2, head_dim=16, rope=Rope(), qk_norm="head")
WINDOWED = replace(ATTENTION, window=7)
CONVOLUTION = ShortConvolutionSpec(width=4, channels=32)
MOE = MoeSpec(RouterSpec(experts=6, top_k=2, normalize=True), width=40)
LAYERS = (
    LayerSpec(CONVOLUTION, MOE),
    LayerSpec(ATTENTION, MOE),
    LayerSpec(CONVOLUTION, MlpSpec(56)),
    LayerSpec(WINDOWED, MOE),
    LayerSpec(CONVOLUTION, MOE),
)
SPEC = ModelSpec("toy", VOCABULARY, HIDDEN, 512, 1e-6, LAYERS, dense_width=56)
ALL = list(dict.fromkeys([*COMPILED[:1], REFERENCE]))


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXERS, ShortConvolutionSpec.kind, ShortConvolution)


class RandomExperts:
    """Routed experts that are a random matrix each; it notes how much a prompt's tokens count."""

    def __init__(self) -> None:
        shape = (SPEC.num_layers, SPEC.num_experts, HIDDEN, HIDDEN)
        self._matrices = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 0.05
        self.token_weights: dict[int, np.ndarray] = {}

    def decode(self, layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        return self._run(layer, h, routing.experts, routing.weights)

    def prefill(self, layer: int, h: np.ndarray, routing: PromptRouting) -> np.ndarray:
        self.token_weights[layer] = routing.token_weights
        return self._run(layer, h, routing.experts, routing.weights)

    def _run(self, layer: int, h: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        chosen = self._matrices[layer][experts]  # [T, k, H, H]
        return np.asarray(np.einsum("th,tkhg,tk->tg", h, chosen, weights))


class Toy:
    """The model, and a few tokens with the logits that running them as a whole gives."""

    def __init__(self, name: str) -> None:
        self.kernels = kernels_of(name)
        self.experts = RandomExperts()
        self.dense = RandomDense(SPEC, self.kernels)
        self.decoder = Decoder(SPEC, self.dense, self.experts, self.kernels)
        self.ids = np.random.default_rng(2).integers(0, VOCABULARY, TOKENS)
        self.whole = self.decoder.logits(self.decoder.forward(self.ids))

    def state(self) -> SequenceState:
        return SequenceState(SPEC, TOKENS + 8, kv_bits=32)

    def run(self, pieces: list[np.ndarray], state: SequenceState) -> np.ndarray:
        return np.concatenate([self.decoder.logits(self.decoder.forward(piece, state)) for piece in pieces])

    def check(self, logits: np.ndarray, first: int = 0) -> None:
        """Check logits of the tokens from `first` on against those of the whole."""
        assert np.abs(self.whole).max() > 1
        assert np.abs(logits - self.whole[first : first + len(logits)]).max() < 2e-4


@pytest.fixture(params=ALL)
def toy(request: pytest.FixtureRequest, row: None) -> Iterator[Toy]:
    yield Toy(request.param)


def test_prefill_and_decode_equal_running_it_whole(toy: Toy) -> None:
    state = toy.state()
    toy.check(toy.run([toy.ids[:11], toy.ids[11:30], *in_groups(toy.ids[30:], 1)], state))
    assert state.length == TOKENS


@pytest.mark.parametrize("group", [1, 3, 8, 64])
def test_a_prompt_in_chunks_equals_running_it_whole(toy: Toy, group: int) -> None:
    state = toy.state()
    hidden = [toy.decoder.prefill(ids, state, group) for ids in (toy.ids[:23], toy.ids[23:])]
    toy.check(toy.decoder.logits(np.concatenate(hidden)))
    for layer, weights in toy.experts.token_weights.items():
        # Without attention all tokens count alike.
        assert (weights == 1).all() == (SPEC.layers[layer].mixer is CONVOLUTION or group == 1)


def test_a_rollback_undoes_all_that_came_after_the_snapshot(toy: Toy) -> None:
    state = toy.state()
    toy.run([toy.ids[:15]], state)
    snapshot = state.snapshot()
    other = np.random.default_rng(3).integers(0, VOCABULARY, 9)
    for pieces in ([other], in_groups(other, 1)):
        toy.run(pieces, state)
        state.rollback(snapshot)
        assert state.length == 15
        toy.check(toy.run(in_groups(toy.ids[15:19], 1), state), 15)
    state.rollback(snapshot)
    toy.check(toy.run([toy.ids[15:]], state), 15)


def test_what_is_used_continues_a_sequence_in_another_state(toy: Toy) -> None:
    state = toy.state()
    toy.run([toy.ids[:15]], state)
    parts = [[part.copy() for part in layer.used(15)] for layer in state.layers]
    other = SequenceState(SPEC, TOKENS, kv_bits=32)
    toy.run([toy.ids[::-1]], other)
    snapshot = other.snapshot()
    with other.replaced(15):
        for layer, kept in zip(other.layers, parts, strict=True):
            for place, part in zip(layer.used(15), kept, strict=True):
                place[:] = part
    assert other.length == 15 and not snapshot.valid
    toy.check(toy.run(in_groups(toy.ids[15:19], 1), other), 15)
    toy.check(toy.run([toy.ids[19:]], other), 19)
    with pytest.raises(KeyboardInterrupt), other.replaced(3):
        raise KeyboardInterrupt
    assert other.length == 0
    toy.check(toy.run([toy.ids], other))


def test_snapshots_may_be_nested_and_a_cut_makes_later_ones_invalid(toy: Toy) -> None:
    state = toy.state()
    snapshots = [state.snapshot()]
    for start in (0, 10, 20):
        toy.run([toy.ids[start : start + 10]], state)
        snapshots.append(state.snapshot())
    state.rollback(snapshots[2])
    toy.check(toy.run([toy.ids[20:25]], state), 20)
    state.rollback(snapshots[1])
    with pytest.raises(ValueError, match="since the snapshot"):
        state.rollback(snapshots[2])
    toy.check(toy.run([toy.ids[10:]], state), 10)
    state.rollback(snapshots[0])
    toy.check(toy.run([toy.ids], state))


def test_a_state_that_cannot_be_cut_is_forgotten_as_a_whole(toy: Toy) -> None:
    state = toy.state()
    toy.run([toy.ids[:20]], state)
    assert state.truncate(20) == 20
    assert state.truncate(12) == 0 and state.length == 0
    toy.check(toy.run([toy.ids[:9], toy.ids[9:]], state))


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_pass_that_fails_leaves_no_half_run_state(
    toy: Toy, tokens: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first convolution has seen the tokens already when the last experts fail."""
    state = toy.state()
    toy.run([toy.ids[:10]], state)

    def failing(layer: int, *_: object) -> np.ndarray:
        if layer == SPEC.moe_layers[-1]:
            raise KeyboardInterrupt
        return np.zeros((tokens, HIDDEN), np.float32)

    ids = toy.ids[10 : 10 + tokens]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy.experts, "_run", failing)
        toy.decoder.prefill(ids, state, 4) if chunked else toy.decoder.forward(ids, state)
    assert state.length == 0
    toy.check(toy.run([toy.ids], state))


def test_the_memory_plan_sums_what_each_layer_says_of_itself(row: None) -> None:
    convolutions = 3 * 4 * 3 * 32
    for capacity, bits, row_bytes in ((64, 16, 32), (512, 16, 32), (64, 32, 64)):
        attention = 2 * (2 * ATTENTION.kv_heads * capacity * row_bytes)
        assert SequenceState.bytes_needed(SPEC, capacity, bits) == convolutions + attention
    kernels = kernels_of(ALL[0])
    plain = replace(SPEC, layers=tuple(replace(layer, mixer=CONVOLUTION) for layer in LAYERS))
    few, many = (Decoder.workspace_bytes(plain, kernels, tokens, 512) for tokens in (1, 256))
    assert many - few >= 255 * 4 * 8 * 32  # at least what the convolution says


@pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")
def test_compiled_layers_stand_between_layers_that_they_do_not_know(row: None) -> None:
    toy = Toy(COMPILED[0])
    layers = CompiledLayers.make(SPEC, toy.dense, toy.kernels)
    assert layers is not None
    assert [layers.knows(layer) for layer in range(SPEC.num_layers)] == [False, True, False, True, False]
    decoder = Decoder(SPEC, toy.dense, toy.experts, toy.kernels, DecodeStep(SPEC, layers))
    state = toy.state()
    logits = [decoder.logits(decoder.forward(piece, state)) for piece in (toy.ids[:9], *in_groups(toy.ids[9:], 1))]
    toy.check(np.concatenate(logits))
    snapshot = state.snapshot()
    decoder.forward(toy.ids[:1], state)
    state.rollback(snapshot)
    assert state.length == TOKENS


@pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")
def test_a_model_without_attention_has_no_compiled_layers(row: None) -> None:
    spec = replace(SPEC, layers=tuple(replace(layer, mixer=CONVOLUTION) for layer in LAYERS))
    kernels = kernels_of(COMPILED[0])
    assert CompiledLayers.make(spec, RandomDense(SPEC, kernels), kernels) is None
