"""The KV cache's rows, and attention out of it by the compiled kernels as by torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL

from dymoe_compile.checkpoint import Checkpoint
from dymoe_runtime import kernels
from dymoe_runtime.budget import plan_budget
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.kernels import reference
from dymoe_runtime.kv_cache import BITS, KVCache, pack, row_bytes, unpack
from dymoe_runtime.spec import ModelSpec

COMPILED = [name for name in kernels.available_isas() if name != "torch"]


def spec_of(kv_heads: int, head_dim: int) -> ModelSpec:
    return replace(Checkpoint.open(MODEL).spec, num_layers=2, num_kv_heads=kv_heads, head_dim=head_dim)


class Tokens:
    """A cache with `start` random tokens, and queries, keys and values of `tokens` after them."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, tokens: int, start: int = 0, bits: int = 16, seed: int = 0
    ) -> None:
        g = np.random.default_rng(seed)
        spec = spec_of(kv_heads, head_dim)
        self.caches = [KVCache(spec, start + tokens + 3, bits) for _ in range(2)]
        before = g.standard_normal((2, 2, kv_heads, start, head_dim), np.float32)
        for cache in self.caches:
            for layer in (0, 1):
                cache.write(layer, 0, *before[layer])
            cache.length = start
        self.q = 3 * g.standard_normal((tokens, heads, head_dim), np.float32).swapaxes(0, 1)
        self.k, self.v = g.standard_normal((2, tokens, kv_heads, head_dim), np.float32).swapaxes(1, 2)


@pytest.mark.parametrize("bits", BITS)
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
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "start", "tokens", "window"),
    [
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
    ],
)
def test_prompts_equal_the_reference(
    isa: str, bits: int, heads: int, kv_heads: int, head_dim: int, start: int, tokens: int, window: int | None
) -> None:
    """Both keep and read the same rows, so only the order of float sums differs."""
    t = Tokens(heads, kv_heads, head_dim, tokens, start, bits)
    for layer in (0, 1):
        expected, mass = reference.attend(t.q, t.k, t.v, t.caches[0], layer, window, weigh=True)
        got, received = kernels.select(isa).attend(t.q, t.k, t.v, t.caches[1], layer, window, weigh=True)
        assert np.array_equal(t.caches[0].rows[layer], t.caches[1].rows[layer])
        assert received is not None and mass is not None
        assert (got.dtype, received.dtype) == (expected.dtype, mass.dtype)
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert np.allclose(received, mass, rtol=1e-4, atol=1e-5)
        alone, nothing = kernels.select(isa).attend(t.q, t.k, t.v, t.caches[1], layer, window)
        assert np.array_equal(alone, got) and nothing is None


@pytest.mark.parametrize("isa", COMPILED)
def test_a_prompt_does_not_depend_on_threads(isa: str) -> None:
    t = Tokens(8, 2, 64, 300)
    chosen = kernels.select(isa)
    before = chosen.threads()
    try:
        results = []
        for count in (1, 2, 5):
            chosen.set_threads(count)
            results.append(chosen.attend(t.q, t.k, t.v, t.caches[0], 0, None, weigh=True))
    finally:
        chosen.set_threads(before)
    assert all(np.array_equal(y, results[0][0]) and np.array_equal(mass, results[0][1]) for y, mass in results)


@pytest.mark.parametrize("isa", COMPILED)
def test_a_key_that_is_not_finite_spoils_only_those_who_see_it(isa: str) -> None:
    """A value may spoil its neighbours too."""
    t = Tokens(4, 2, 64, 100)
    t.k[0, 40, 3] = float("nan")
    got, _ = kernels.select(isa).attend(t.q, t.k, t.v, t.caches[0], 0)
    assert np.isnan(got[:2, 40:]).all()
    assert np.isfinite(got[:2, :40]).all() and np.isfinite(got[2:]).all()
    t.k[0, 40, 3], t.v[0, 40, 3] = 0.0, float("nan")
    got, _ = kernels.select(isa).attend(t.q, t.k, t.v, t.caches[1], 0)
    assert np.isnan(got[:2, 40:, 3]).all() and np.isfinite(got[2:]).all()


@pytest.mark.parametrize("isa", COMPILED)
def test_arguments_that_do_not_fit_are_refused(isa: str) -> None:
    attend = kernels.select(isa).attend
    t, odd = Tokens(4, 2, 64, 10), Tokens(3, 2, 64, 10)
    with pytest.raises(ValueError, match="does not fit q"):
        attend(t.q[..., :32], t.k[..., :32], t.v[..., :32], t.caches[0], 0)
    with pytest.raises(ValueError, match="does not fit q"):
        attend(t.q, t.k[:, :9], t.v[:, :9], t.caches[0], 0)
    with pytest.raises(ValueError, match="v: expected"):
        attend(t.q, t.k, t.v[:, :9], t.caches[0], 0)
    with pytest.raises(ValueError, match="shapes do not fit"):
        attend(odd.q, odd.k, odd.v, odd.caches[0], 0)
    t.caches[0].length = 4
    with pytest.raises(ValueError, match="position 13 is not below 13"):
        attend(t.q, t.k, t.v, t.caches[0], 0)


def test_fewer_bits_need_less_memory(shipped_path: Path) -> None:
    bundle = Bundle.open(shipped_path)
    floors = [plan_budget(bundle, 4096, fixed=0, kv_bits=bits).floor for bits in (8, 16, 32)]
    sizes = [KVCache.bytes_needed(bundle.spec, 4096, bits) for bits in (8, 16, 32)]
    assert floors[2] - floors[1] == sizes[2] - sizes[1] == sizes[1]
    assert abs(floors[1] - floors[0] - (sizes[1] - sizes[0])) < 1 << 20


def test_one_layer_serves_all_for_a_pass() -> None:
    spec = spec_of(2, 16)
    cache = KVCache(spec, 5, 16, one_layer=True)
    assert cache.rows.nbytes == KVCache.bytes_needed(spec, 5, 16, one_layer=True)
    assert cache.addresses[0] == cache.addresses[1]
    k = np.ones((2, 5, 16), np.float32)
    cache.write(1, 0, k, 2 * k)
    assert np.array_equal(cache.read(1, 5)[1], 2 * k)
