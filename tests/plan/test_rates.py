"""Rates of machines: what is predicted from them, measuring them, and the profile that they become."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import MODEL, assert_one_sentence, compile_cli, run_cli

from dymoe_compile.job.profile import load_profile
from dymoe_compile.plan.sizes import alike, planned_bundle
from dymoe_runtime import RunOptions, load_kernels, load_model
from dymoe_runtime.bundle.bundle import Bundle
from dymoe_runtime.cli import measure as measure_command
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.tools.machine import measure
from dymoe_runtime.tools.machine.measure import check_plausible, disk_rates, rates_of_reads
from dymoe_runtime.tools.machine.profile_file import check_target, write_profile
from dymoe_runtime.tools.machine.rates import MOST_POPULAR, Rates, Work, popularity, resident_share

GOOD = Rates(
    threads=2,
    memory_bytes_per_s=9.4e9,
    decode_weights_per_s={2: 17.2e9, 4: 8.6e9},
    prompt_weights_per_s={2: 31e9, 4: 31e9, 8: 19e9},
    layer_s=61.25e-6,
    disk_bytes_per_s=1.9e9,
    disk_latency_s=88.5e-6,
    expert_s=6.25e-6,
    prompt_layer_s=8e-6,
    prompt_expert_s=2.5e-6,
)
# The same machine, if nothing took time beside products.
PRODUCTS = replace(GOOD, layer_s=0.0, expert_s=0.0, prompt_layer_s=0.0, prompt_expert_s=0.0)
EVERYTHING = 1 << 40


@pytest.fixture(scope="module")
def work(shipped: Bundle) -> Work:
    return Work.of(shipped)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (128, 8), (64, 8), (8, 2), (9, 9), (512, 10)])
def test_popularity_is_the_law_that_was_asked_for(experts: int, top_k: int) -> None:
    shares = popularity(experts, top_k)
    assert len(shares) == experts and sum(shares) == pytest.approx(top_k)
    assert shares == sorted(shares, reverse=True)
    least = top_k / experts
    assert shares[0] <= max(MOST_POPULAR, least) * 1.001
    assert sum(s * s for s in shares) / top_k == pytest.approx(max(0.43, least), abs=0.02)


def test_what_is_resident_counts_by_use() -> None:
    assert resident_share([0.9, 0.6, 0.3, 0.2], 0) == 0
    assert resident_share([0.9, 0.6, 0.3, 0.2], 1) == pytest.approx(0.45)
    assert resident_share([0.9, 0.6, 0.3, 0.2], 1.5) == pytest.approx(0.6)
    assert resident_share([0.9, 0.6, 0.3, 0.2], 99) == 1


def test_a_token_takes_what_its_weights_take(work: Work) -> None:
    """At 4 bits memory is the limit, as arithmetic would be faster; layers and experts take their own time."""
    rates = replace(PRODUCTS, decode_weights_per_s={4: 1e15})
    found = work.predict(rates, 4, EVERYTHING, 64)
    spec = work.spec
    nbytes = work.token[0] + len(spec.moe_layers) * spec.top_k * work.layout.record_bytes
    assert found.token_s == pytest.approx(nbytes / rates.memory_bytes_per_s) and found.resident_share == 1
    slower = work.predict(replace(rates, layer_s=1e-3), 4, EVERYTHING, 64)
    assert slower.token_s - found.token_s == pytest.approx(1e-3 * spec.num_layers)
    experts = len(spec.moe_layers) * spec.top_k
    slower = work.predict(replace(rates, expert_s=1e-3), 4, EVERYTHING, 64)
    assert slower.token_s - found.token_s == pytest.approx(1e-3 * experts)
    weights = work.token[1] + experts * work.layout.weights
    busy = work.predict(replace(rates, decode_weights_per_s={4: 1e6}), 4, EVERYTHING, 64)
    assert busy.token_s == pytest.approx(weights / 2e6)


def test_weights_of_more_bits_take_longer_to_multiply(work: Work) -> None:
    """Where arithmetic is the limit; between the tiers of a table, times are interpolated."""
    rates = replace(PRODUCTS, memory_bytes_per_s=1e15, decode_weights_per_s={2: 4e6, 4: 2e6})
    two, three, four = (work.predict(rates, bits, EVERYTHING, 64).token_s for bits in (2, 3, 4))
    weights = len(work.spec.moe_layers) * work.spec.top_k * work.layout.weights
    assert four - two == pytest.approx(weights * (1 / 2e6 - 1 / 4e6) / 2)
    assert three == pytest.approx((two + four) / 2)


def test_each_token_of_a_prompt_takes_time_beside_products(work: Work) -> None:
    fast = replace(PRODUCTS, disk_bytes_per_s=1e15, disk_latency_s=0.0)
    spec, first = work.spec, work.predict(fast, 4, EVERYTHING, 64).first_token_s
    layers = work.predict(replace(fast, prompt_layer_s=1e-3), 4, EVERYTHING, 64).first_token_s
    experts = work.predict(replace(fast, prompt_expert_s=1e-3), 4, EVERYTHING, 64).first_token_s
    assert layers - first == pytest.approx(64e-3 * spec.num_layers)
    assert experts - first == pytest.approx(64e-3 * len(spec.moe_layers) * spec.top_k)


def test_a_token_waits_for_the_disk_where_memory_is_short(work: Work) -> None:
    none, some, all_ = (work.predict(GOOD, 4, nbytes, 64) for nbytes in (0, 4 << 20, EVERYTHING))
    assert none.token_s > some.token_s > all_.token_s
    spec, layout = work.spec, work.layout
    reads = len(spec.moe_layers) * spec.top_k
    waited = reads * (layout.record_bytes / GOOD.disk_bytes_per_s + GOOD.disk_latency_s)
    assert none.token_s - all_.token_s == pytest.approx(waited)
    assert (none.resident_share, all_.resident_share) == (0, 1) and 0 < some.resident_share < 1


def test_a_prompt_reads_the_experts_that_it_uses(work: Work) -> None:
    slow = replace(GOOD, disk_bytes_per_s=1e6, disk_latency_s=0.0)
    long = work.predict(slow, 4, 0, 512).first_token_s
    assert long == pytest.approx(work.spec.total_experts * work.layout.record_bytes / 1e6, rel=0.05)
    assert work.predict(slow, 4, 0, 1).first_token_s < long / 3
    busy = replace(GOOD, prompt_weights_per_s={4: 1e6}, disk_bytes_per_s=1e12)
    assert work.predict(busy, 4, 0, 512).first_token_s > 50 * work.predict(GOOD, 4, 0, 512).first_token_s


def test_an_embedding_counts_only_where_it_is_the_head(shipped: Bundle) -> None:
    tied = replace(shipped.spec, tie_embeddings=True)
    own = replace(shipped.spec, tie_embeddings=False)
    works = [Work.of(planned_bundle(spec, (2, 3, 4), alike(spec, 8))) for spec in (tied, own)]
    assert works[0].token == works[1].token


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"disk_bytes_per_s": 9.5e9}, "more than the"),
        ({"disk_bytes_per_s": 0.0}, "disk_bytes_per_s was measured as 0"),
        ({"memory_bytes_per_s": 0.0}, "memory_bytes_per_s"),
        ({"decode_weights_per_s": {2: 1e9, 3: math.nan}}, "decode_weights_per_s"),
        ({"prompt_weights_per_s": {2: math.inf}}, "prompt_weights_per_s"),
        ({"expert_s": -1e-6}, "expert_s"),
        ({"layer_s": 2.0}, "layer_s"),
        ({"disk_latency_s": -1e-6}, "disk_latency_s"),
    ],
)
def test_figures_that_no_machine_has_are_refused(change: dict[str, Any], words: str) -> None:
    check_plausible(GOOD)
    check_plausible(replace(GOOD, disk_bytes_per_s=9.5e9), copied_per_s=12e9)
    with pytest.raises(DymoeError, match=words):
        check_plausible(replace(GOOD, **change))


def test_rates_of_reads_are_solved_for_latency_and_bandwidth() -> None:
    rate, latency = rates_of_reads((1 << 20, 1e-3 + (1 << 20) / 2e9), (1 << 14, 1e-3 + (1 << 14) / 2e9), "x")
    assert rate == pytest.approx(2e9) and latency == pytest.approx(1e-3)
    with pytest.raises(DymoeError, match="took no longer"):
        rates_of_reads((1 << 20, 1e-5), (1 << 14, 1e-5), "x")


def test_a_bundle_that_is_too_small_cannot_measure_a_disk(tiny_path: Path) -> None:
    with pytest.raises(DymoeError, match=r"too few to measure|page cache alone"):
        disk_rates(Bundle.open(tiny_path))


def test_what_is_measured_is_what_a_machine_can_have(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small sweep, so that it takes no time."""
    for name, value in (("SWEEP_BYTES", 2 << 20), ("WIDTH", 128), ("HIDDEN", 256), ("SMALL", 64), ("ATTEMPTS", 1)):
        monkeypatch.setattr(measure, name, value)
    with load_model(shipped, RunOptions(preload=False, context=256), load_kernels()) as model:
        rates = measure.product_rates(model.kernels, (2, 4))
        layers = measure.prompt_layer_seconds(model, rates), measure.layer_seconds(model, rates)
    assert set(rates.decode_weights_per_s) == {2, 4} and set(rates.prompt_weights_per_s) == {2, 4, 8}
    found = replace(rates, prompt_layer_s=layers[0], layer_s=layers[1], disk_bytes_per_s=1e6)
    check_plausible(found, copied_per_s=1e9)


