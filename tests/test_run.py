"""Running bundles: the command's contract, its mechanisms, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, MODEL, Outcome, assert_one_sentence, bundle_cli, compile_cli, run_cli, save_tiny

from dymoe_runtime import budget as budget_module
from dymoe_runtime import kernels
from dymoe_runtime import model as model_module
from dymoe_runtime.budget import SPREAD_BYTES, Budget, plan_budget
from dymoe_runtime.bundle import Bundle
from dymoe_runtime.decoder import Routing
from dymoe_runtime.evaluate import log_softmax
from dymoe_runtime.model import Model
from dymoe_runtime.options import RunOptions
from dymoe_runtime.policy import ALWAYS, TierRule
from dymoe_runtime.store import least_arena_bytes

COMPILED = kernels.native is not None
PROMPT = "The river flows through the town of"
BENCH_KEYS = {
    "ttft_s",
    "tpot_s",
    "prompt_tokens_per_s",
    "tokens_per_s",
    "read_bytes",
    "read_bytes_per_token",
    "hit_rate",
    "bits_mean",
    "peak_rss_bytes",
}


def answer(bundle: Path, *args: object, prompt: str = PROMPT, tokens: int = 24) -> dict:
    outcome = run_cli(bundle, "--prompt", prompt, "--max-tokens", tokens, "--ignore-eos", "--json", *args)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(outcome.json["text"])
    return outcome.json


def test_a_prompt_comes_as_a_flag_a_file_or_stdin(shipped_path: Path, tmp_path: Path) -> None:
    expected = answer(shipped_path)["text"]
    (tmp_path / "prompt.txt").write_text(PROMPT)
    tail = ("--max-tokens", 24, "--ignore-eos", "--json")
    assert run_cli(shipped_path, "--prompt-file", tmp_path / "prompt.txt", *tail).json["text"] == expected
    assert run_cli(shipped_path, *tail, stdin=PROMPT).json["text"] == expected
    assert run_cli(shipped_path, "--prompt-file", "-", *tail, stdin=PROMPT).json["text"] == expected


def test_bench_gives_the_keys_of_the_contract(tiny_path: Path) -> None:
    outcome = run_cli(tiny_path, "--bench", "--prompt-tokens", 9, "--new-tokens", 5, "--json")
    assert set(outcome.json) >= BENCH_KEYS
    assert outcome.json["prompt_tokens"] == 9 and outcome.json["new_tokens"] == 5
    assert "bits per active expert" in run_cli(tiny_path, "--bench", "--prompt-tokens", 9, "--new-tokens", 5).out
    warm = run_cli(tiny_path, "--bench", "--prompt-tokens", 9, "--new-tokens", 5, "--warm-up", "--json").json
    assert warm["prompt_tokens"] == 9 and warm["read_bytes"] < outcome.json["read_bytes"]
    assert run_cli(tiny_path, "--prompt", PROMPT, "--warm-up").code == 2


def test_sampling_is_reproducible_by_its_seed(shipped_path: Path) -> None:
    texts = [answer(shipped_path, "--temperature", 1, "--top-p", 0.9, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text_before_it(shipped_path: Path) -> None:
    whole = answer(shipped_path)["text"]
    stop = whole[10:14]
    result = answer(shipped_path, "--stop", stop)
    assert result["text"] == whole[: whole.index(stop)] and result["finish"] == "stop"


def test_max_tokens_and_a_full_context_end_with_length(tmp_path: Path, tiny_path: Path) -> None:
    assert answer(tiny_path, tokens=3)["finish"] == "length"
    result = answer(tiny_path, "--context", 40, tokens=100)
    assert result["finish"] == "length" and result["prompt_tokens"] + result["new_tokens"] <= 40


def test_the_cache_takes_the_bits_that_it_is_given(shipped: Bundle) -> None:
    """About the same probabilities, and the fewer bits the less memory."""
    ids = np.random.default_rng(0).integers(shipped.spec.vocab_size, size=60).tolist()
    found = []
    for bits in (32, 16, 8):
        with Model(shipped, RunOptions(context=256, kv_bits=bits)) as model:
            logits = np.stack([model.prefill(ids[:8]), *(model.decode(token) for token in ids[8:])])
            found.append((log_softmax(logits), model.budget.kv_cache))
    (whole, most), *others = found
    for logits, _ in others:
        assert 0 < (np.exp(whole) * (whole - logits)).sum(-1).mean() < 0.003
    assert most > others[0][1] > others[1][1]
    assert run_cli(shipped.path, "--prompt", PROMPT, "--kv-bits", 4).code == 2


def test_latency_runs_what_is_there(shipped_path: Path) -> None:
    small = ("--point", 3, "--arena", "3MB", "--no-look-ahead")
    plain, quick = answer(shipped_path, *small, tokens=60), answer(shipped_path, *small, "--latency", tokens=60)
    assert quick["bits_mean"] < plain["bits_mean"] and quick["hit_rate"] > plain["hit_rate"]
    assert quick["tier_shares"]["2"] > plain["tier_shares"]["2"] + 0.02  # also of what is not there at all
    assert quick["tier_shares"]["4"] == pytest.approx(plain["tier_shares"]["4"], abs=0.1)
    assert run_cli(shipped_path, "--eval", __file__, "--latency").code == 2


def test_chat_answers_by_the_template(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--chat", "--prompt", "Hello", "--max-tokens", 5, "--json")
    assert outcome.code == 0 and outcome.json["prompt_tokens"] >= 5
    outcome = run_cli(shipped_path, "--chat", "--max-tokens", 5, "--json", stdin="Hello\nAnd again\n")
    assert outcome.code == 0, outcome.err
    roles = [message["role"] for message in outcome.json["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_a_second_turn_goes_on_as_if_it_were_one_prompt(shipped_path: Path) -> None:
    """What the KV cache keeps of the first turn changes nothing."""
    args = ("--chat", "--max-tokens", 6, "--tiers", 4, "--json")
    turns = run_cli(shipped_path, *args, stdin="Tell me\nAnd more\n").json["messages"]
    template = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns[:3])
    prompt = template + "<|im_start|>assistant\n"
    again = run_cli(shipped_path, "--prompt", prompt, "--max-tokens", 6, "--tiers", 4, "--json").json["text"]
    assert again == turns[3]["content"]


# --- the three mechanisms ---


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


def test_look_ahead_turns_misses_into_hits_and_can_be_switched_off(shipped: Bundle) -> None:
    arena = int(shipped.expert_bytes() * 0.4)
    ahead = answer(shipped.path, "--arena", arena)
    plain = answer(shipped.path, "--arena", arena, "--no-look-ahead")
    assert ahead["text"] == plain["text"]
    assert plain["look_ahead"] == {"reads": 0, "bytes": 0, "hits": 0, "waste": 0}
    assert ahead["look_ahead"]["hits"] > 10
    assert ahead["look_ahead"]["reads"] == ahead["look_ahead"]["hits"] + ahead["look_ahead"]["waste"]


def test_statistics_name_each_mechanism(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--prompt", PROMPT, "--max-tokens", 4, "--stats")
    for word in ("bits per active expert", "read", "hit rate", "look-ahead", "tokens/s", "peak", "least that works"):
        assert word in outcome.err


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


# --- the budget ---


@pytest.mark.parametrize("prompt", [PROMPT, "def main():\n    " * 40])
def test_every_budget_gives_the_same_tokens(shipped: Bundle, prompt: str) -> None:
    """Tiers depend on routing only, so memory decides speed and nothing else. The arena never outgrows its share."""
    least = least_arena_bytes(shipped.layout)
    texts = set()
    for share in (0.0, 0.25, 0.4, 0.6, 1.0):
        arena = least + int(shipped.expert_bytes() * share)
        for flags in ((), ("--no-look-ahead",), ("--threads", 1)):
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


@pytest.mark.skipif(kernels.isa() == "torch", reason="the reference runs each chunk by itself")
@pytest.mark.parametrize("count", [64, 65, 128, 175, 193, 500])
@pytest.mark.parametrize("point", ["3", "2.25"])
def test_how_a_prompt_is_divided_changes_nothing_but_what_is_read(
    count: int, point: str, shipped: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The less memory the activations of a chunk take, the more of them run together, in memory that is lent."""
    monkeypatch.setattr(model_module, "CHUNK", 64)
    monkeypatch.setattr(budget_module, "CHUNK", 64)
    ids = np.random.default_rng(count).integers(shipped.spec.vocab_size, size=count).tolist()
    arena, found = shipped.expert_bytes() // 3, []
    for chunk in (1 << 40, 1 << 18, 1):

        def plan(*args: object, chunk: int = chunk, **kwargs: object) -> Budget:
            return replace(plan_budget(*args, **kwargs), chunk=chunk)  # type: ignore[arg-type]

        monkeypatch.setattr(model_module, "plan_budget", plan)
        trace = tmp_path / f"{chunk}.jsonl"
        options = RunOptions(context=512, arena_bytes=arena, point=point, look_ahead=False, trace=trace)
        with Model(shipped, options) as model:
            before = model.store.arena_bytes
            logits = [model.prefill(ids), model.decode(ids[0])]
            read = model.store.stats.read_bytes
            assert model.store.arena_bytes == before
        lines = [json.loads(line) for line in trace.read_text().splitlines()]
        found.append((logits, read, [line["tokens"] for line in lines if "layer" not in line]))
    for logits, _, _ in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(logits, found[0][0], strict=True))
    whole = [count - 1, 1] if count % 64 == 1 else [count]
    assert found[0][2] == [*[64] * (count // 64), *[count % 64] * (count % 64 > 0), 1]
    assert found[2][2] == [*whole, 1]
    if whole[0] > 64:
        assert found[2][1] < 0.8 * found[0][1]


@pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")
@pytest.mark.parametrize("share", [0.3, 0.7, 1.1])
@pytest.mark.parametrize("setting", [{"point": "3"}, {"tier": 2}, {"point": "2.25"}], ids=str)
def test_experts_that_need_not_be_asked_for_change_nothing(
    setting: dict, share: float, shipped: Bundle, tmp_path: Path
) -> None:
    """A trace has every layer asked for; without it the same comes out, and the same is counted."""
    found = []
    for trace in (None, tmp_path / "trace.jsonl"):
        arena = int(shipped.expert_bytes() * share)
        options = RunOptions(context=128, arena_bytes=arena, look_ahead=False, trace=trace, **setting)
        with Model(shipped, options) as model:
            logits, asked = decode_some(model, 100)
            stats, costs = model.store.stats, model._eviction._cost.copy()
            stats.wait_s = 0.0
            found.append((logits, stats, model.experts.stats.used, costs, asked))
    (first, *counts, few), (second, *other, many) = found
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert counts[:2] == other[:2]
    assert many == 100 * len(shipped.spec.moe_layers) and few < many and (share < 1 or few < 0.5 * many)
    if share < 1:
        free = np.isfinite(counts[2]) & np.isfinite(other[2])  # the last layer's are held where they were asked for
        assert free.sum() > 0.5 * free.size * share and np.allclose(counts[2][free], other[2][free])


def decode_some(model: Model, tokens: int, change: Callable[[int], None] = lambda token: None) -> tuple[list, int]:
    """Logits of the likeliest tokens, one after another, and how many layers had their experts asked for."""
    asked, experts = 0, model.decoder.experts

    def note(layer: int, h: np.ndarray, routing: Routing) -> np.ndarray:
        nonlocal asked
        asked += 1
        return experts(layer, h, routing)

    model.decoder.experts = note
    logits = [np.eye(1, model.spec.vocab_size, 3, np.float32)[0]]
    for token in range(tokens):
        change(token)
        logits.append(model.decode(int(logits[-1].argmax())))
    return logits, asked


@pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")
@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_rule_that_changes_holds_for_experts_that_are_not_asked_for(
    looks_ahead: bool, shipped: Bundle, tmp_path: Path
) -> None:
    """And one that skips experts; whether others are read ahead changes nothing."""
    found = []
    for trace in (None, tmp_path / "trace.jsonl"):
        arena = int(shipped.expert_bytes() * (0.5 if looks_ahead else 1.1))
        with Model(shipped, RunOptions(arena_bytes=arena, look_ahead=looks_ahead, trace=trace)) as model:
            layers = shipped.spec.num_layers
            skips = TierRule(model.rule.ladder, ((0.3, 0.5, 0.8),) * layers, ((ALWAYS,) * 3,) * layers)
            rules = [model.rule, skips, TierRule.uniform(3, model.rule.ladder, layers), skips]

            def change(token: int, model: Model = model, rules: list[TierRule] = rules) -> None:
                model.experts.rule = rules[token // 30]

            logits, asked = decode_some(model, 120, change)
            found.append((logits, model.experts.stats.used, asked))
    assert all(np.array_equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1] and {0, 3} <= found[0][1].keys()
    assert found[0][2] < found[1][2] == 120 * len(shipped.spec.moe_layers)


@pytest.mark.skipif(not COMPILED, reason="compiled kernels are missing")
@pytest.mark.parametrize("dense", [[0], [1], [2], [0, 2]], ids=str)
def test_dense_layers_stand_between_experts_that_are_not_asked_for(
    dense: list[int], tmp_path: Path, calibration_text: Path
) -> None:
    save_tiny(tmp_path / "model", "qwen3_moe", num_hidden_layers=3, mlp_only_layers=dense)
    outcome = compile_cli(tmp_path / "model", "-o", tmp_path / "bundle", "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    bundle, found = Bundle.open(tmp_path / "bundle"), []
    for trace in (None, tmp_path / "trace.jsonl"):
        with Model(bundle, RunOptions(trace=trace)) as model:
            found.append(decode_some(model, 20))
    assert all(np.array_equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] < found[1][1] == 20 * (3 - len(dense))


def test_decisions_hold_for_experts_in_memory(shipped: Bundle, tmp_path: Path) -> None:
    """Whatever the rule would have chosen, and also where no trace is written."""
    traces = [tmp_path / f"{number}.jsonl" for number in range(3)]
    ids, found = [token % 90 + 3 for token in range(60)], []
    for trace, decisions in ((traces[0], None), (None, traces[1]), (traces[2], traces[1])):
        options = RunOptions(point="3", look_ahead=False, trace=trace, decisions=decisions)
        with Model(shipped, options) as model:
            if decisions is not None:  # once without, for all that the rule chooses to be in memory
                kept = model._decisions, model.experts.decided
                model._decisions = model.experts.decided = None
                assert [model.decode(token) for token in ids]
                model.reset()
                model.reset_stats()
                model._decisions, model.experts.decided = kept
            logits = [model.decode(token) for token in ids]
            found.append((logits, model.experts.stats.used))
        if decisions is None:
            lines = [json.loads(line) for line in traces[0].read_text().splitlines()]
            for line in lines:
                if line.get("layer") == shipped.spec.num_layers - 1:  # so that no layer after it routes otherwise
                    line["wants"] = [[expert, 2, tokens] for expert, _, tokens in line["wants"]]
            traces[1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert all(np.array_equal(a, b) for a, b in zip(found[1][0], found[2][0], strict=True))
    assert found[1][1] == found[2][1] != found[0][1]


def test_a_larger_arena_reads_less(shipped: Bundle) -> None:
    least = least_arena_bytes(shipped.layout)
    arenas = [least + int(shipped.expert_bytes() * share) for share in (0.0, 0.2, 0.5, 1.1)]
    read = [answer(shipped.path, "--arena", arena)["read_bytes"] for arena in arenas]
    assert read == sorted(read, reverse=True) and read[-1] <= shipped.expert_bytes()


def test_too_small_a_budget_names_the_least_that_works(shipped_path: Path) -> None:
    outcome = run_cli(shipped_path, "--prompt", PROMPT, "--max-tokens", 4, "--memory", "10MiB")
    assert_one_sentence(outcome, "10.0 MiB", "least that works", "--memory")


def test_more_than_the_cgroup_allows_is_refused(shipped_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "cgroup_limits", lambda: iter([3 << 30, 2 << 30]))
    outcome = run_cli(shipped_path, "--prompt", PROMPT, "--max-tokens", 4, "--memory", "2049MiB")
    assert_one_sentence(outcome, "2.0 GiB", "cgroup", "--memory")
    assert answer(shipped_path, "--memory", "2GiB", tokens=4)["memory_bytes"] == 2 << 30


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()])
def test_memory_that_is_not_to_be_had_is_one_sentence(
    error: Exception, shipped_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(model_module, "KVCache", fail)
    monkeypatch.setattr(budget_module, "check_budget", fail)
    before = threading.active_count()
    assert_one_sentence(run_cli(shipped_path, "--prompt", PROMPT), "out of memory", "--memory")
    assert threading.active_count() == before


@pytest.mark.parametrize("empty", [np.empty, torch.empty], ids=["numpy", "torch"])  # the reference has both
def test_out_of_memory_is_one_sentence(
    shipped_path: Path, monkeypatch: pytest.MonkeyPatch, empty: Callable[[int], object]
) -> None:
    def allocate(*args: object, **kwargs: object) -> object:
        return empty(1 << 58)

    monkeypatch.setattr(model_module, "KVCache", allocate)
    assert_one_sentence(run_cli(shipped_path, "--prompt", PROMPT), "out of memory", "--memory")


@pytest.mark.parametrize(
    "args",
    [
        ("--bench", "--prompt-file", "x.txt"),
        ("--probe", "--prompt-file", "x.txt"),
        ("--prompt", "a", "--system", "b"),
        ("--probe", "--latency"),
        ("--probe", "--no-preload"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(args: tuple, tiny_path: Path) -> None:
    assert run_cli(tiny_path, *args).code == 2


# --- what is refused ---


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))


def newer(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


FILES = (
    "policy.json",
    "compile.json",
    "report.html",
    "tokenizer.json",
    "dense.safetensors",
    "experts-00001.safetensors",
    "manifest.json",
)
BAD_BUNDLES: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    ("newer version", newer, ("manifest.json", "version 99", "upgrade")),
    ("flipped byte in the policy", lambda d: flip(d / "policy.json", 200), ("policy.json",)),
    ("flipped byte in the manifest", lambda d: flip(d / "manifest.json", 900), ("manifest.json",)),
    ("flipped first byte of the manifest", lambda d: flip(d / "manifest.json", 0), ("manifest.json",)),
    ("flipped byte in the findings", lambda d: flip(d / "compile.json", 300), ("compile.json",)),
    ("flipped byte in the report", lambda d: flip(d / "report.html", 5000), ("report.html",)),
    ("cut report", lambda d: (d / "report.html").write_bytes((d / "report.html").read_bytes()[:-1]), ("report.html",)),
    ("flipped byte in the tokenizer", lambda d: flip(d / "tokenizer.json", 50), ("tokenizer.json",)),
    ("short records", lambda d: (d / "experts-00001.safetensors").write_bytes(b"x" * 5000), ("experts-00001",)),
    ("empty manifest", lambda d: (d / "manifest.json").write_bytes(b""), ("manifest.json",)),
    ("binary manifest", lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\x00"), ("manifest.json",)),
    *((f"no {name}", lambda d, name=name: (d / name).unlink(), (name,)) for name in FILES),
]


@pytest.mark.parametrize(("harm", "words"), [case[1:] for case in BAD_BUNDLES], ids=[case[0] for case in BAD_BUNDLES])
def test_a_bad_bundle_gets_one_sentence(harm: Callable[[Path], object], words: tuple[str, ...], damaged: Path) -> None:
    harm(damaged)
    for outcome in (run_cli(damaged, "--prompt", "x"), bundle_cli("verify", damaged), bundle_cli("inspect", damaged)):
        assert_one_sentence(outcome, *words)


def test_every_flipped_byte_of_the_manifest_is_noticed(damaged: Path) -> None:
    path = damaged / "manifest.json"
    whole = path.read_bytes()
    for offset in range(0, len(whole), max(1, len(whole) // 60)):
        flip(path, offset)
        assert_one_sentence(bundle_cli("inspect", damaged), "manifest.json")
        path.write_bytes(whole)


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_a_flipped_byte_in_a_record_is_named_and_never_becomes_text(damaged: Path, segment: int) -> None:
    bundle = Bundle.open(damaged)
    for layer in bundle.manifest.layers.values():
        for expert in range(bundle.spec.num_experts):
            start = layer.data_start + expert * bundle.layout.record_bytes
            flip(damaged / layer.file, start + sum(bundle.layout.segment_spans[:segment]) + 5)
    outcome = run_cli(damaged, "--prompt", "Hello", "--tiers", 4)
    assert_one_sentence(outcome, "experts-0000", "checksum", "expert 0.")
    outcome = bundle_cli("verify", damaged, "--json")
    assert outcome.code == 1 and len(outcome.json["problems"]) == 3 * 6


def test_a_flipped_byte_in_the_dense_weights_is_named(damaged: Path) -> None:
    flip(damaged / "dense.safetensors", (damaged / "dense.safetensors").stat().st_size - 100)
    for outcome in (run_cli(damaged, "--prompt", "x"), bundle_cli("verify", damaged)):
        assert_one_sentence(outcome, "dense.safetensors", "checksum")


def test_verify_names_the_records_that_are_wrong(damaged: Path) -> None:
    bundle = Bundle.open(damaged)
    entry = bundle.manifest.layers[1]
    flip(damaged / entry.file, entry.data_start + 3 * bundle.layout.record_bytes)
    outcome = bundle_cli("verify", damaged)
    assert_one_sentence(outcome, entry.file, "expert 1.3", "tier 2")


def test_verify_checks_the_index(damaged: Path) -> None:
    path = damaged / "experts-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"experts.2.0", b"experts.9.0", 1))
    assert_one_sentence(bundle_cli("verify", damaged), "experts-00002", "index")


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_sentence(run_cli(tmp_path / "nowhere", "--prompt", "x"), "nowhere", "dymoe-compile")
    assert_one_sentence(run_cli(tmp_path / "empty", "--prompt", "x"), "manifest.json", "not a bundle")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prompt", ""), ("prompt",)),
        (("--prompt", "x" * 600), ("600", "256")),
        (("--prompt", "x", "--tiers", "5"), ("--tiers", "2, 3, 4")),
        (("--prompt", "x", "--temperature", "nan"), ("temperature",)),
        (("--prompt", "x", "--top-p", "1.5"), ("top", "p")),
        (("--prompt-file", "/no/such/file"), ("/no/such/file",)),
        (("--eval", "/no/such/file"), ("/no/such/file",)),
        (("--eval", "/tmp"), ("/tmp", "directory", "--eval")),
        (("--bench", "--prompt-tokens", 250, "--new-tokens", 40), ("290", "256")),
        (("--prompt", "x", "--chat"), ("chat template",)),
    ],
)
def test_bad_arguments_get_one_sentence(args: tuple, words: tuple, tiny_path: Path) -> None:
    assert_one_sentence(run_cli(tiny_path, *args), *words)


@pytest.mark.parametrize(
    "args",
    [
        ("--frobnicate",),
        ("--prompt", "x", "--memory", "lots"),
        ("--prompt", "x", "--point", "high"),
        ("--prompt", "x", "--tiers", "4", "--point", "3"),
        ("--prompt", "x", "--prompt-file", "y"),
        ("--bench", "--chat"),
        ("--prompt", "x", "--reference", "y"),
        ("--prompt", "x", "--eval", "y"),
        ("--eval", "y", "y"),
        ("--prompt", "x", "--tiers", "\u00b2"),
        ("--prompt", "x", "--threads", 10**12),
        ("--prompt", "x", "--seed", 10**30),
    ],
)
def test_wrong_usage_exits_with_2(args: tuple, tiny_path: Path) -> None:
    assert run_cli(tiny_path, *args).code == 2


HEAVY = """
import contextlib, importlib, sys
module, name, *args = sys.argv[1:]
with contextlib.suppress(SystemExit):
    getattr(importlib.import_module(module), name)(args)
print([name for name in ("torch", "tokenizers", "jinja2") if name in sys.modules])
"""


RUN, COMPILE = ("dymoe_runtime.cli", "run"), ("dymoe_compile.cli", "main")


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (RUN, ("--help",)),
        (RUN, ("--version",)),
        (RUN, ("x", "--bench", "--probe")),
        (RUN, ("x", "--no-such-flag")),
        (COMPILE, ("--help",)),
        (COMPILE, ("x", "-o", "y", "--tiers", "4,3")),
    ],
)
def test_neither_help_nor_a_wrong_flag_waits_for_heavy_imports(command: tuple[str, str], args: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", HEAVY, *command, *args], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(kernels.isa() == "torch", reason="the reference is torch")
@pytest.mark.parametrize("point", ["3", "auto"])
def test_a_run_does_without_torch(shipped_path: Path, point: str) -> None:
    """Importing it takes seconds, and 200 MB that are the experts' otherwise."""
    args = ["--prompt", PROMPT, "--max-tokens", "4", "--temperature", "0.5", "--point", point, "--stats"]
    command = [sys.executable, "-c", HEAVY, *RUN, str(shipped_path), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['tokenizers']" and "tokens/s" in done.stderr


NOT_WHOLE = """
import sys
class Broken:
    def find_spec(self, name, *rest):
        if name == "{library}":
            raise {problem}
sys.meta_path.insert(0, Broken())
from dymoe_{package}.__main__ import {name}
{name}()
"""


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        ('OSError("libc.so: cannot open shared object file")', 1, ("libc.so", "install dymoe")),
        ('ImportError("No module named tokenizers")', 1, ("No module named tokenizers", "install dymoe")),
        ("KeyboardInterrupt", 130, ("interrupted",)),
    ],
)
def test_an_import_that_fails_is_one_sentence(problem: str, code: int, words: tuple[str, ...]) -> None:
    script = NOT_WHOLE.format(problem=problem, library="tokenizers", package="runtime", name="run")
    assert_one_sentence(outcome_of(script, "x", "--prompt", "y"), *words, code=code)


def test_without_torch_the_compiler_and_the_reference_say_so(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"problem": 'ImportError("No module named torch")', "library": "torch"}
    compiling = NOT_WHOLE.format(**parts, package="compile", name="main")
    assert_one_sentence(outcome_of(compiling, MODEL, "-o", tmp_path / "x.dymoe"), "torch", "install dymoe")
    running = NOT_WHOLE.format(**parts, package="runtime", name="run")
    if kernels.available_isas() != ["torch"]:
        assert outcome_of(running, tiny_path, "--prompt", "a", "--max-tokens", 2).code == 0
    monkeypatch.setenv("DYMOE_ISA", "torch")
    assert_one_sentence(outcome_of(running, tiny_path, "--prompt", "a"), "torch", "install dymoe")


def outcome_of(script: str, *args: object) -> Outcome:
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_inspect_tells_sizes_bits_and_points(shipped: Bundle) -> None:
    described = bundle_cli("inspect", shipped.path, "--json").json
    assert described["expert_weights"] == 18_874_368
    on_disk = sum(path.stat().st_size for path in shipped.path.iterdir())
    assert described["total_bytes"] == on_disk
    bits = {tier["tier"]: tier["effective_bits"] for tier in described["tiers"]}
    assert bits[2] <= 2.2 and bits[3] <= 3.25 and bits[4] <= 4.3
    text = bundle_cli("inspect", shipped.path).out
    assert all(point.name in text for point in shipped.policy.points)


# --- evaluation ---


def test_eval_prints_the_table_and_the_keys_of_the_contract(shipped_path: Path, tmp_path: Path) -> None:
    texts = []
    for domain in ("math", "code"):
        texts.append(tmp_path / f"{domain}.txt")
        texts[-1].write_text((EXAMPLES / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")[:2500])
    outcome = run_cli(shipped_path, "--eval", *texts, "--reference", MODEL, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert [file["file"] for file in result["files"]] == [str(path) for path in texts]
    for file in result["files"]:
        assert set(file) == {"file", "tokens", "nll", "perplexity", "kl", "top1_agreement"}
    assert [row["point"] for row in result["table"]][:4] == ["reference", "tier 4", "tier 3", "tier 2"]
    kl = {row["point"]: row["files"][0]["kl"] for row in result["table"][1:]}
    assert kl["tier 4"] < kl["tier 3"] < kl["tier 2"]
    text = run_cli(shipped_path, "--eval", texts[0], "--reference", MODEL).out
    assert all(word in text for word in ("reference", "tier 4", "tier 2", "perplexity", "top-1"))


def test_eval_can_take_one_setting_a_phase_and_a_bundle_as_reference(shipped_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text((EXAMPLES / "heldout" / "wiki.txt").read_text(encoding="utf-8")[:2000])
    outcome = run_cli(shipped_path, "--eval", path, "--tiers", 4, "--reference", shipped_path, "--json")
    # The reference rounds no keys, and an activation on the edge of two codes may fall to either side.
    assert len(outcome.json["table"]) == 2 and outcome.json["files"][0]["kl"] < 2e-3
    for phase in ("decode", "prefill"):
        outcome = run_cli(shipped_path, "--eval", path, "--point", 3, "--eval-phase", phase, "--json")
        assert outcome.json["phase"] == phase and 2.5 < outcome.json["table"][0]["bits_mean"] < 4


def test_eval_refuses_what_it_cannot_score(tiny_path: Path, tmp_path: Path) -> None:
    cases = (("one.txt", b"a", "single token"), ("blank.txt", b" \n", "empty"), ("x.bin", b"\xff", "UTF-8"))
    for name, content, word in cases:
        (tmp_path / name).write_bytes(content)
        assert_one_sentence(run_cli(tiny_path, "--eval", tmp_path / name), name, word)


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path, calibration_text: Path) -> None:
    """The byte tokenizer has 256 tokens, the model 222; plain ASCII text does not show it."""
    text = tmp_path / "ascii.txt"
    text.write_text(calibration_text.read_text(encoding="utf-8").encode("ascii", "ignore").decode())
    model = save_tiny(tmp_path / "model", "mixtral", vocab_size=222)
    assert compile_cli(model, "-o", tmp_path / "b.dymoe", "--calibration", text).code == 0
    assert_one_sentence(run_cli(tmp_path / "b.dymoe", "--prompt", "\u00c0\u00ff"), "tokenizer.json", "222")


def test_a_conversation_that_is_not_utf_8_is_refused(shipped_path: Path) -> None:
    command = [sys.executable, "-m", "dymoe_runtime", str(shipped_path), "--chat", "--max-tokens", "2"]
    done = subprocess.run(command, input=b"hello\n\xff\n", capture_output=True, timeout=60)
    assert done.returncode == 1 and b"UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_eval_refuses_a_reference_of_another_vocabulary(shipped_path: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some text to score, long enough")
    other = save_tiny(tmp_path / "other", "olmoe")
    assert_one_sentence(run_cli(shipped_path, "--eval", tmp_path / "t.txt", "--reference", other), "vocabulary")


def test_verify_says_that_a_sound_bundle_is_sound(tiny_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_path, tmp_path / "moved elsewhere.dymoe"))
    outcome = bundle_cli("verify", copy)
    assert outcome.code == 0 and "sound" in outcome.out


def test_numbers_beyond_all_bounds_are_wrong_usage(shipped_path: Path, tmp_path: Path) -> None:
    for flag, value in (("--memory", "9" * 400), ("--tiers", "9" * 5000), ("--arena", "9" * 400 + "GiB")):
        outcome = run_cli(shipped_path, "--prompt", "a", flag, value)
        assert outcome.code == 2 and not outcome.out and "Traceback" not in outcome.err


def test_a_text_that_the_output_cannot_take_is_no_error(shipped_path: Path) -> None:
    """A model may answer with any character, wherever it is asked."""
    script = """
import dymoe_runtime.commands as commands
from dymoe_runtime.generate import Token
commands.generate = lambda *args, **options: iter([Token(1, "caf\\u00e9 \\u2014", "length")])
from dymoe_runtime.__main__ import run
run()
"""
    command = [sys.executable, "-c", script, str(shipped_path), "--prompt", "a"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"caf\xe9 ?\n"), done.stderr


@pytest.mark.parametrize("experts", [2, 3])
def test_a_model_of_a_few_experts_runs(experts: int, tmp_path: Path, calibration_text: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0], num_experts=experts)
    outcome = compile_cli(model, "-o", tmp_path / "bundle", "--calibration", calibration_text)
    assert outcome.code == 0, outcome.err
    bundle = Bundle.open(tmp_path / "bundle")
    assert plan_budget(bundle, 64).full_arena <= least_arena_bytes(bundle.layout)
    for memory in ((), ("--memory", plan_budget(bundle, 64).floor + 2 * SPREAD_BYTES)):
        args = ("--max-tokens", 8, "--ignore-eos", "--context", 64, *memory)
        assert run_cli(bundle.path, "--prompt", "abc", *args).code == 0
