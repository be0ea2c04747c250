"""Arguments from Python that no kernel can take: an exception or a result, never memory of others.

The calls run in a process of their own. Behind each of their arrays lies a page that nobody may touch.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_kit import COMPILED, WIDTH, expert_at, kernels_of, random_input, run_python, weight

from dymoe_runtime.kernels.kv_cache import KVCache
from dymoe_runtime.kernels.prepared import DeltaArrays, DeltaWeights, ExpertRows
from dymoe_runtime.memory import address_of
from dymoe_runtime.spec import GatedDeltaSpec, RouterSpec

ODD = [-1, 0, 1, 3, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 70, 0.5, None, "x"]
TYPES = [np.float64, np.float16, np.int8, np.uint8, np.int32, np.int64, np.uint16, np.complex64, np.bool_, object]
_fences: list[mmap.mmap] = []


def fenced(array: np.ndarray) -> np.ndarray:
    """A copy that ends where its memory ends; what is behind it cannot be read."""
    page = mmap.PAGESIZE
    room = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    _fences.append(memory)
    whole = np.frombuffer(memory, np.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address_of(whole) + room), ctypes.c_size_t(page), 0) == 0
    copy = whole[room - array.nbytes : room].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def calls(isa: str) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Each kernel with arguments that it takes."""
    kernels = kernels_of(isa)
    layout, segments = weight(33, 130, (2, 4))
    experts = [expert_at(tier) for tier in (2, 4)]
    prepared = [kernels.prepare(*one) for one in experts]
    hidden = experts[0][0].matrices["gate"].cols
    x = random_input(3, hidden)
    parts = [ExpertRows(prepared[0], 0, 2), ExpertRows(prepared[1], 2, 1)]
    cache = KVCache(fenced(np.zeros(KVCache.bytes_needed(2, 32, 16), np.uint8)), 2, 32, 16)
    delta = GatedDeltaSpec(1, 2, 8, 16, 4)
    tensors = DeltaWeights(*map(fenced, (random_input(delta.channels, 4), random_input(2), random_input(2))))
    state = DeltaArrays(fenced(np.zeros((3, delta.channels), np.float32)), fenced(np.zeros((2, 8, 16), np.float32)))
    ids, rows = np.array([0, 2, 1]), np.array([[0, 1], [2, -1]])
    router = RouterSpec(6, 2, True)
    views, address = prepared[0].views, address_of
    native = __import__("dymoe_runtime.kernels._native", fromlist=["x"])
    return {
        "linear": (kernels.linear, [layout, 4, segments, random_input(2, 130)]),
        "embed": (kernels.embed, [layout, 2, segments, np.array([0, 32, 5])]),
        "dequantize": (kernels.dequantize, [layout, 4, segments, "weight"]),
        "prepare": (kernels.prepare, list(experts[1])),
        "moe": (kernels.moe, [parts, x, ids, np.empty((3, hidden), np.float32), "silu"]),
        "moe_token": (kernels.moe_token, [prepared, x[:1], random_input(1, 2), "gelu"]),
        "combine": (kernels.combine, [x, rows, random_input(2, 2)]),
        "matmul": (kernels.matmul, [x, random_input(5, hidden)]),
        "activate": (kernels.activate, [x, x, "clamped_swiglu:1.7:7.0"]),
        "route": (kernels.route, [random_input(3, 6), router, random_input(6), random_input(6)]),
        "norm": (kernels.norm, [x, random_input(hidden), 1e-5]),
        "layer_norm": (kernels.layer_norm, [x, random_input(hidden), random_input(hidden), 1e-5]),
        "rotate": (kernels.rotate, [random_input(2, 3, 16), random_input(2, 8), random_input(2, 8)]),
        "attend": (
            kernels.attend,
            [*(random_input(n, 3, 32) for n in (4, 2, 2)), cache, 1, 4, True, random_input(4), 8],
        ),
        "gated_delta": (
            kernels.gated_delta,
            [delta, random_input(3, delta.channels), random_input(3, 4), tensors, state],
        ),
        "table": (table_calls, [native, 3, 4, [2, 4], 1, 2, 4, views, [0.5, 0.7], [1], [0, 1], [0.5, 0.5]]),
        "reads": (read_calls, [native, 2, -1, 0, [(address(x), 4)], 0, None, [7], 1]),
        "pages": (native.Plan.make, [[], [("bias", (0, 0, 4 * WIDTH))]]),
    }


