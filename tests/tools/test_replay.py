"""A replay of a trace tells what would have happened with other memory."""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path

import pytest
from compile_kit import Page
from helpers import bundle_cli
from trace_kit import PROMPT, TOKENS, half, lines_of, traced

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.store import EVICTIONS
from dymoe_runtime.store import arena as arena_module
from dymoe_runtime.tools.charts.numbers import percent, size
from dymoe_runtime.tools.replay import parts_of_tokens


@pytest.mark.parametrize("setting", [("--tiers", 4), ("--point", 3)])
@pytest.mark.parametrize(("share", "prompt"), [(3, "d"), (5, "d"), (9, PROMPT)])
def test_a_replay_fares_as_the_store_did(
    shipped_path: Path, tmp_path: Path, setting: tuple, share: int, prompt: str
) -> None:
    # The experts of a longer prompt would not fit at once in three or five tenths. Then evictions of the run depend on
    # how fast reads are.
    arena = Bundle.open(shipped_path).expert_bytes() * share // 10
    path = tmp_path / "trace.jsonl"
    memory = ("--arena", arena, "--no-prefetch", "--no-preload")
    result = traced(shipped_path, path, *setting, *memory, prompt=prompt)
    outcome = bundle_cli("replay", shipped_path, path, "--arena", arena, "--json")
    assert outcome.code == 0, outcome.err
    (row,) = outcome.json["replayed"]
    requests = sum(len(line["wants"]) for line in lines_of(path) if "layer" in line)
    assert row["hits"] == round(result["hit_rate"] * requests)
    assert row["read_bytes"] == result["read_bytes"]


def test_a_replay_tries_memory_and_ways_to_forget(shipped_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    traced(shipped_path, path, "--tiers", 4, "--arena", half(shipped_path))
    outcome = bundle_cli("replay", shipped_path, path, "--arena", "3MiB", "6MiB", "--decay", 1, 1.01, 2, "--json")
    rows = outcome.json["replayed"]
    assert [(row["arena_bytes"], row["fade"]) for row in rows] == [
        (size << 20, decay) for size in (3, 6) for decay in (1, 1.01, 2)
    ]
    assert min(row["decode_hit_rate"] for row in rows[3:]) > max(row["decode_hit_rate"] for row in rows[:3])
    assert outcome.json["traced"]["tokens"] == TOKENS - 1
    assert "hit rate" in bundle_cli("replay", shipped_path, path).out


def test_a_replay_needs_none_of_the_memory_that_it_tries(
    shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.jsonl"
    traced(shipped_path, path, "--tiers", 4, "--arena", half(shipped_path))
    sizes: list[int] = []
    real = arena_module.map_memory

    def mapped(nbytes: int) -> mmap.mmap:
        sizes.append(nbytes)
        return real(nbytes)

    monkeypatch.setattr(arena_module, "map_memory", mapped)
    assert bundle_cli("replay", shipped_path, path, "--arena", "3MiB", "1GiB").code == 0
    assert sizes == [0, 0]


def test_a_replay_tries_ways_to_choose_what_leaves(shipped_path: Path, tmp_path: Path) -> None:
    """They differ where memory is short, and not at all where nothing has to leave."""
    path = tmp_path / "trace.jsonl"
    traced(shipped_path, path, "--tiers", 4, "--arena", half(shipped_path))
    evictions = [word for eviction in EVICTIONS for word in ("--eviction", eviction)]
    rows = bundle_cli("replay", shipped_path, path, "--arena", "4MiB", "1GiB", *evictions, "--json").json["replayed"]
    assert [row["eviction"] for row in rows] == [*EVICTIONS, *EVICTIONS]
    assert len({row["read_bytes"] for row in rows[:3]}) > 1
    assert len({(row["hits"], row["read_bytes"]) for row in rows[3:]}) == 1
    assert bundle_cli("replay", shipped_path, path, "--eviction", "random").code == 2


def test_a_plot_shows_where_the_time_of_each_token_went(shipped_path: Path, tmp_path: Path) -> None:
    path, page = tmp_path / "trace.jsonl", tmp_path / "plot.html"
    traced(shipped_path, path, "--tiers", 4, "--arena", half(shipped_path))
    outcome = bundle_cli("replay", shipped_path, path, "--plot", page, "--json")
    lines = lines_of(path)
    parts = parts_of_tokens(lines)
    total = sum(line["seconds"] for line in lines if "layer" not in line and line["tokens"] == 1)
    assert sum(map(sum, parts)) == pytest.approx(1e3 * total)
    assert outcome.json["traced"]["total_ms"] == pytest.approx(1e3 * total / len(parts))
    assert min(map(min, parts)) >= 0
    assert bundle_cli("replay", shipped_path, path, "--plot", tmp_path / "no" / "plot.html").code == 1
    drawn = page.read_text()
    tips = re.findall(r"<title>token \d+: ([\d.]+) \(the rest ([\d.]+), experts ([\d.]+), waiting ([\d.]+)\)", drawn)
    assert len(tips) == len(parts)
    for tip, part in zip(tips, parts, strict=True):
        assert [float(figure) for figure in tip] == pytest.approx([sum(part), *part[::-1]], rel=1e-3)


def test_a_plot_says_budget_point_and_hit_rate(shipped_path: Path, tmp_path: Path) -> None:
    path, page = tmp_path / "<b>\u202etrace.jsonl", tmp_path / "plot.html"
    traced(shipped_path, path, "--point", 3, "--arena", half(shipped_path))
    rows = bundle_cli("replay", shipped_path, path, "--arena", "4MiB", "--plot", page, "--json").json["replayed"]
    parsed = Page(page.read_text(encoding="utf-8"))
    assert "<b>\\u202etrace.jsonl" in parsed.texts
    ends = [line for line in lines_of(path) if "layer" not in line]
    decoded = {line["pass"] for line in ends if not line["prompt"]}
    inside = [line for line in lines_of(path) if "layer" in line and line["pass"] in decoded]
    hit_rate = sum(line["hits"] for line in inside) / sum(len(line["wants"]) for line in inside)
    assert {line["arena_bytes"] for line in ends} == {half(shipped_path)}
    assert {"3", size(ends[0]["memory_bytes"]), percent(hit_rate)} <= set(parsed.texts)
    assert f"of it {size(half(shipped_path))} for experts" in parsed.texts
    (row,) = parsed.rows[1:]
    assert row[0] == size(rows[0]["arena_bytes"]) and percent(rows[0]["decode_hit_rate"]) in row
    old = [{k: v for k, v in line.items() if k not in ("memory_bytes", "arena_bytes")} for line in lines_of(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert bundle_cli("replay", shipped_path, path, "--plot", page).code == 0
    assert "the trace is older than this figure" in page.read_text(encoding="utf-8")
