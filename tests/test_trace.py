"""A trace tells what happened, and a replay of it what would have."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
from conftest import assert_one_sentence, bundle_cli, run_cli

from dymoe_runtime import arena as arena_module
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.eviction import EVICTIONS
from dymoe_runtime.replay import parts_of_tokens

TOKENS = 30


def traced(bundle: Path, path: Path, *args: object) -> dict:
    """The run's own figures."""
    tail = ("--max-tokens", TOKENS, "--ignore-eos", "--json", "--trace", path, *args)
    outcome = run_cli(bundle, "--prompt", "def __init__(self, name):", *tail)
    assert outcome.code == 0, outcome.err
    return outcome.json


def half(bundle: Path) -> int:
    return Bundle.open(bundle).expert_bytes() // 2


def test_a_trace_has_every_layer_of_every_pass(shipped_path: Path, tmp_path: Path) -> None:
    tail = ("--tiers", 4, "--arena", half(shipped_path), "--no-preload")
    result = traced(shipped_path, tmp_path / "trace.jsonl", *tail)
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    spec = Bundle.open(shipped_path).spec
    layers = [line for line in lines if "layer" in line]
    passes = [line for line in lines if "layer" not in line]
    assert len(passes) == TOKENS  # the prompt, and a token less than there are, for the last is not run
    assert [line["layer"] for line in layers] == list(spec.moe_layers) * TOKENS
    assert all(len(line["wants"]) == spec.top_k == len(line["gates"]) for line in layers if line["tokens"] == 1)
    assert all(tier == 4 for line in layers for _, tier, _ in line["wants"])
    assert sum(line["read_bytes"] for line in layers) == result["read_bytes"]
    assert sum(line["hits"] for line in layers) / sum(len(line["wants"]) for line in layers) == result["hit_rate"]
    for line in passes:
        own = [layer for layer in layers if layer["pass"] == line["pass"]]
        assert 0 <= sum(layer["wait_s"] for layer in own) <= sum(layer["seconds"] for layer in own) <= line["seconds"]


def test_what_is_at_hand_is_traced_too(shipped_path: Path, tmp_path: Path) -> None:
    """As where it has to be read."""
    wants = []
    for arena in (1 << 30, half(shipped_path)):
        traced(shipped_path, tmp_path / "trace.jsonl", "--tiers", 4, "--arena", arena)
        lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
        wants.append([sorted(line["wants"]) for line in lines if "layer" in line])
    assert wants[0] == wants[1]


@pytest.mark.parametrize("setting", [("--tiers", 4), ("--point", 3)])
@pytest.mark.parametrize("share", [3, 5, 9])
def test_a_replay_fares_as_the_store_did(shipped_path: Path, tmp_path: Path, setting: tuple, share: int) -> None:
    arena = Bundle.open(shipped_path).expert_bytes() * share // 10
    path = tmp_path / "trace.jsonl"
    result = traced(shipped_path, path, *setting, "--arena", arena, "--no-look-ahead", "--no-preload")
    outcome = bundle_cli("replay", shipped_path, path, "--arena", arena, "--json")
    assert outcome.code == 0, outcome.err
    (row,) = outcome.json["replayed"]
    requests = sum(len(json.loads(line)["wants"]) for line in path.read_text().splitlines() if "layer" in line)
    assert row["hits"] == round(result["hit_rate"] * requests)
    assert row["read_bytes"] == result["read_bytes"]