def test_a_file_system_without_direct_reads_is_refused(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(measure.os, "O_DIRECT", raising=False)
    with pytest.raises(DymoeError, match="page cache alone"):
        disk_rates(shipped)


def test_a_written_profile_is_read_with_the_same_rates(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    write_profile(path, GOOD, (2, 4), 5 << 30, "avx2", overwrite=False)
    profile = load_profile(str(path))
    assert (profile.name, profile.ladder, profile.dense_bits) == ("my-board", (2, 4), "auto")
    assert profile.memory_bytes == 5 << 30
    for name, value in vars(GOOD).items():
        assert getattr(profile.rates, name) == pytest.approx(value, rel=2e-3), name
    assert [file.name for file in tmp_path.iterdir()] == ["my-board.toml"]


def test_a_profile_replaces_no_file_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text("mine")
    with pytest.raises(DymoeError, match="--overwrite"):
        write_profile(path, GOOD, (2, 3), 1 << 30, "avx2", overwrite=False)
    assert path.read_text() == "mine"
    write_profile(path, GOOD, (2, 3), 1 << 30, "avx2", overwrite=True)
    assert load_profile(str(path)).name == "board"


@pytest.mark.parametrize("name", ["board", "board.json", ".toml", "a b.toml", "none/board.toml", 'a".toml'])
def test_other_names_are_refused_before_anything_is_measured(name: str, tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match="--write"):
        check_target(tmp_path / name, overwrite=True)


def test_a_probe_writes_a_profile_that_plans(
    shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_command, "measure_rates", lambda model: GOOD)
    path = tmp_path / "here.toml"
    outcome = run_cli("probe", shipped_path, "--write", path, "--json", "--memory", "6GiB")
    assert outcome.code == 0, outcome.err
    assert outcome.json["written"] == str(path) and load_profile(str(path)).memory_bytes == 6 << 30
    assert_one_sentence(run_cli("probe", shipped_path, "--write", path), "--overwrite")
    assert run_cli("probe", shipped_path, "--write", path, "--overwrite", "--json").code == 0
    assert "here" in compile_cli(MODEL, "--plan", "--profile", path).out
    assert run_cli(shipped_path, "--prompt", "a", "--write", path).code == 2
    assert run_cli("probe", shipped_path, "--overwrite").code == 2


def test_nothing_is_written_where_a_figure_is_implausible(
    shipped_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "product_rates", lambda kernels, ladder: GOOD)
    for name in ("layer_seconds", "prompt_layer_seconds"):
        monkeypatch.setattr(measure, name, lambda model, rates: 6e-5)
    monkeypatch.setattr(measure, "copy_bytes_per_s", lambda: 8e9)
    monkeypatch.setattr(measure, "disk_rates", lambda bundle: (20e9, 1e-6))
    outcome = run_cli("probe", shipped_path, "--write", tmp_path / "here.toml", "--json")
    assert_one_sentence(outcome, "from a cache")
    assert list(tmp_path.iterdir()) == []
