"""Quality of the shipped model's bundle on text that calibration never saw."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from helpers import EXAMPLES, MODEL, run_cli

from dymoe_runtime.bundle.bundle import Bundle

DOMAINS = ("math", "code", "wiki")
BYTES = 15000


@pytest.fixture(scope="module")
def table(shipped_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    """point -> domain -> scores, with the default point as `mixed`."""
    folder = tmp_path_factory.mktemp("texts")
    for domain in DOMAINS:
        text = (EXAMPLES / "heldout" / f"{domain}.txt").read_bytes()[:BYTES].decode(errors="ignore")
        (folder / domain).write_text(text)
    outcome = run_cli(shipped_path, "--eval", *(folder / d for d in DOMAINS), "--reference", MODEL, "--json")
    assert outcome.code == 0, outcome.err
    return {row["point"]: {Path(file["file"]).name: file for file in row["files"]} for row in outcome.json["table"]}


@pytest.mark.parametrize("domain", DOMAINS)
def test_tier_4_is_within_2_percent_of_the_original(table: dict, domain: str) -> None:
    original, quantized = table["reference"][domain], table["tier 4"][domain]
    assert abs(quantized["nll"] / original["nll"] - 1) < 0.02
    assert quantized["kl"] < 0.02 and quantized["top1_agreement"] > 0.9


@pytest.mark.parametrize("domain", DOMAINS)
def test_quality_falls_with_the_bits(table: dict, shipped: Bundle, domain: str) -> None:
    names = ["tier 4", shipped.policy.default_point, "tier 3", "tier 2"]
    kl = [table[name][domain]["kl"] for name in names]
    assert kl == sorted(kl) and kl[0] > 0
    assert table["tier 2"][domain]["nll"] > table["tier 4"][domain]["nll"]


def test_the_original_is_as_good_as_its_card_says(table: dict) -> None:
    """Mean NLL in windows of 512, by transformers in float32: 2.68, 2.90, 3.47 on other excerpts."""
    for domain, nll in (("math", 2.68), ("code", 2.90), ("wiki", 3.47)):
        assert abs(table["reference"][domain]["nll"] - nll) < 0.25


def test_mixed_points_beat_uniform_tiers_of_their_size(shipped: Bundle) -> None:
    mixed = [point for point in shipped.policy.points if point.kind == "mixed"]
    uniform = [point for point in shipped.policy.points if point.kind == "uniform"]
    assert len(mixed) >= 4 and [point.name for point in uniform] == ["uniform-2", "uniform-3", "uniform-4"]
    for point in mixed:
        assert all(u.kl > point.kl for u in uniform if u.bytes_per_token <= point.bytes_per_token)


@cache
def kl_of(bundle: Path, text: Path, *flags: str) -> float:
    outcome = run_cli(bundle, "--eval", text, "--reference", MODEL, *flags, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json["files"][0]["kl"]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_choosing_by_importance_beats_one_tier_on_unseen_text(
    shipped_path: Path, tmp_path_factory: pytest.TempPathFactory, phase: str
) -> None:
    """At 3 bits: thresholds by importance and depth against every expert at 3 bits."""
    text = tmp_path_factory.getbasetemp() / "unseen.txt"
    text.write_text((EXAMPLES / "heldout" / "wiki.txt").read_text(encoding="utf-8")[20000:32000])
    mixed = kl_of(shipped_path, text, "--point", "3", "--eval-phase", phase)
    uniform = kl_of(shipped_path, text, "--tiers", "3")
    assert mixed < (0.7 if phase == "decode" else 1.0) * uniform
