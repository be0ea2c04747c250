"""What each layer of each pass wanted, found and waited for, line by line; and how another store would have fared."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from dymoe_runtime.bundle import Bundle
from dymoe_runtime.charts import Axis, Point, Series, element, page, plot, text
from dymoe_runtime.decoder import Experts, Routing
from dymoe_runtime.delivery import Want
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.read_queue import Source
from dymoe_runtime.residency import StoreStats
from dymoe_runtime.spec import ExpertKey
from dymoe_runtime.store import ExpertStore, least_arena_bytes
from dymoe_runtime.warm_up import make_eviction


class Tracer:
    """Writes one JSON object a line: of each layer, then of the pass as a whole.

    A layer has `pass`, `tokens`, `layer`, `wants` ([expert, tier, tokens that use it] each), `gates` of a single
    token, `hits`, `wait_s` and `seconds` of the routed experts, and what reads have begun since the line before,
    `read_bytes`, of these for look-ahead `look_ahead_bytes`; a pass has `pass`, `tokens`, `seconds`, `point` and
    `prompt`, whether it is of one.
    """

    def __init__(self, stream: IO[str], store: ExpertStore) -> None:
        self._stream = stream
        self._store = store
        self._pass = 0
        self._wants: Sequence[Want] = ()
        self._before = replace(store.stats)
        store.observer = self._note

    def around(self, experts: Experts) -> Experts:
        """The same experts, traced."""

        def traced(layer: int, h: torch.Tensor, routing: Routing) -> torch.Tensor:
            self._note(())
            started = time.perf_counter()
            y = experts(layer, h, routing)
            seconds = time.perf_counter() - started
            before, now = self._before, replace(self._store.stats)
            line: dict[str, Any] = {"pass": self._pass, "tokens": len(h), "layer": layer}
            line["wants"] = [[key.expert, tier, tokens] for key, tier, tokens in self._wants]
            if len(h) == 1:
                line["gates"] = [round(gate, 6) for gate in routing.gates[0].tolist()]
            for name in ("hits", "read_bytes", "look_ahead_bytes", "wait_s"):
                line[name] = getattr(now, name) - getattr(before, name)
            self._before = now
            self._write(line | {"seconds": seconds})
            return y

        return traced

    def stats_were_reset(self) -> None:
        self._before = StoreStats()

    def passed(self, tokens: int, seconds: float, point: str, prompt: bool) -> None:
        """All layers are done."""
        line = {"pass": self._pass, "tokens": tokens, "seconds": seconds, "point": point, "prompt": prompt}
        self._write(line)
        self._pass += 1

    def close(self) -> None:
        self._stream.close()

    def _note(self, wants: Sequence[Want]) -> None:
        self._wants = wants

    def _write(self, line: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(line) + "\n")


def read_trace(path: Path, bundle: Bundle) -> list[dict[str, Any]]:
    """The lines of a trace of `bundle`; DymoeError where it is not one."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        sound = all(_fits(line, bundle) for line in lines)
    except (ValueError, TypeError, KeyError) as error:
        raise DymoeError(f"{path}: not a trace ({error!r}); make one with dymoe-run --trace") from error
    if not lines or not sound:
        raise DymoeError(f"{path}: not a trace of this bundle; make one with dymoe-run --trace")
    return lines


def _fits(line: Mapping[str, Any], bundle: Bundle) -> bool:
    counts = [line["pass"], line["tokens"]]
    if "layer" in line:
        counts += [line["hits"], line["read_bytes"], line["look_ahead_bytes"]]
        known = line["layer"] in bundle.manifest.layers and line["wait_s"] >= 0
        experts, ladder = range(bundle.spec.num_experts), bundle.manifest.ladder
        if not known or not all(expert in experts and tier in ladder for expert, tier, _ in line["wants"]):
            return False
        counts += [tokens for _, _, tokens in line["wants"]]
    elif not isinstance(line["point"], str) or not isinstance(line["prompt"], bool):
        return False
    return all(isinstance(count, int) and count >= 0 for count in counts) and line["seconds"] >= 0


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


class Decisions:
    """The tiers that a traced run chose, for a run of the same prompt to choose them again."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], where: str) -> None:
        self._where = where
        self._passes = [line for line in lines if "layer" not in line]
        self._tiers = {
            (line["pass"], line["layer"]): {expert: tier for expert, tier, _ in line["wants"]}
            for line in lines
            if "layer" in line and line["tokens"] == 1
        }
        self._next = 0  # pass
        self._left = 0  # tokens of the pass before that

    def begin(self, tokens: int, prompt: bool) -> str:
        """The point that the coming tokens ran at; DymoeError where the trace has no such passes.

        A prompt may be divided into other passes than it was.
        """
        while self._left < tokens:
            if self._next == len(self._passes) or self._passes[self._next]["prompt"] != prompt:
                raise self._foreign()
            self._left += self._passes[self._next]["tokens"]
            self._next += 1
        self._left -= tokens
        return str(self._passes[self._next - 1]["point"])

    def tiers(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Of the experts of the token that is decoded; 0 is skipped."""
        chosen = self._tiers.get((self._passes[self._next - 1]["pass"], layer))
        if chosen is None or not chosen.keys() <= set(experts):
            raise self._foreign()
        return [chosen.get(expert, 0) for expert in experts]

    def _foreign(self) -> DymoeError:
        return DymoeError(
            f"{self._where}: the trace is not of this prompt and these options (pass {self._next}); trace them anew"
        )


def replay(
    bundle: Bundle, lines: Sequence[Mapping[str, Any]], arena_bytes: int, fade: float, policy: str
) -> dict[str, Any]:
    """How a store of `arena_bytes` with one of `POLICIES` would have fared, without look-ahead and preloading.

    It is the store itself with a reader that reads nothing, so it does what it would have done; but where more
    experts of a layer are wanted than can be held at once, what leaves depends on how fast reads are, and no
    memory is lent to long prompts.
    """
    spec = bundle.spec
    arena = max(arena_bytes, least_arena_bytes(bundle.layout))
    eviction = make_eviction(bundle, fade, policy)
    store = ExpertStore(bundle.layout, (spec.num_layers, spec.num_experts), _read_nothing, arena, eviction)
    decoded, before = [], np.zeros(3)
    try:
        for line in lines:
            if "layer" in line:
                for _ in store.begin([Want(ExpertKey(line["layer"], e), tier, n) for e, tier, n in line["wants"]]):
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
    requests, hits, read_bytes = np.sum(decoded, axis=0) if decoded else np.zeros(3)
    return {
        "arena_bytes": arena,
        "fade": fade,
        "policy": policy,
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
        f"{'arena MiB':>10}{'policy':>11}{'fade':>8}{'hit rate':>10}{'MB/token':>10}",
    ]
    for row in rows:
        lines.append(
            f"{row['arena_bytes'] / (1 << 20):>10.0f}{row['policy']:>11}{row['fade']:>8g}"
            f"{row['decode_hit_rate']:>10.1%}{row['decode_read_bytes_per_token'] / 1e6:>10.1f}"
        )
    return "\n".join(lines)


def _read_nothing(key: ExpertKey, first: int, segments: int) -> Source:
    return Source(-1, Path(), 0, None)
