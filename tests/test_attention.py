"""The KV cache's rows, and attention out of it by the compiled kernels as by torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MODEL

from dymoe_compile.checkpoint import Checkpoint
from dymoe_runtime import kernels
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.kernels import reference
from dymoe_runtime.kv_cache import BITS, KVCache, pack, row_bytes, unpack
from dymoe_runtime.model import plan_budget
from dymoe_runtime.spec import ModelSpec

COMPILED = [name for name in kernels.available_isas() if name != "torch"]


def spec_of(kv_heads: int, head_dim: int) -> ModelSpec:
    return replace(Checkpoint.open(MODEL).spec, num_layers=2, num_kv_heads=kv_heads, head_dim=head_dim)


def filled(kv_heads: int, head_dim: int, length: int, bits: int, seed: int = 0) -> tuple[KVCache, torch.Generator]:
    """A cache of `length` tokens, of which none counts as there yet."""
    g = torch.Generator().manual_seed(seed)
    cache = KVCache(spec_of(kv_heads, head_dim), length + 3, bits)
    for layer in (0, 1):
        k, v = torch.randn(2, kv_heads, length, head_dim, generator=g)
        cache.write(layer, 0, k, v)
    return cache, g


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 128])
def test_rows_keep_what_their_bits_allow(head_dim: int, bits: int) -> None:
    x = torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 4, 5)[:, None]
    rows = pack(x, bits)
    assert rows.dtype == torch.uint8 and rows.shape == (3, 5, row_bytes(head_dim, bits))
    error = (unpack(rows, head_dim, bits) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    if bits == 32:
        assert error.max() == 0
    else:
        # A half is exact to 2^-11 of itself and 2^-25 at least; a code to half of a scale, which is a half.
        assert (error <= largest * {16: 2**-11, 8: 0.51 / 127}[bits] + {16: 2**-25, 8: 127 * 2**-25}[bits]).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_of_what_is_too_large_or_not_finite(bits: int) -> None:
    x = torch.tensor([[1e9, -1e9, 1.0, 0.0], [float("nan"), 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    got = unpack(pack(x, bits), 4, bits)
    assert got[0].isfinite().all() and got[0, 0] >= 65504 and got[0, 1] <= -65504
    assert got[1, 0].isnan()
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
    """Both read the same rows, so only the order of float sums differs."""
    cache, g = filled(kv_heads, head_dim, start + tokens, bits)
    cache.length = start
    q = 3 * torch.randn(tokens, heads, head_dim, generator=g).transpose(0, 1)
    for layer in (0, 1):
        expected, mass = reference.attend(q, cache, layer, window, weigh=True)
        got, received = kernels.select(isa).attend(q, cache, layer, window, weigh=True)
        assert received is not None and mass is not None
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(received, mass, rtol=1e-4, atol=1e-5)
        alone, nothing = kernels.select(isa).attend(q, cache, layer, window)
        assert torch.equal(alone, got) and nothing is None


@pytest.mark.parametrize("isa", COMPILED)
def test_a_prompt_does_not_depend_on_threads(isa: str) -> None:
    cache, g = filled(2, 64, 300, 16)
    q = torch.randn(8, 300, 64, generator=g)
    chosen = kernels.select(isa)
    before = chosen.threads()
    try:
        results = []
        for count in (1, 2, 5):
            chosen.set_threads(count)
            results.append(chosen.attend(q, cache, 0, None, weigh=True))
    finally:
        chosen.set_threads(before)
    assert all(torch.equal(y, results[0][0]) and torch.equal(mass, results[0][1]) for y, mass in results)


@pytest.mark.parametrize("isa", COMPILED)
def test_what_is_not_finite_spoils_only_those_who_see_it(isa: str) -> None:
    cache, g = filled(2, 64, 100, 16)
    k, v = torch.randn(2, 2, 1, 64, generator=g)
    k[0, 0, 3] = float("nan")
    cache.write(0, 40, k, v)
    q = torch.randn(4, 100, 64, generator=g)
    got, _ = kernels.select(isa).attend(q, cache, 0)
    assert got[:2, 40:].isnan().all()
    assert got[:2, :40].isfinite().all() and got[2:].isfinite().all()


@pytest.mark.parametrize("isa", COMPILED)
def test_arguments_that_do_not_fit_are_refused(isa: str) -> None:
    cache, _ = filled(2, 64, 10, 16)
    attend = kernels.select(isa).attend
    with pytest.raises(ValueError, match="heads of 32"):
        attend(torch.randn(4, 10, 32), cache, 0)
    with pytest.raises(ValueError, match="shapes do not fit"):
        attend(torch.randn(3, 10, 64), cache, 0)
    with pytest.raises(ValueError, match="position 13 is not below 13"):
        attend(torch.randn(4, 14, 64), cache, 0)


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
    k = torch.ones(2, 5, 16)
    cache.write(1, 0, k, 2 * k)
    assert torch.equal(cache.read(1, 5)[1], 2 * k)
