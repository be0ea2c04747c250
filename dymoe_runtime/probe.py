"""How fast this machine is with a bundle: its kernels, its disk, and what a token of each point should take."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from dymoe_runtime import kernels
from dymoe_runtime.cost import CostModel
from dymoe_runtime.decoder import Decoder, in_groups
from dymoe_runtime.device import format_size
from dymoe_runtime.kv_cache import KVCache
from dymoe_runtime.memory import address_of
from dymoe_runtime.model import Model
from dymoe_runtime.policy import OperatingPoint
from dymoe_runtime.read_queue import IN_FLIGHT, Read, ReadQueue
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.tiers import split_record

# Reads of the disk's probe.
READS = 48
FEW_READS = 12
# Tokens without experts that are timed.
TOKENS = 5


def probe(model: Model) -> dict[str, Any]:
    """Measured: costs in us, the disk's bytes per second; predicted: each point's time per token.

    `model` must not have run yet. The keys are a contract.
    """
    cost, dense_s = model.measure_cost(), dense_seconds(model)
    disk = disk_bytes_per_s(model, READS)
    points = [predict(model, point, cost, dense_s, disk) for point in model.bundle.policy.points]
    return {
        "kernels": kernels.isa(),
        "threads": kernels.threads(),
        "cost": cost.to_json(),
        "dense_ms": 1e3 * dense_s,
        "disk_bytes_per_s": disk,
        "arena_bytes": model.store.arena_bytes,
        "points": points,
    }


def dense_seconds(model: Model) -> float:
    """Median seconds of a token without its experts."""
    decoder: Decoder = model.decoder
    experts, decoder.experts = decoder.experts, lambda layer, h, routing: np.zeros_like(h)
    cache = KVCache(model.spec, TOKENS + 1)
    times = []
    try:
        for token in range(TOKENS):
            started = time.perf_counter()
            decoder.logits(decoder.forward(np.array([token]), cache))
            times.append(time.perf_counter() - started)
    finally:
        decoder.experts = experts
    return float(np.median(times))


def ladder_of_points(model: Model) -> list[tuple[OperatingPoint, float]]:
    """Points that no other beats in both, by rising time per token in seconds, measured and predicted as by `probe`."""
    cost, dense_s = model.measure_cost(counts=(1,)), dense_seconds(model)
    disk = disk_bytes_per_s(model, FEW_READS)
    timed = [(predict(model, p, cost, dense_s, disk)["tpot_ms"] / 1e3, p.kl, p) for p in model.bundle.policy.points]
    best: list[tuple[OperatingPoint, float]] = []
    for seconds, kl, point in sorted(timed, key=lambda item: item[:2]):
        if not best or kl < best[-1][0].kl:
            best.append((point, seconds))
    return best


def hold_pace(model: Model, target_s: float) -> None:
    """Start with the best point that should take at most `target_s` per token, else the fastest; then the clock says.

    `model` must not have run yet.
    """
    points = ladder_of_points(model)
    start = max((i for i, (_, seconds) in enumerate(points) if seconds <= target_s), default=0)
    model.hold_pace([point for point, _ in points], start, target_s)


def disk_bytes_per_s(model: Model, count: int) -> float:
    """Of `count` whole records at random, as many at the same time as the store reads."""
    spec, bundle = model.spec, model.bundle
    spans = bundle.layout.segment_spans
    memory = model.store.scratch()
    records = in_groups(memory[: IN_FLIGHT * sum(spans)], sum(spans))
    places = [[(address_of(part), len(part)) for part in split_record(bundle.layout, record)] for record in records]
    generator, layers = np.random.default_rng(0), list(spec.moe_layers)
    keys = [ExpertKey(int(generator.choice(layers)), int(generator.integers(spec.num_experts))) for _ in range(count)]
    queue = ReadQueue(model.reader, memory)
    try:
        # The first time round records are checked, which takes longer than a fast disk.
        for _ in range(2):
            model.reader.forget()
            started = time.perf_counter()
            reads: list[Read] = []
            for index, key in enumerate(keys):
                if index >= IN_FLIGHT:
                    _finish(queue, reads[index - IN_FLIGHT])
                # It takes the place of the read that has just ended.
                reads.append(Read(key, 0, places[index % len(places)]))
                queue.submit(reads[-1])
            for read in reads[-IN_FLIGHT:]:
                _finish(queue, read)
            seconds = time.perf_counter() - started
    finally:
        queue.close()
    return count * sum(spans) / seconds


def _finish(queue: ReadQueue, read: Read) -> None:
    queue.wait(read)
    if read.error is not None:
        raise read.error


def predict(
    model: Model, point: OperatingPoint, cost: CostModel, dense_s: float, disk_bytes_per_s: float
) -> dict[str, Any]:
    """What a decoded token of `point` should take, if the arena keeps the experts that are used most.

    What is missing is read while the layer's other experts are computed; look-ahead, which hides more, is not counted.
    """
    spec, layout = model.spec, model.bundle.layout
    layers = len(spec.moe_layers)
    used = cost.layer(_mix(point.bits_mean, layout.ladder, spec.top_k)) * layers
    missed = 1 - expected_hits(model, point)
    read_s = point.bytes_per_token * missed / disk_bytes_per_s
    each = layers * spec.top_k
    wait_s = layers * waiting_seconds(spec.top_k, missed, point.bytes_per_token / each / disk_bytes_per_s, used / each)
    return {
        "name": point.name,
        "kl": point.kl,
        "compute_ms": 1e3 * (dense_s + used),
        "read_bytes_per_token": point.bytes_per_token * missed,
        "read_ms": 1e3 * read_s,
        "tpot_ms": 1e3 * (dense_s + used + wait_s),
    }


def waiting_seconds(experts: int, missed: float, read_s: float, compute_s: float) -> float:
    """Expected wait of a layer for experts that are each missing with that probability, while the others compute."""
    return sum(
        math.comb(experts, n)
        * missed**n
        * (1 - missed) ** (experts - n)
        * max(0.0, n * read_s - (experts - n) * compute_s)
        for n in range(1, experts + 1)
    )


def _mix(bits: float, ladder: tuple[int, ...], top_k: int) -> list[tuple[int, int]]:
    """(tier, 1) of each expert of a token, of the two tiers around `bits`, so that their mean is about that."""
    lower = max((tier for tier in ladder if tier <= bits), default=ladder[0])
    upper = min((tier for tier in ladder if tier >= bits), default=ladder[-1])
    many = 0 if upper == lower else round(top_k * (bits - lower) / (upper - lower))
    return [(upper, 1)] * many + [(lower, 1)] * (top_k - many)


def expected_hits(model: Model, point: OperatingPoint) -> float:
    """Share of the experts of a token that are in memory, if those used most are kept at the point's mean size."""
    rows = [layer.frequency for layer in model.bundle.policy.layers if layer.frequency]
    uses = np.sort(np.concatenate([np.asarray(row) for row in rows]))[::-1]
    size = point.bytes_per_token / (len(model.spec.moe_layers) * model.spec.top_k)
    kept = int(model.store.arena_bytes / size)
    return float(uses[:kept].sum() / uses.sum())


