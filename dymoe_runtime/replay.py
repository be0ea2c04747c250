"""What a traced run spent its time on, and how it would have fared with other memory, and other things leaving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dymoe_runtime.bundle import Bundle
from dymoe_runtime.charts import Axis, Point, Series, element, page, plot, text
from dymoe_runtime.delivery import Want
from dymoe_runtime.read_queue import Source
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import ExpertStore, least_arena_bytes
from dymoe_runtime.warm_up import make_eviction


def parts_of_tokens(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    """Of each decoded token the milliseconds of waiting for reads, of experts otherwise, and of the rest."""
    totals = {line["pass"]: line["seconds"] for line in lines if "layer" not in line and not line["prompt"]}
    wait, inside = dict.fromkeys(totals, 0.0), dict.fromkeys(totals, 0.0)
    for line in lines:
        if "layer" in line and line["pass"] in totals:
            wait[line["pass"]] += line["wait_s"]
            inside[line["pass"]] += line["seconds"]
    return [(1e3 * wait[n], 1e3 * (inside[n] - wait[n]), 1e3 * (totals[n] - inside[n])) for n in totals]


def split(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean milliseconds of a decoded token: all, waiting for reads, the experts otherwise, and the rest."""
    parts = parts_of_tokens(lines)
    wait, experts, rest = (sum(column) / len(parts) for column in zip(*parts, strict=True)) if parts else (0.0,) * 3
    total = wait + experts + rest
    return {"tokens": len(parts), "total_ms": total, "wait_ms": wait, "experts_ms": experts, "rest_ms": rest}


def plot_split(lines: Sequence[Mapping[str, Any]], name: str) -> str:
    """An HTML page: where the time of each decoded token went, one part on top of the other."""
    parts = parts_of_tokens(lines)
    heights = [(rest, rest + experts, rest + experts + wait) for wait, experts, rest in parts]
    names = ("all but experts", "with experts in memory", "with waiting for reads")
    series = [
        Series(
            label,
            slot,
            [Point(n, height[slot], f"token {n}: {height[slot]:.2f} ms") for n, height in enumerate(heights)],
        )
        for slot, label in enumerate(names)
    ]
    figure = plot(
        "Time per token", series, Axis("token", whole=True), Axis("ms"), "Each line lies above the one before."
    )
    mean = split(lines)
    caption = f"{mean['tokens']:.0f} tokens, mean {mean['total_ms']:.2f} ms: waiting {mean['wait_ms']:.2f}, "
    caption += f"experts {mean['experts_ms']:.2f}, the rest {mean['rest_ms']:.2f}"
    return page(name, figure, element("p", text(caption)))


def replay(
    bundle: Bundle, lines: Sequence[Mapping[str, Any]], arena_bytes: int, fade: float, eviction: str
) -> dict[str, Any]:
    """How a store of `arena_bytes` with one of `EVICTIONS` would have fared, without look-ahead and preloading.

    It is the store itself with a reader that reads nothing, so it does what it would have done; but where more
    experts of a layer are wanted than can be held at once, what leaves depends on how fast reads are, and no
    memory is lent to long prompts.
    """
    spec = bundle.spec
    experts = len(bundle.manifest.layers) * spec.num_experts
    arena = max(arena_bytes, least_arena_bytes(bundle.layout, experts))
    leaving, shape = make_eviction(bundle, fade, eviction), (spec.num_layers, spec.num_experts)
    store = ExpertStore(
        bundle.layout, shape, _read_nothing, arena, leaving, experts, lambda tier, places: tier, backed=False
    )
    decoded, before = [], np.zeros(3)
    try:
        for line in lines:
            if "layer" in line:
                wants = [Want(ExpertKey(line["layer"], e), tier, n) for e, tier, n in line["wants"]]
                _ask(store, wants, line["tokens"] == 1)
                continue
            store.tick(line["tokens"])
            stats = store.stats
            now = np.array([stats.requests, stats.hits, stats.read_bytes], float)
            if not line["prompt"]:
                decoded.append(now - before)
            before = now
    finally:
        store.close()
    requests, hits, read_bytes = np.sum(decoded, axis=0) if decoded else np.zeros(3)
    return {
        "arena_bytes": arena,
        "fade": fade,
        "eviction": eviction,
        "hits": store.stats.hits,
        "read_bytes": store.stats.read_bytes,
        "decode_hit_rate": float(hits / max(requests, 1)),
        "decode_read_bytes_per_token": float(read_bytes / max(len(decoded), 1)),
    }


def format_replay(parts: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"traced      {parts['tokens']:.0f} tokens decoded, {parts['total_ms']:.2f} ms each: "
        f"waiting {parts['wait_ms']:.2f}, experts {parts['experts_ms']:.2f}, the rest {parts['rest_ms']:.2f}",
        "",
        f"{'arena MiB':>10}{'eviction':>11}{'fade':>8}{'hit rate':>10}{'MB/token':>10}",
    ]
    for row in rows:
        lines.append(
            f"{row['arena_bytes'] / (1 << 20):>10.0f}{row['eviction']:>11}{row['fade']:>8g}"
            f"{row['decode_hit_rate']:>10.1%}{row['decode_read_bytes_per_token'] / 1e6:>10.1f}"
        )
    return "\n".join(lines)


def _ask(store: ExpertStore, wants: Sequence[Want], of_token: bool) -> None:
    """As a run does, see StoredExperts."""
    held = store.hold(wants) if of_token and wants else None
    if held is None:
        for _ in store.begin(wants):
            pass
    else:
        if held.coming is not None:
            held.coming.wait()
        store.arrived(held)


def _read_nothing(key: ExpertKey, first: int, segments: int) -> Source:
    return Source(-1, Path(), 0, None)
