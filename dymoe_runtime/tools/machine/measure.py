"""Measurement of a machine's rates, which do not depend on the bundle that is at hand.

Products are timed with matrices of a usual size, whatever size those of the bundle have, at its tiers. A second, small
size tells what an expert takes beside them. The files of the bundle only serve to read from the disk that it is on, and
its layers to tell what a layer takes beside products.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from statistics import median

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.bundle.tensorfile import read_into
from dymoe_runtime.bundle.tiers import PAGE, RecordLayout, make_layout
from dymoe_runtime.engine.cost import ExpertShape, measure
from dymoe_runtime.engine.model import Model
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.memory import map_memory
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.storage import Member
from dymoe_runtime.store.arena import IN_FLIGHT
from dymoe_runtime.tools.machine.rates import Rates, Work
from dymoe_runtime.tools.probe import dense_seconds
from dymoe_runtime.units import format_size

# The expert that products are timed with, like that of OLMoE-1B-7B: its width and the model's; and the most bits that
# weights are quantized to, whose products wait for memory.
WIDTH, HIDDEN, MOST_BITS = 1024, 2048, 8
# Width of an expert, and of its model, that is so small that much of its time is not for products.
SMALL = 256
TOP_K = 8
# Tokens of a prompt that an expert gets.
PROMPT_TOKENS = 64
SWEEP_BYTES = 64 << 20
ATTEMPTS = 3
# Tokens of a prompt that runs through the model's layers.
PASS_TOKENS = 128
# Bytes of a copy in memory, and copies of which the fastest counts.
COPY_BYTES, COPIES = 16 << 20, 16
# Tokens that are decoded to see what layers take.
TOKENS = 48
# Bytes of a short read; of a long one, fewer if the bundle has no room for COUNT of them; reads of each length.
SHORT, LONG, COUNT = PAGE, 1 << 20, 32
# What is beyond these is no measurement: the least and the most of each rate.
PLAUSIBLE = {
    "memory_bytes_per_s": (1e8, 1e13),
    "decode_weights_per_s": (1e6, 1e12),
    "prompt_weights_per_s": (1e6, 1e13),
    "layer_s": (0, 1),
    "expert_s": (0, 1),
    "prompt_layer_s": (0, 1),
    "prompt_expert_s": (0, 1),
    "disk_bytes_per_s": (1e6, 1e11),
    "disk_latency_s": (0, 1),
}


def measure_rates(model: Model) -> Rates:
    """Return the rates of this machine, measured with a model that has not run yet.

    Raises DymoeError where a figure is none that a machine can have, for instance because reads come from a cache.
    """
    kernels, bundle = model.kernels, model.bundle
    rates = product_rates(kernels, bundle.manifest.ladder)
    rates = replace(rates, prompt_layer_s=prompt_layer_seconds(model, rates), layer_s=layer_seconds(model, rates))
    disk, latency_s = disk_rates(bundle)
    rates = replace(rates, disk_bytes_per_s=disk, disk_latency_s=latency_s)
    check_plausible(rates, copy_bytes_per_s())
    return rates


def check_plausible(rates: Rates, copied_per_s: float = 0.0) -> None:
    """Raise DymoeError if a rate is none that a machine can have; `copied_per_s` are bytes copied in memory.

    Products of one thread may stream weights more slowly than a fast disk reads, but no disk is faster than a copy.
    """
    for name, found in asdict(rates).items():
        low, high = PLAUSIBLE.get(name, (1, math.inf))
        for value in found.values() if isinstance(found, dict) else (found,):
            if not low <= value <= high:
                raise DymoeError(
                    f"{name} was measured as {value:g}, which no machine has; stop other programs and measure again"
                )
    memory = max(rates.memory_bytes_per_s, copied_per_s)
    if rates.disk_bytes_per_s >= memory:
        raise DymoeError(
            f"the disk seems to read {format_size(rates.disk_bytes_per_s)}/s, which is more than the "
            f"{format_size(memory)}/s of memory: the bundle comes from a cache or is on a disk in "
            "memory; put it on the disk to measure, and measure again"
        )


def copy_bytes_per_s() -> float:
    """Return the bytes that one thread copies in memory in a second, the best of a few attempts."""
    source, target = (np.frombuffer(map_memory(COPY_BYTES), np.uint8) for _ in range(2))
    times = []
    for _ in range(COPIES):  # the first also gets the pages
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return COPY_BYTES / min(times)


def product_rates(kernels: Kernels, ladder: Sequence[int]) -> Rates:
    """Return the rates of products and experts at the tiers `ladder`; layers and the disk take no time in them."""
    large, small = (WIDTH, HIDDEN), (SMALL, SMALL)
    most, times = (_times(kernels, tiers, *large) for tiers in ((MOST_BITS,), ladder))
    threads, weights = kernels.threads(), 3 * WIDTH * HIDDEN
    rates = Rates(
        threads=threads,
        memory_bytes_per_s=_layout((MOST_BITS,), *large).prefix_bytes(MOST_BITS) / most[MOST_BITS][0],
        decode_weights_per_s={bits: weights / one_s / threads for bits, (one_s, _) in times.items()},
        prompt_weights_per_s={
            bits: PROMPT_TOKENS * weights / many_s / threads for bits, (_, many_s) in {**most, **times}.items()
        },
        layer_s=0.0,
        disk_bytes_per_s=math.inf,
        disk_latency_s=0.0,
    )
    layout, beside = _layout(ladder, *small), []
    for bits, (one_s, many_s) in _times(kernels, ladder, *small).items():
        prompt_s = rates.prompt_s(0, {bits: PROMPT_TOKENS * layout.weights})
        one_s -= rates.products_s(layout.prefix_bytes(bits), layout.weights, bits)
        beside.append((one_s, (many_s - prompt_s) / PROMPT_TOKENS))
    expert_s, prompt_expert_s = (max(0.0, median(each)) for each in zip(*beside, strict=True))
    return replace(rates, expert_s=expert_s, prompt_expert_s=prompt_expert_s)


def _layout(ladder: Sequence[int], width: int, hidden: int) -> RecordLayout:
    return make_layout({"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}, tuple(ladder))


def _times(kernels: Kernels, ladder: Sequence[int], width: int, hidden: int) -> dict[int, tuple[float, float]]:
    """Return the seconds of an expert at each tier with one token and with PROMPT_TOKENS.

    Other programs only ever slow a machine down, so the least of a few attempts is what it can do.
    """
    memory, layout = np.frombuffer(map_memory(SWEEP_BYTES), np.uint8), _layout(ladder, width, hidden)
    shape = ExpertShape(layout, TOP_K, SWEEP_BYTES // layout.record_bytes)
    found = [measure(kernels, shape, memory, (1, PROMPT_TOKENS), SWEEP_BYTES).expert_s for _ in range(ATTEMPTS)]
    return {bits: (min(each[bits][0] for each in found), min(each[bits][1] for each in found)) for bits in ladder}


def prompt_layer_seconds(model: Model, rates: Rates) -> float:
    """Return the seconds of each token of a prompt in a layer beside products, from a pass without routed experts."""
    tokens, decoder = min(PASS_TOKENS, model.max_context), model.decoder_without_experts()
    ids, times = np.arange(tokens) % model.spec.vocab_size, []
    for _ in range(ATTEMPTS):
        state = SequenceState(model.spec, tokens)
        started = time.perf_counter()
        decoder.prefill(ids, state, tokens)
        times.append(time.perf_counter() - started)
    nbytes, weights = Work.of(model.bundle).prompt
    expected_s = rates.prompt_s(nbytes, {8 * nbytes / weights: tokens * weights})
    return max(0.0, min(times) - expected_s) / tokens / model.spec.num_layers


def layer_seconds(model: Model, rates: Rates) -> float:
    """Return the seconds of a decoded token in a layer beside what `rates` predict.

    It is that of tokens whose experts are all in memory or, if there are none, that of layers without experts.
    """
    work = Work.of(model.bundle)
    expected_s, times = rates.products_s(*work.token), resident_token_seconds(model)
    if times:
        bits = model.statistics()["bits_mean"]
        token_s, expected_s = _steady(times), work.predict(rates, bits, sys.maxsize, 1).token_s
    else:
        token_s = dense_seconds(model)
    return max(0.0, token_s - expected_s) / model.spec.num_layers


def _steady(times: Sequence[float]) -> float:
    """Return the least median of ATTEMPTS parts of `times`, in their order."""
    length = -(-len(times) // ATTEMPTS)
    return min(median(times[start : start + length]) for start in range(0, len(times), length))


def resident_token_seconds(model: Model) -> list[float]:
    """Return the seconds of decoded tokens that read nothing: the same token again and again, at the default point."""
    times = []
    model.prefill([0])
    model.reset_stats()
    for _ in range(min(TOKENS, model.max_context - 2)):
        read, started = model.store.stats.read_bytes, time.perf_counter()
        model.decode(0)
        if model.store.stats.read_bytes == read:
            times.append(time.perf_counter() - started)
    return times


def disk_rates(bundle: Bundle) -> tuple[float, float]:
    """Return (bytes/s, seconds of a read beside its bytes) of the disk that a bundle is on.

    Reads are at random, past the page cache, as many in flight as in a run; the fastest of a few attempts counts, as
    for products. Raises DymoeError if the bundle is too small, if its file system has no way past the page cache, or
    if long reads take no longer than short ones.
    """
    names = sorted({entry.file for entry in bundle.manifest.layers.values()})
    with ExitStack() as stack:
        files = [_open(bundle, name, stack) for name in names]
        total, length = sum(file.nbytes for file in files), LONG
        while length > 8 * SHORT and total // length < 2 * COUNT + len(files):
            length //= 2
        places = [(file, start) for file in files for start in range(0, file.nbytes - length + 1, length)]
        if len(places) < 2 * COUNT:
            raise DymoeError(
                f"{bundle.path}: {format_size(total)} of experts are too few to measure the disk with; use a larger "
                "bundle"
            )
        random = np.random.default_rng(0)
        times = []
        for _ in range(ATTEMPTS):
            chosen = [places[i] for i in random.permutation(len(places))[: 2 * COUNT]]
            times.append(read_seconds(chosen, (length, SHORT)))
    long_s, short_s = map(min, zip(*times, strict=True))
    return rates_of_reads((length, long_s), (SHORT, short_s), str(bundle.path))


def rates_of_reads(long: tuple[int, float], short: tuple[int, float], where: str) -> tuple[float, float]:
    """Return (bytes/s, seconds beside bytes) from reads of two lengths, each (bytes, seconds).

    Raises DymoeError, which starts with `where`, if the long ones take no longer.
    """
    (length, long_s), (short_length, short_s) = long, short
    if long_s <= short_s:
        raise DymoeError(
            f"{where}: reading {format_size(length)} took no longer than {format_size(short_length)}, so that the "
            "disk cannot be measured; stop other programs and measure again"
        )
    rate = (length - short_length) / (long_s - short_s)
    return rate, max(0.0, short_s - short_length / rate)


def _open(bundle: Bundle, name: str, stack: ExitStack) -> Member:
    """Open a file past the page cache; raise DymoeError if the cache cannot be avoided."""
    with contextlib.suppress(DymoeError, AttributeError):
        file = bundle.open_file(name, os.O_DIRECT)
        stack.callback(file.close)
        _read(file, 0, np.frombuffer(map_memory(PAGE), np.uint8))
        return file
    raise DymoeError(
        f"{bundle.path}: its file system reads through the page cache alone, so that the disk cannot be measured; put "
        "the bundle on another one"
    )


def read_seconds(places: Sequence[tuple[Member, int]], lengths: tuple[int, int]) -> tuple[float, float]:
    """Return the median seconds from the end of a read to that of the next, for reads of each of two lengths.

    Lengths take turns over the places, and IN_FLIGHT threads read.
    """

    def read(mine: Sequence[tuple[Member, int]]) -> list[list[float]]:
        memory = np.frombuffer(map_memory(max(lengths)), np.uint8)
        times: list[list[float]] = [[], []]
        for turn, (file, start) in enumerate(mine):
            started = time.perf_counter()
            _read(file, start, memory[: lengths[turn % 2]])
            times[turn % 2].append(time.perf_counter() - started)
        return times

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        found = list(pool.map(read, (places[part::IN_FLIGHT] for part in range(IN_FLIGHT))))
    long_s, short_s = (median(t for times in found for t in times[kind]) / IN_FLIGHT for kind in (0, 1))
    return long_s, short_s


def _read(file: Member, start: int, memory: np.ndarray) -> None:
    read_into(file.fd, file.path, file.start + start, memoryview(memory))
