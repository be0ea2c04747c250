"""One token through the compiled step equals the decoder's own mathematics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from test_decoder import VARIANTS

from dymoe_compile.checkpoint import Checkpoint, CheckpointDense
from dymoe_compile.dense import records_of
from dymoe_compile.reference import CheckpointExperts
from dymoe_runtime import kernels
from dymoe_runtime.decoder import Decoder, Routing, in_groups
from dymoe_runtime.kv_cache import BITS, KVCache
from dymoe_runtime.tiers import RecordLayout

COMPILED = [name for name in kernels.available_isas() if name != "torch"]

pytestmark = pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")


class QuantizedAttention:
    """A checkpoint's dense weights with the attention's matrices at 8 bits, for kernels of `isa`."""

    def __init__(self, checkpoint: Checkpoint, isa: str) -> None:
        self._dense = CheckpointDense(checkpoint)
        self._kernels = kernels.select(isa)
        self._records = records_of(checkpoint, "attn", 8)
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


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_a_step_equals_the_decoder(isa: str, bits: int, family: str, changes: dict, tmp_path: Path) -> None:
    """Layer by layer from the same input, over a context longer than the sliding windows."""
    from dymoe_runtime.step import DecodeStep

    tiny_model(family, **changes).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    spec, dense = checkpoint.spec, QuantizedAttention(checkpoint, isa)
    step = DecodeStep(spec, dense, isa)
    decoder = Decoder(spec, dense, CheckpointExperts(checkpoint))
    caches = KVCache(spec, 30, bits), KVCache(spec, 30, bits)
    g = np.random.default_rng(3)
    for _ in range(25):
        for layer in range(spec.num_layers):
            x, more = g.standard_normal((2, 1, spec.hidden_size), np.float32)
            expected, _ = decoder.attend(layer, x + more, caches[0])
            reached, got, asked = step.run(layer, x, more, caches[1])
            assert reached == layer
            # An activation on the edge between two int8 codes may fall to either side.
            assert np.abs(got - expected).max() <= 1e-2 * np.abs(expected - x - more).max()
            assert (asked is None) == (layer in spec.dense_layers)
            if asked is not None:
                check_route(asked, decoder, layer, got)
        for cache in caches:
            cache.length += 1
    for layer in range(spec.num_layers):
        for expected, got in zip(caches[0].read(layer, 25), caches[1].read(layer, 25), strict=True):
            assert got.dtype == expected.dtype and np.allclose(got, expected, rtol=2e-2, atol=2e-2)


def check_route(got: tuple[np.ndarray, Routing], decoder: Decoder, layer: int, x: np.ndarray) -> None:
    h, routing = got
    expected = decoder.norm(f"layers.{layer}.mlp_norm", x)
    experts, gates = decoder.route(layer, expected)
    assert (h.dtype, routing.gates.dtype, routing.experts.dtype) == (expected.dtype, gates.dtype, experts.dtype)
    assert np.allclose(h, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(routing.gates, gates, rtol=1e-4, atol=1e-6)
    assert np.array_equal(routing.experts, experts)
    assert routing.of_token() == (routing.experts[0].tolist(), routing.gates[0].tolist())
    assert routing.residual is x


@pytest.mark.parametrize("isa", COMPILED)
def test_a_guess_equals_the_decoder(isa: str, tmp_path: Path) -> None:
    """With a predictor and without, and without touching what the step has returned."""
    from dymoe_runtime.step import DecodeStep

    tiny_model("olmoe").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    spec, dense = checkpoint.spec, QuantizedAttention(checkpoint, isa)
    step, decoder = DecodeStep(spec, dense, isa), Decoder(spec, dense, CheckpointExperts(checkpoint))
    g = np.random.default_rng(5)
    predictor = g.standard_normal((spec.num_experts, spec.hidden_size + 1), np.float32)
    step.correct(1, predictor)
    for _ in range(5):
        _, x, asked = step.run(0, g.standard_normal((1, spec.hidden_size), np.float32), None, KVCache(spec, 4))
        assert asked is not None
        h, routing = asked
        before = h.copy(), routing.experts.copy()
        for layer, correction in ((0, None), (1, predictor)):
            experts, gates = step.guess(layer, x)
            expected, mass = decoder.look_ahead(layer, x, correction)
            assert (experts.dtype, gates.dtype) == (expected.dtype, mass.dtype)
            assert np.array_equal(experts, expected)
            assert np.allclose(gates, mass, rtol=1e-4, atol=1e-6)
        assert np.array_equal(h, before[0]) and np.array_equal(routing.experts, before[1])


@pytest.mark.parametrize("isa", COMPILED)
def test_decoding_by_steps_equals_the_decoder(isa: str, tmp_path: Path) -> None:
    """A prompt by the decoder, then tokens by steps."""
    from dymoe_runtime.step import DecodeStep

    tiny_model("qwen3_moe", mlp_only_layers=[1]).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    dense, experts = QuantizedAttention(checkpoint, isa), CheckpointExperts(checkpoint)
    ids = np.random.default_rng(2).integers(0, 97, 20)
    logits = []
    for step in (None, DecodeStep(checkpoint.spec, dense, isa)):
        decoder, cache = Decoder(checkpoint.spec, dense, experts, step), KVCache(checkpoint.spec, 20)
        decoder.forward(ids[:9], cache)
        logits.append(np.concatenate([decoder.logits(decoder.forward(one, cache)) for one in in_groups(ids[9:], 1)]))
    assert np.abs(logits[0] - logits[1]).max() <= 2e-2 * np.abs(logits[0]).max()


@pytest.mark.parametrize("isa", COMPILED)
def test_what_is_not_finite_stays_so(isa: str, tmp_path: Path) -> None:
    from dymoe_runtime.step import DecodeStep

    tiny_model("mixtral").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    dense = QuantizedAttention(checkpoint, isa)
    step = DecodeStep(checkpoint.spec, dense, isa)
    x = np.ones((1, checkpoint.spec.hidden_size), np.float32)
    x[0, 3] = float("nan")
    _, y, asked = step.run(0, x, None, KVCache(checkpoint.spec, 4))
    assert np.isnan(y).all() and asked is not None
    h, routing = asked
    assert np.isnan(h).all() and np.isnan(routing.gates).all()
    assert set(routing.experts[0].tolist()) <= set(range(checkpoint.spec.num_experts))
