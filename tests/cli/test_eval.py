"""Scores of texts, against a reference or alone."""

from __future__ import annotations

from pathlib import Path

from helpers import EXAMPLES, MODEL, assert_one_sentence, run_cli, save_tiny

FIGURES = ("nll", "perplexity", "kl", "top1_agreement")


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
        assert set(file) == {"file", "tokens", *FIGURES, *(f"{name}_interval" for name in FIGURES)}
        for name in FIGURES:
            low, high = file[f"{name}_interval"]
            assert low < file[name] < high
    assert [row["point"] for row in result["table"]][:4] == ["reference", "tier 4", "tier 3", "tier 2"]
    kl = {row["point"]: row["files"][0]["kl"] for row in result["table"][1:]}
    assert kl["tier 4"] < kl["tier 3"] < kl["tier 2"]
    text = run_cli(shipped_path, "--eval", texts[0], "--reference", MODEL).out
    assert all(word in text for word in ("reference", "tier 4", "tier 2", "perplexity", "top-1", "95% interval"))
    rows = [line for line in text.splitlines() if line.startswith("  tier ")]
    assert len(rows) == 3 and all(row.count("±") == 4 and len(row) <= 100 for row in rows)


def test_a_text_too_short_for_an_interval_says_so(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short to know more")
    outcome = run_cli(tiny_path, "--eval", path, "--json")
    assert outcome.json["files"][0]["nll_interval"] is None
    text = run_cli(tiny_path, "--eval", path).out
    assert "too few for 95% intervals" in text and "±" not in text


def test_intervals_are_the_same_in_every_run(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text((EXAMPLES / "heldout" / "wiki.txt").read_text(encoding="utf-8")[:400])
    first, second = (run_cli(tiny_path, "--eval", path, "--context", 100, "--json").json["table"] for _ in range(2))
    assert first == second and first[0]["files"][0]["nll_interval"] is not None


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


def test_eval_refuses_a_reference_of_another_vocabulary(shipped_path: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some text to score, long enough")
    other = save_tiny(tmp_path / "other", "olmoe")
    assert_one_sentence(run_cli(shipped_path, "--eval", tmp_path / "t.txt", "--reference", other), "vocabulary")
