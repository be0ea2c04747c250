"""Measured speed of this machine's kernels and disk with a bundle, and the predicted time per token of each point."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from dymoe_runtime.bundle.policy import OperatingPoint
from dymoe_runtime.bundle.tiers import split_record
from dymoe_runtime.engine.cost import CostModel
from dymoe_runtime.engine.model import LoadedModel
from dymoe_runtime.memory import address_of
from dymoe_runtime.model.routing import in_groups
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import IN_FLIGHT
from dymoe_runtime.store.read_queue import ReadQueue
from dymoe_runtime.store.read_threads import start_threads
from dymoe_runtime.store.request import Read
from dymoe_runtime.tools.machine.rates import resident_share, waiting_seconds
from dymoe_runtime.units import format_size

# Records read to measure the disk.
READS = 48
FEW_READS = 12
# Tokens timed without routed experts.
TOKENS = 5


def probe(model: LoadedModel) -> dict[str, Any]:
    """Return measured costs in us, the disk's bytes per second, and each point's predicted time per token.

    `model` must not have run yet, because the measurements overwrite its arena. The keys are a contract.
    """
    cost, dense_s = model.measure_cost(), dense_seconds(model)
    disk = disk_bytes_per_s(model, READS)
    points = [predict(model, point, cost, dense_s, disk) for point in model.bundle.policy.points]
    return {
        "kernels": model.kernels.name,
        "threads": model.kernels.threads(),
        "cost": cost.to_json(),
        "dense_ms": 1e3 * dense_s,
        "disk_bytes_per_s": disk,
        "arena_bytes": model.store.arena_bytes,
        "points": points,
    }


def dense_seconds(model: LoadedModel) -> float:
    """Return the median seconds of a decoded token without its routed experts."""
    decoder = model.decoder_without_experts()
    state = SequenceState(model.spec, TOKENS + 1)
    times = []
    for token in range(TOKENS):
        started = time.perf_counter()
        decoder.logits(decoder.forward(np.array([token]), state))
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def pareto_points(model: LoadedModel) -> list[tuple[OperatingPoint, float]]:
    """Return (point, seconds per token) of the points that no other beats in both time and KL, by rising time.

    The seconds are predicted, as in `probe`.
    """
    cost, dense_s = model.measure_cost(counts=(1,)), dense_seconds(model)
    disk = disk_bytes_per_s(model, FEW_READS)
    timed = [(predict(model, p, cost, dense_s, disk)["tpot_ms"] / 1e3, p.kl, p) for p in model.bundle.policy.points]
    best: list[tuple[OperatingPoint, float]] = []
    for seconds, kl, point in sorted(timed, key=lambda item: item[:2]):
        if not best or kl < best[-1][0].kl:
            best.append((point, seconds))
    return best


def find_tpot(model: LoadedModel, target_s: float) -> None:
    """Start with the best point that should take at most `target_s` per token, or the fastest if none does.

    From then on the measured time of decoded tokens selects the point. `model` must not have run yet.
    """
    points = pareto_points(model)
    start = max((i for i, (_, seconds) in enumerate(points) if seconds <= target_s), default=0)
    model.hold_tpot([point for point, _ in points], start, target_s)


def disk_bytes_per_s(model: LoadedModel, count: int) -> float:
    """Return the disk's bytes per second, measured by reading `count` whole records at random.

    As many reads are in flight as in the store.
    """
    spec, bundle = model.spec, model.bundle
    spans = bundle.layout.segment_spans
    memory = model.store.empty_memory
    records = in_groups(memory[: IN_FLIGHT * sum(spans)], sum(spans))
    places = [[(address_of(part), len(part)) for part in split_record(bundle.layout, record)] for record in records]
    generator, layers = np.random.default_rng(0), list(spec.moe_layers)
    keys = [ExpertKey(int(generator.choice(layers)), int(generator.integers(spec.num_experts))) for _ in range(count)]
    queue = ReadQueue(model.reader, memory, start_threads(model.kernels.reads))
    try:
        # Only the second round counts: the first also checks the records, which takes longer than a fast disk.
        for _ in range(2):
            model.reader.forget()
            started = time.perf_counter()
            reads: list[Read] = []
            for index, key in enumerate(keys):
                if index >= IN_FLIGHT:
                    _finish(queue, reads[index - IN_FLIGHT])
                # It reuses the memory of the read that has just ended.
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
    model: LoadedModel, point: OperatingPoint, cost: CostModel, dense_s: float, disk_bytes_per_s: float
) -> dict[str, Any]:
    """Return the predicted cost of a decoded token at `point`, if the arena keeps the experts that are used most.

    Missing experts are read while the layer's other experts are computed. Prefetching, which would hide more of the
    reads, is not counted.
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


def _mix(bits: float, ladder: tuple[int, ...], top_k: int) -> list[tuple[int, int]]:
    """Return (tier, 1) of each expert of a token, from the two tiers around `bits`, so that the mean is close to it."""
    lower = max((tier for tier in ladder if tier <= bits), default=ladder[0])
    upper = min((tier for tier in ladder if tier >= bits), default=ladder[-1])
    many = 0 if upper == lower else round(top_k * (bits - lower) / (upper - lower))
    return [(upper, 1)] * many + [(lower, 1)] * (top_k - many)


def expected_hits(model: LoadedModel, point: OperatingPoint) -> float:
    """Return the share of a token's experts that are in memory if those used most are kept.

    Every expert is taken to have the mean size of an active expert at `point`.
    """
    rows = [layer.frequency for layer in model.bundle.policy.layers if layer.frequency]
    uses = np.sort(np.concatenate([np.asarray(row) for row in rows]))[::-1]
    size = point.bytes_per_token / (len(model.spec.moe_layers) * model.spec.top_k)
    return resident_share(uses.tolist(), model.store.arena_bytes / size)


def format_probe(result: Mapping[str, Any]) -> str:
    """Return the result of `probe` as text."""
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
