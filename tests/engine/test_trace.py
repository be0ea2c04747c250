"""A trace tells what happened, and its decisions can be taken again."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import assert_one_sentence, bundle_cli, run_cli
from trace_kit import PROMPT, TOKENS, half, lines_of, traced

from dymoe_runtime.bundle.bundle import Bundle


def test_a_trace_has_every_layer_of_every_pass(shipped_path: Path, tmp_path: Path) -> None:
    tail = ("--tiers", 4, "--arena", half(shipped_path), "--no-preload")
    result = traced(shipped_path, tmp_path / "trace.jsonl", *tail)
    lines = lines_of(tmp_path / "trace.jsonl")
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


def test_what_is_in_memory_is_traced_too(shipped_path: Path, tmp_path: Path) -> None:
    """As where it has to be read."""
    requests = []
    for arena in (1 << 30, half(shipped_path)):
        traced(shipped_path, tmp_path / "trace.jsonl", "--tiers", 4, "--arena", arena)
        lines = lines_of(tmp_path / "trace.jsonl")
        requests.append([sorted(line["wants"]) for line in lines if "layer" in line])
    assert requests[0] == requests[1]


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
    lines = lines_of(trace)
    return [sorted((expert, tier) for expert, tier, _ in line["wants"]) for line in lines if "layer" in line]


def test_decisions_of_another_run_are_refused(shipped_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    traced(shipped_path, path, "--point", 3)
    tail = ("--decisions", path, "--ignore-eos", "--max-tokens")
    refused = [
        ("--prompt", PROMPT, "--point", 3, *tail, TOKENS + 1),  # more tokens than there are
        ("--prompt", "something else, which is a little longer than that", "--point", 3, *tail, 4),
        ("--prompt", "def __init__(self, mane):", "--point", 3, *tail, 9),
        ("--prompt", PROMPT, "--tiers", 4, *tail, 4),
    ]
    for args in refused:
        assert_one_sentence(run_cli(shipped_path, *args), "trace")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"pass": 3,' not in line or '"layer": 1,' not in line))
    assert_one_sentence(run_cli(shipped_path, "--prompt", PROMPT, "--point", 3, *tail, 9), "trace")
    wrong = [("--latency",), ("--tpot", "100ms"), ("--trace", path)]
    assert all(run_cli(shipped_path, "--prompt", PROMPT, *tail, 4, *args).code == 2 for args in wrong)


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