def test_a_replay_tries_memory_and_ways_to_forget(shipped_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    traced(shipped_path, path, "--tiers", 4, "--arena", half(shipped_path))
    outcome = bundle_cli("replay", shipped_path, path, "--arena", "3MiB", "6MiB", "--fade", 1, 1.01, 2, "--json")
    rows = outcome.json["replayed"]
    assert [(row["arena_bytes"], row["fade"]) for row in rows] == [
        (size << 20, fade) for size in (3, 6) for fade in (1, 1.01, 2)
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
    assert page.read_text().count("token ") >= 3 * (TOKENS - 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    parts = parts_of_tokens(lines)
    total = sum(line["seconds"] for line in lines if "layer" not in line and line["tokens"] == 1)
    assert sum(map(sum, parts)) == pytest.approx(1e3 * total)
    assert outcome.json["traced"]["total_ms"] == pytest.approx(1e3 * total / len(parts))
    assert min(map(min, parts)) >= 0
    assert bundle_cli("replay", shipped_path, path, "--plot", tmp_path / "no" / "plot.html").code == 1


def test_decisions_of_a_trace_are_taken_again(shipped_path: Path, tmp_path: Path) -> None:
    """What --latency decided by what was in memory, now with other memory, in another order and bit for bit."""
    path, again = tmp_path / "trace.jsonl", tmp_path / "again.jsonl"
    setting = ("--point", 3)
    first = traced(shipped_path, path, *setting, "--latency", "--arena", half(shipped_path) // 2)
    plain = traced(shipped_path, again, *setting)
    assert tiers_of(path) != tiers_of(again)
    for arena in (half(shipped_path), 1 << 30):
        replayed = traced(shipped_path, again, *setting, "--decisions", path, "--arena", arena)
        assert tiers_of(path) == tiers_of(again)
        assert (replayed["text"], replayed["bits_mean"]) == (first["text"], first["bits_mean"])
    assert plain["bits_mean"] > first["bits_mean"]


def tiers_of(trace: Path) -> list[list[tuple[int, int]]]:
    """Experts and tiers of each layer of each pass."""
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    return [sorted((expert, tier) for expert, tier, _ in line["wants"]) for line in lines if "layer" in line]


def test_decisions_of_another_run_are_refused(shipped_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    traced(shipped_path, path, "--point", 3)
    tail = ("--decisions", path, "--ignore-eos", "--max-tokens")
    prompt = ("--prompt", "def __init__(self, name):")
    refused = [
        (*prompt, "--point", 3, *tail, TOKENS + 1),  # more tokens than there are
        ("--prompt", "something else, which is a little longer than that", "--point", 3, *tail, 4),
        ("--prompt", "def __init__(self, mane):", "--point", 3, *tail, 9),
        (*prompt, "--tiers", 4, *tail, 4),
    ]
    for args in refused:
        assert_one_sentence(run_cli(shipped_path, *args), "trace")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"pass": 3,' not in line or '"layer": 1,' not in line))
    assert_one_sentence(run_cli(shipped_path, *prompt, "--point", 3, *tail, 9), "trace")
    wrong = [("--latency",), ("--tpot", "100ms"), ("--trace", path)]
    assert all(run_cli(shipped_path, *prompt, *tail, 4, *args).code == 2 for args in wrong)


def test_what_cannot_be_traced_is_refused(shipped_path: Path, tmp_path: Path) -> None:
    assert run_cli(shipped_path, "--probe", "--trace", tmp_path / "trace.jsonl").code == 2
    outcome = run_cli(shipped_path, "--prompt", "a", "--trace", tmp_path / "missing" / "trace.jsonl")
    assert outcome.code == 1 and outcome.err.count("\n") == 1


def test_what_is_no_trace_is_refused(shipped_path: Path, tmp_path: Path) -> None:
    layer = {
        "pass": 0,
        "tokens": 1,
        "layer": 0,
        "wants": [[1, 4, 1]],
        "hits": 0,
        "read_bytes": 0,
        "look_ahead_bytes": 0,
        "wait_s": 0,
        "seconds": 1,
    }
    (tmp_path / "trace.jsonl").write_text(json.dumps(layer))
    assert bundle_cli("replay", shipped_path, tmp_path / "trace.jsonl").code == 0
    wrong = [
        {"wants": [[9999, 4, 1]]},
        {"wants": [[1, 7, 1]]},
        {"wants": [[-1, 4, 1]]},
        {"wants": [[1, 4, -1]]},
        {"wants": 3},
        {"layer": 99},
        {"hits": None},
    ]
    texts = ["", "not json", "[1]", '{"pass": 1}', json.dumps({"pass": 0, "tokens": 1, "layer": 0, "seconds": 1})]
    for text in texts + [json.dumps(layer | change) for change in wrong]:
        (tmp_path / "trace.jsonl").write_text(text)
        outcome = bundle_cli("replay", shipped_path, tmp_path / "trace.jsonl")
        assert outcome.code == 1 and "--trace" in outcome.err and outcome.err.count("\n") == 1