def format_probe(result: Mapping[str, Any]) -> str:
    """The result of `probe` for a person."""
    cost = result["cost"]
    lines = [
        f"kernels     {result['kernels']}, {result['threads']} threads",
        f"disk        {format_size(result['disk_bytes_per_s'])}/s",
        f"dense       {result['dense_ms']:.2f} ms per token, all but the experts",
        f"a call of a layer's experts takes {cost['call_us']:.0f} us, and each expert of so many tokens, in us:",
        "tier" + "".join(f"{tokens:>8}" for tokens in cost["tokens"]),
    ]
    lines += [f"{tier:>4}" + "".join(f"{us:>8.0f}" for us in row) for tier, row in cost["expert_us"].items()]
    lines += ["", f"expected per token, with {format_size(result['arena_bytes'])} of experts in memory:"]
    lines += [f"{'point':<12}{'KL':>9}{'compute ms':>12}{'read':>11}{'read ms':>9}{'tokens/s':>10}"]
    for p in result["points"]:
        lines.append(
            f"{p['name']:<12}{p['kl']:>9.4f}{p['compute_ms']:>12.2f}{format_size(p['read_bytes_per_token']):>11}"
            f"{p['read_ms']:>9.2f}{1e3 / p['tpot_ms']:>10.1f}"
        )
    return "\n".join(lines)
