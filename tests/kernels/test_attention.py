"""The KV cache's rows, and attention out of it: every instruction set of this machine, the reference, and torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import MODEL
from kernel_kit import ALL, COMPILED, kernels_of, reference

from dymoe_compile.checkpoint import torch_ops
from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.kernels.attention_reference import Sight
from dymoe_runtime.kernels.kv_cache import HEAVY_HITTER_QUERIES, KVCache, pack, row_bytes, unpack
from dymoe_runtime.model.mixers.gqa import AttentionState
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import KV_BITS, AttentionSpec, ModelSpec, Rope, alike_layers

CASES = [  # heads, kv_heads, head_dim, start, tokens, window
    (4, 4, 64, 0, 1, None),
    (4, 4, 64, 0, 70, None),
    (8, 2, 20, 0, 33, None),
    (8, 1, 128, 5, 64, None),
    (6, 2, 80, 130, 50, None),
    (4, 2, 64, 200, 1, None),
    (4, 2, 64, 0, 200, 7),
    (4, 2, 64, 100, 90, 64),
    (40, 1, 16, 70, 9, 65),
    (2, 2, 2, 0, 300, None),
]
# heads, kv_heads, head_dim, start, tokens, window, chunk
SIGHTS = [
    (8, 2, 20, 0, 1, None, None),
    (8, 2, 20, 5, 33, None, 16),
    (6, 2, 80, 130, 90, None, 64),
    (4, 2, 64, 100, 150, 64, None),
    (4, 2, 64, 0, 200, 7, 50),
    (4, 1, 64, 127, 3, 50, 128),
    (4, 4, 16, 70, 9, None, 1),
]


def spec_of(heads: int, kv_heads: int, head_dim: int) -> ModelSpec:
    """A model of two layers with such attention."""
    spec = Checkpoint.open(MODEL).spec
    return replace(spec, layers=alike_layers(2, AttentionSpec(heads, kv_heads, head_dim, Rope()), spec.moe))


def caches_of(state: SequenceState) -> list[KVCache]:
    """The KV cache of each layer."""
    return [layer.cache for layer in state.layers if isinstance(layer, AttentionState)]


class Tokens:
    """Two sequences of `start` random tokens, and queries, keys and values of `tokens` after them."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, tokens: int, start: int = 0, bits: int = 16, seed: int = 0
    ) -> None:
        g = np.random.default_rng(seed)
        self.start, capacity = start, start + tokens + 3
        states = [SequenceState(spec_of(heads, kv_heads, head_dim), capacity, bits) for _ in range(2)]
        self.caches = [caches_of(state) for state in states]  # [sequence][layer]
        before = g.standard_normal((2, 2, kv_heads, start, head_dim), np.float32)
        for sequence in self.caches:
            for layer, cache in enumerate(sequence):
                cache.write(0, *before[layer])
        self.q = 3 * g.standard_normal((tokens, heads, head_dim), np.float32).swapaxes(0, 1)
        self.k, self.v = g.standard_normal((2, tokens, kv_heads, head_dim), np.float32).swapaxes(1, 2)

    @property
    def vectors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values."""
        return self.q, self.k, self.v


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 128])
def test_rows_keep_what_their_bits_allow(head_dim: int, bits: int) -> None:
    scales = np.logspace(-6, 4, 5, dtype=np.float32)
    x = np.random.default_rng(1).standard_normal((3, 5, head_dim), np.float32) * scales[:, None]
    rows = pack(x, bits)
    assert rows.dtype == np.uint8 and rows.shape == (3, 5, row_bytes(head_dim, bits))
    error = np.abs(unpack(rows, head_dim, bits) - x)
    largest = np.abs(x).max(-1, keepdims=True)
    if bits == 32:
        assert error.max() == 0
    else:
        # A half is exact to 2^-11 of itself and 2^-25 at least; a code to half of a scale, which is a half.
        assert (error <= largest * {16: 2**-11, 8: 0.51 / 127}[bits] + {16: 2**-25, 8: 127 * 2**-25}[bits]).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_of_what_is_too_large_or_not_finite(bits: int) -> None:
    x = np.array([[1e9, -1e9, 1.0, 0.0], [np.nan, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    got = unpack(pack(x, bits), 4, bits)
    assert np.isfinite(got[0]).all() and got[0, 0] >= 65504 and got[0, 1] <= -65504
    assert np.isnan(got[1, 0])
    assert (got[2] == 0).all()


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "start", "tokens", "window"), CASES)
def test_prompts_equal_the_reference(
    isa: str, bits: int, heads: int, kv_heads: int, head_dim: int, start: int, tokens: int, window: int | None
) -> None:
    """Both keep and read the same rows, so only the order of float sums differs."""
    t, kernels = Tokens(heads, kv_heads, head_dim, tokens, start, bits), kernels_of(isa)
    for ours, theirs in zip(*t.caches, strict=True):
        expected, mass = reference.attend(*t.vectors, theirs, start, window, weigh=True)
        got, received = kernels.attend(*t.vectors, ours, start, window, weigh=True)
        assert np.array_equal(ours.rows, theirs.rows)
        assert received is not None and mass is not None
        assert (got.dtype, received.dtype) == (expected.dtype, mass.dtype)
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert np.allclose(received, mass, rtol=1e-4, atol=1e-5)
        alone, nothing = kernels.attend(*t.vectors, ours, start, window)
        assert np.array_equal(alone, got) and nothing is None


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "start", "tokens", "window"), CASES)
def test_prompts_equal_torch(
    isa: str, bits: int, heads: int, kv_heads: int, head_dim: int, start: int, tokens: int, window: int | None
) -> None:
    """As attention of the whole sequence, of which only the last tokens have queries, over what the cache keeps."""
    t = Tokens(heads, kv_heads, head_dim, tokens, start, bits)
    for cache in t.caches[0]:
        got, received = kernels_of(isa).attend(*t.vectors, cache, start, window, weigh=True)
        k, v = cache.read(start + tokens)
        q = np.concatenate([np.zeros((heads, start, head_dim), np.float32), t.q], axis=1)
        expected = torch_ops.attention(q, k, v, Sight(window))[:, start:]
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)
        if start == 0 or tokens >= HEAVY_HITTER_QUERIES:  # else torch counts tokens before them too
            mass = torch_ops.received(q, k, Sight(window))[start:]
            assert received is not None and np.allclose(received, mass, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "start", "tokens", "window", "chunk"), SIGHTS)
def test_sinks_and_chunks_equal_the_reference(
    isa: str,
    sink: bool,
    bits: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    start: int,
    tokens: int,
    window: int | None,
    chunk: int | None,
) -> None:
    """With sinks that take all attention, and some that take none."""
    t = Tokens(heads, kv_heads, head_dim, tokens, start, bits)
    sinks = np.linspace(-30, 30, heads, dtype=np.float32) if sink else None
    ours, theirs = (sequence[0] for sequence in t.caches)
    expected, mass = reference.attend(*t.vectors, theirs, start, window, True, sinks, chunk)
    got, received = kernels_of(isa).attend(*t.vectors, ours, start, window, True, sinks, chunk)
    assert received is not None and mass is not None
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.allclose(received, mass, rtol=1e-4, atol=1e-5)
    alone, nothing = kernels_of(isa).attend(*t.vectors, ours, start, window, sinks=sinks, chunk=chunk)
    assert np.array_equal(alone, got) and nothing is None


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "start", "tokens", "window", "chunk"), SIGHTS)
def test_sinks_and_chunks_equal_torch(
    isa: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    start: int,
    tokens: int,
    window: int | None,
    chunk: int | None,
) -> None:
    t, sinks = Tokens(heads, kv_heads, head_dim, tokens, start), np.linspace(-3, 3, heads, dtype=np.float32)
    got, _ = kernels_of(isa).attend(*t.vectors, t.caches[0][0], start, window, sinks=sinks, chunk=chunk)
    k, v = t.caches[0][0].read(start + tokens)
    q = np.concatenate([np.zeros((heads, start, head_dim), np.float32), t.q], axis=1)
    expected = torch_ops.attention_with_sinks(q, k, v, Sight(window, chunk), sinks)[:, start:]
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ALL)
def test_a_chunk_sees_nothing_of_those_before(isa: str) -> None:
    """A key that is not finite spoils the tokens of its chunk alone."""
    t = Tokens(4, 2, 64, 100)
    t.k[0, 40, 3] = float("nan")
    got, _ = kernels_of(isa).attend(*t.vectors, t.caches[0][0], 0, chunk=32)
    assert np.isnan(got[:2, 40:64]).all()
    assert np.isfinite(got[:2, :40]).all() and np.isfinite(got[:2, 64:]).all() and np.isfinite(got[2:]).all()


@pytest.mark.parametrize("isa", ALL)
def test_attention_leaves_other_layers_as_they_are(isa: str) -> None:
    t = Tokens(4, 2, 64, 10, start=5)
    before = t.caches[0][1].rows.copy()
    kernels_of(isa).attend(*t.vectors, t.caches[0][0], 5)
    assert np.array_equal(t.caches[0][1].rows, before)


@pytest.mark.parametrize("isa", COMPILED)
def test_a_prompt_does_not_depend_on_threads(isa: str) -> None:
    t, kernels = Tokens(8, 2, 64, 300), kernels_of(isa)
    before = kernels.threads()
    try:
        results = []
        for count in (1, 2, 5):
            kernels.set_threads(count)
            results.append(kernels.attend(*t.vectors, t.caches[0][0], 0, None, weigh=True))
    finally:
        kernels.set_threads(before)
    assert all(np.array_equal(y, results[0][0]) and np.array_equal(mass, results[0][1]) for y, mass in results)


@pytest.mark.parametrize("isa", ALL)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_key_that_is_not_finite_spoils_only_those_who_see_it(isa: str) -> None:
    """A value may spoil its neighbours too."""
    t = Tokens(4, 2, 64, 100)
    t.k[0, 40, 3] = float("nan")
    got, _ = kernels_of(isa).attend(*t.vectors, t.caches[0][0], 0)
    assert np.isnan(got[:2, 40:]).all()
    assert np.isfinite(got[:2, :40]).all() and np.isfinite(got[2:]).all()
    t.k[0, 40, 3], t.v[0, 40, 3] = 0.0, float("nan")
    got, _ = kernels_of(isa).attend(*t.vectors, t.caches[1][0], 0)
    assert np.isnan(got[:2, 40:, 3]).all() and np.isfinite(got[2:]).all()


@pytest.mark.parametrize("isa", COMPILED)
def test_arguments_that_do_not_fit_are_refused(isa: str) -> None:
    attend = kernels_of(isa).attend
    t = Tokens(4, 2, 64, 10)
    cache, odd = t.caches[0][0], t.q[:3]
    with pytest.raises(ValueError, match="does not fit q"):
        attend(t.q[..., :32], t.k[..., :32], t.v[..., :32], cache, 0)
    with pytest.raises(ValueError, match="does not fit q"):
        attend(t.q, t.k[:, :9], t.v[:, :9], cache, 0)
    with pytest.raises(ValueError, match="v: expected"):
        attend(t.q, t.k, t.v[:, :9], cache, 0)
    with pytest.raises(ValueError, match="shapes do not fit"):
        attend(odd, t.k, t.v, cache, 0)
    with pytest.raises(ValueError, match="shapes do not fit"):
        attend(t.q, t.k, t.v, cache, -1)
    with pytest.raises(ValueError, match="shapes do not fit"):
        attend(t.q, t.k, t.v, cache, 0, chunk=-1)
    with pytest.raises(ValueError, match="position 13 is not below 13"):
        attend(t.q, t.k, t.v, cache, 4)
    for sinks in (np.ones(3, np.float32), np.ones((4, 1), np.float32), np.ones(4)):
        with pytest.raises(ValueError):
            attend(t.q, t.k, t.v, cache, 0, sinks=sinks)


@pytest.mark.parametrize("isa", ALL)
def test_fewer_bits_need_less_memory(isa: str, tiny_path: Path) -> None:
    bundle, context = Bundle.open(tiny_path), 1 << 14  # of whole MiB, as floors are
    kernels = kernels_of(isa)
    floors = [plan_budget(bundle, kernels, context, process_bytes=0, kv_bits=bits).floor_bytes for bits in (8, 16, 32)]
    sizes = [SequenceState.bytes_needed(bundle.spec, context, bits) for bits in (8, 16, 32)]
    assert floors[2] - floors[1] == sizes[2] - sizes[1] == sizes[1]
    assert abs(floors[1] - floors[0] - (sizes[1] - sizes[0])) < 1 << 20


def test_one_place_serves_all_layers_of_a_pass() -> None:
    spec = spec_of(4, 2, 16)
    one, all_layers = (SequenceState.bytes_needed(spec, 5, 16, shared=shared) for shared in (True, False))
    assert 2 * one == all_layers
    first, second = caches_of(SequenceState(spec, 5, 16, shared=True))
    assert first.address == second.address
    k = np.ones((2, 5, 16), np.float32)
    first.write(0, k, 2 * k)
    assert np.array_equal(second.read(5)[1], 2 * k)
    first, second = caches_of(SequenceState(spec, 5, 16))
    first.write(0, k, 2 * k)
    assert not second.rows.any()