def table_calls(native: Any, layers: Any, experts: Any, ladder: Any, layer: Any, number: Any, tier: Any, views: Any,
                thresholds: Any, pinned: Any, chosen: Any, weights: Any) -> None:  # fmt: skip
    table = native.ResidentTable(layers, experts, ladder)
    for call in (
        lambda: table.put(layer, number, tier, views),
        lambda: table.remove(layer, number, tier),
        lambda: table.set_rule(layer, thresholds, pinned),
        lambda: table.choose_tiers(layer, chosen, weights),
    ):
        quietly(call)


def read_calls(native: Any, threads: Any, fd: Any, offset: Any, places: Any, urgency: Any, then: Any, checksums: Any,
               ticket: Any) -> None:  # fmt: skip
    if isinstance(threads, int) and threads > 64:
        return  # the system's threads are for others, too
    reads = native.ReadThreads(threads)
    for call in (
        lambda: reads.submit(fd, offset, places, urgency, then, checksums),
        lambda: reads.reprioritize(ticket, urgency, 1),
        lambda: reads.cancel(ticket, urgency),
        lambda: reads.submit(-1, offset, [], 0, lambda: None),
    ):
        quietly(call)
    reads.close(5.0)


def quietly(call: Callable[[], object]) -> bool:
    """Return whether a call took its arguments."""
    try:
        call()
    except Exception:
        return False
    return True


def changed(value: Any, rng: random.Random) -> Any:
    """Return something else in place of an argument, or of a part of it."""
    if isinstance(value, np.ndarray):
        return changed_array(value, rng)
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.8:
        items, at = list(value), rng.randrange(len(value))
        items[at : at + 1] = rng.choice([[changed(items[at], rng)]] * 4 + [[], [items[at]] * 2])
        return items if isinstance(value, list) else tuple(items) if type(value) is tuple else rebuilt(value, items)
    return rng.choice(ODD)


def rebuilt(value: Any, items: list[Any]) -> Any:
    try:
        return type(value)(*items)
    except TypeError:
        return items


def changed_array(array: np.ndarray, rng: random.Random) -> Any:
    axis = rng.randrange(max(array.ndim, 1))
    ways: list[Callable[[], Any]] = [
        lambda: fenced(array.astype(rng.choice(TYPES[:-1]))),
        lambda: array.astype(object),
        lambda: np.asfortranarray(array),
        lambda: np.repeat(array, 2, axis)[(slice(None),) * axis + (slice(None, None, 2),)],
        lambda: fenced(np.delete(array, -1, axis)),
        lambda: fenced(np.repeat(array, 2, axis)),
        lambda: fenced(array[:0]),
        lambda: fenced(array.ravel()),
        lambda: fenced(array[None]),
        lambda: fenced(array.T.copy()),
        lambda: array.astype(array.dtype.newbyteorder()),
        lambda: array.tolist(),
        lambda: rng.choice(ODD),
    ]
    if array.dtype == np.int64:
        ways += [lambda: with_number(array, rng)] * 8
    return rng.choice(ways)()


def with_number(array: np.ndarray, rng: random.Random) -> np.ndarray:
    other = fenced(array)
    other.flat[rng.randrange(array.size)] = rng.choice([-1, 3, 33, 1 << 40, (1 << 63) - 1, -(1 << 63)])
    return other


def attempt(isa: str, seeds: range) -> None:
    """Call each kernel rightly, then with one or two arguments changed."""
    taken = refused = 0
    for name, (call, arguments) in calls(isa).items():
        usual = [fenced(a) if isinstance(a, np.ndarray) else a for a in arguments]
        call(*usual)
        for seed in seeds:
            rng = random.Random(f"{name} {seed}")
            mutated = [fenced(a) if isinstance(a, np.ndarray) else a for a in arguments]
            for at in rng.sample(range(len(mutated)), rng.choice([1, 1, min(2, len(mutated))])):
                mutated[at] = changed(mutated[at], rng)
            print(name, seed, file=sys.stderr, flush=True)
            if quietly(lambda call=call, mutated=mutated: call(*mutated)):  # type: ignore[misc]
                taken += 1
            else:
                refused += 1
            _fences.clear()
    print(f"{taken} taken, {refused} refused")


@pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as on Linux")
@pytest.mark.parametrize("isa", COMPILED)
def test_wrong_arguments_are_refused_and_no_other_memory_is_used(isa: str) -> None:
    folder = Path(__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(Path(__file__).parent)!r}]\n"
    printed = run_python(f"{code}import test_arguments; test_arguments.attempt({isa!r}, range(60))")
    last = [line for line in printed.splitlines() if "refused" in line]
    assert last, printed[-300:]
    taken, refused = (int(word) for word in last[0].replace(",", "").split() if word.isdigit())
    assert taken > 50 and refused > 300
