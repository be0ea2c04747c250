"""Analysis of a traced run: where its time went, and how another arena size or eviction would have done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store.arena import min_arena_bytes
from dymoe_runtime.store.request import ExpertRequest, Source
from dymoe_runtime.store.store import ExpertStore
from dymoe_runtime.store.warm_up import make_eviction


def parts_of_tokens(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    """Return (waiting for reads, other time in experts, the rest) in ms of each decoded token."""
    totals = {line["pass"]: line["seconds"] for line in lines if "layer" not in line and not line["prompt"]}
    wait, inside = dict.fromkeys(totals, 0.0), dict.fromkeys(totals, 0.0)
    for line in lines:
        if "layer" in line and line["pass"] in totals:
            wait[line["pass"]] += line["wait_s"]
            inside[line["pass"]] += line["seconds"]
    return [(1e3 * wait[n], 1e3 * (inside[n] - wait[n]), 1e3 * (totals[n] - inside[n])) for n in totals]


def split(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean milliseconds of a decoded token: total, waiting for reads, other time in experts, and the rest.

    `tokens` is the number of decoded tokens; all means are 0 if there are none.
    """
    parts = parts_of_tokens(lines)
    wait, experts, rest = (sum(column) / len(parts) for column in zip(*parts, strict=True)) if parts else (0.0,) * 3
    total = wait + experts + rest
    return {"tokens": len(parts), "total_ms": total, "wait_ms": wait, "experts_ms": experts, "rest_ms": rest}


def replay(
    bundle: Bundle, lines: Sequence[Mapping[str, Any]], arena_bytes: int, decay: float, eviction: str
) -> dict[str, Any]:
    """Return the hits and read bytes of a trace replayed with a store of `arena_bytes`.

    `eviction` is one of `EVICTIONS`. The store is that of a run, with a reader that reads nothing, so its decisions are
    the same. Prefetching and preloading are left out, and prompts borrow no memory. If a layer needs more experts than
    fit at once, evictions of a run depend on how fast reads are, so the replay may differ.
    """
    spec = bundle.spec
    arena = max(arena_bytes, min_arena_bytes(bundle.layout, spec.total_experts))
    store = ExpertStore(
        bundle.layout,
        (spec.num_layers, spec.num_experts),
        _read_nothing,
        arena,
        lambda tier, places: tier,
        make_eviction(bundle, decay, eviction),
        spec.total_experts,
        backed=False,
    )
    decoded, before = [], np.zeros(3)
    try:
        for line in lines:
            if "layer" in line:
                requests = [ExpertRequest(ExpertKey(line["layer"], e), tier, n) for e, tier, n in line["wants"]]
                with store.acquire(requests) as lease:
                    for _ in lease.batches():
                        pass
                continue
            store.tick(line["tokens"])
            stats = store.stats
            now = np.array([stats.requests, stats.hits, stats.read_bytes], float)
            if not line["prompt"]:
                decoded.append(now - before)
            before = now
    finally:
        store.close()
    asked, hits, read_bytes = np.sum(decoded, axis=0) if decoded else np.zeros(3)
    return {
        "arena_bytes": arena,
        "fade": decay,
        "eviction": eviction,
        "hits": store.stats.hits,
        "read_bytes": store.stats.read_bytes,
        "decode_hit_rate": float(hits / max(asked, 1)),
        "decode_read_bytes_per_token": float(read_bytes / max(len(decoded), 1)),
    }


def format_replay(parts: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the results of `split` and of several calls of `replay` as text."""
    lines = [
        f"traced      {parts['tokens']:.0f} tokens decoded, {parts['total_ms']:.2f} ms each: "
        f"waiting {parts['wait_ms']:.2f}, experts {parts['experts_ms']:.2f}, the rest {parts['rest_ms']:.2f}",
        "",
        f"{'arena MiB':>10}{'eviction':>11}{'decay':>8}{'hit rate':>10}{'MB/token':>10}",
    ]
    for row in rows:
        lines.append(
            f"{row['arena_bytes'] / (1 << 20):>10.0f}{row['eviction']:>11}{row['fade']:>8g}"
            f"{row['decode_hit_rate']:>10.1%}{row['decode_read_bytes_per_token'] / 1e6:>10.1f}"
        )
    return "\n".join(lines)


def _read_nothing(key: ExpertKey, first: int, segments: int) -> Source:
    return Source(-1, Path(), 0, None)
