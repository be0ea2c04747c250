"""Which precision runs, and what is read for it: importance, depth, prefetching, operating points and budgets."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import PROMPT, answer, run_cli

from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.store.arena import min_arena_bytes


def test_importance_decides_bits_and_can_be_switched_off(shipped_path: Path) -> None:
    mixed = answer(shipped_path, "--point", 3)
    assert set(mixed["tier_shares"]) == {"2", "3", "4"} and 2.7 < mixed["bits_mean"] < 3.3
    uniform = answer(shipped_path, "--point", 3, "--no-dynamic")
    assert uniform["tier_shares"] == {"3": 1.0}


def test_depth_decides_bits_and_can_be_switched_off(shipped: Bundle) -> None:
    """By a point whose layers differ; where that did not pay, a point may have the same thresholds in all."""
    points = [p for p in shipped.policy.points if p.kind == "mixed" and len(set(p.decode)) > 1]
    point = max(points, key=lambda p: p.bits_mean)
    with_depth = answer(shipped.path, "--point", point.name)
    without = answer(shipped.path, "--point", point.name, "--no-depth")
    assert with_depth["tier_shares"] != without["tier_shares"]


def test_prefetching_turns_misses_into_hits_and_can_be_switched_off(shipped: Bundle) -> None:
    arena = int(shipped.expert_bytes() * 0.4)
    ahead = answer(shipped.path, "--arena", arena)
    plain = answer(shipped.path, "--arena", arena, "--no-prefetch")
    assert ahead["text"] == plain["text"]
    assert plain["look_ahead"] == {"reads": 0, "bytes": 0, "hits": 0, "waste": 0}
    assert ahead["look_ahead"]["hits"] > 10
    assert ahead["look_ahead"]["reads"] == ahead["look_ahead"]["hits"] + ahead["look_ahead"]["waste"]


def test_latency_runs_what_is_there(shipped_path: Path) -> None:
    small = ("--point", 3, "--arena", "3MB", "--no-prefetch", "--greedy")
    plain, quick = answer(shipped_path, *small, tokens=60), answer(shipped_path, *small, "--latency", tokens=60)
    assert quick["bits_mean"] < plain["bits_mean"] and quick["hit_rate"] > plain["hit_rate"]
    assert quick["tier_shares"]["2"] > plain["tier_shares"]["2"] + 0.02  # also of what is not there at all
    assert quick["tier_shares"]["4"] == pytest.approx(plain["tier_shares"]["4"], abs=0.1)
    assert run_cli(shipped_path, "--eval", __file__, "--latency").code == 2


@pytest.mark.parametrize("point", ["auto", "2", "3.0", "4"])
def test_points_are_taken_by_their_bits(shipped: Bundle, point: str) -> None:
    result = answer(shipped.path, "--point", point, tokens=4)
    if point != "auto":
        chosen = shipped.policy.point(result["point"])
        assert abs(chosen.bits_mean - float(point)) < 0.13
        assert all(p.kl >= chosen.kl for p in shipped.policy.points if abs(p.bits_mean - chosen.bits_mean) < 1e-9)


def test_auto_takes_fewer_bits_where_memory_is_short(shipped: Bundle) -> None:
    bits = [
        answer(shipped.path, "--point", "auto", "--arena", int(shipped.expert_bytes() * share), tokens=4)["bits_mean"]
        for share in (0.3, 1.2)
    ]
    assert bits[0] < 2.5 < 3.5 < bits[1]


@pytest.mark.parametrize("tier", [2, 3, 4])
def test_a_tier_can_be_forced(shipped_path: Path, tier: int) -> None:
    assert answer(shipped_path, "--tiers", tier, tokens=4)["tier_shares"] == {str(tier): 1.0}


@pytest.mark.parametrize("prompt", [PROMPT, "def main():\n    " * 40])
def test_every_budget_gives_the_same_tokens(shipped: Bundle, prompt: str) -> None:
    """Tiers depend on routing only, so memory decides speed and nothing else. The arena never outgrows its share."""
    least = min_arena_bytes(shipped.layout)
    texts = set()
    for share in (0.0, 0.25, 0.4, 0.6, 1.0):
        arena = least + int(shipped.expert_bytes() * share)
        for flags in ((), ("--no-prefetch",), ("--threads", 1)):
            result = answer(shipped.path, "--arena", arena, *flags, prompt=prompt)
            assert result["resident_bytes"] <= result["arena_bytes"] <= arena
            texts.add(result["text"])
    assert len(texts) == 1


@pytest.mark.parametrize(
    "args",
    [("--no-overlap",), ("--no-preload",), ("--eviction", "per-layer"), ("--eviction", "by-cost"), ("--threads", 1)],
)
def test_how_experts_come_does_not_change_the_text(args: tuple, shipped: Bundle) -> None:
    arena = ("--arena", shipped.expert_bytes() // 3)
    assert answer(shipped.path, *arena, *args)["text"] == answer(shipped.path)["text"]


def test_a_larger_arena_reads_less(shipped: Bundle) -> None:
    least = min_arena_bytes(shipped.layout)
    arenas = [least + int(shipped.expert_bytes() * share) for share in (0.0, 0.2, 0.5, 1.1)]
    read = [answer(shipped.path, "--arena", arena, "--no-prefetch", "--no-preload")["read_bytes"] for arena in arenas]
    assert read == sorted(read, reverse=True) and read[-1] <= shipped.expert_bytes()
