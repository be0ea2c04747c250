"""Plans: sizes and least memory of bundles before they are made, and what is said of devices."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers import MODEL, RATES, assert_one_sentence, compile_cli, save_tiny

from dymoe_compile.job.device import profile_budget
from dymoe_compile.job.profile import Profile, load_profile, shipped_profiles
from dymoe_compile.plan.sizes import planned_bundle, total_bytes
from dymoe_runtime.bundle.bundle import DENSE, LOOK_AHEAD, TOKENIZER, Bundle
from dymoe_runtime.kernels import load_kernels

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "plan.schema.json"


def plan_of(*args: object, code: int = 0) -> dict[str, Any]:
    outcome = compile_cli(*args, "--plan", "--json")
    assert outcome.code == code, outcome.err
    plan = outcome.json
    jsonschema.validate(plan, json.loads(SCHEMA.read_text(encoding="utf-8")))
    return dict(plan)


def profile_file(folder: Path, memory: str, dense_bits: str = '"auto"') -> Path:
    path = folder / "board.toml"
    path.write_text(
        f'name = "board"\nladder = [2, 3, 4]\ndense_bits = {dense_bits}\nmemory = "{memory}"\n{RATES}', encoding="utf-8"
    )
    return path


def of_profile(plan: dict[str, Any], name: str = "board") -> dict[str, Any]:
    return next(dict(profile) for profile in plan["profiles"] if profile["name"] == name)


def test_a_plan_has_the_size_and_the_floor_of_the_bundle(shipped_path: Path) -> None:
    bundle = Bundle.open(shipped_path)
    planned = of_profile(plan_of(MODEL), "laptop-8gb")
    dense = bundle.manifest.files[DENSE].nbytes  # with fewer bits where they cost little
    assert dense <= planned["dense_bytes"] and planned["dense_bits_may_change"]
    assert planned["bundle_bytes"] - planned["dense_bytes"] == pytest.approx(bundle.total_bytes() - dense, rel=0.01)
    assert (
        planned["dense_bytes"] + sum(planned["tier_bytes"].values()) + planned["other_bytes"]
        == (planned["bundle_bytes"])
    )
    assert sum(planned["tier_bytes"].values()) == bundle.expert_bytes()
    real = profile_budget(bundle, load_profile("laptop-8gb"), load_kernels())
    assert planned["floor_bytes"] == pytest.approx(real.floor_bytes, rel=0.02)
    assert {point.name for point in bundle.policy.points} <= {point["name"] for point in planned["points"]}
    assert planned["default_point"] == bundle.policy.default_point


def test_files_of_weights_have_the_planned_bytes(tiny_path: Path) -> None:
    bundle = Bundle.open(tiny_path)
    files = bundle.manifest.files
    planned = planned_bundle(
        bundle.spec, bundle.manifest.ladder, bundle.manifest.dense_bits, files[TOKENIZER].nbytes
    ).manifest
    assert planned.layers.keys() == bundle.manifest.layers.keys()
    for name, entry in files.items():
        if bundle.manifest.is_weights(name):
            assert planned.files[name].nbytes == entry.nbytes, name
    assert {layer: entry.data_start for layer, entry in planned.layers.items()} == {
        layer: entry.data_start for layer, entry in bundle.manifest.layers.items()
    }
    predictors = planned.files[LOOK_AHEAD].nbytes
    assert files[LOOK_AHEAD].nbytes <= predictors + 512


def test_total_bytes_counts_every_layer_of_the_manifest(tiny_path: Path) -> None:
    bundle = Bundle.open(tiny_path)
    planned = planned_bundle(bundle.spec, bundle.manifest.ladder, bundle.manifest.dense_bits, 1000)
    weights = sum(entry.nbytes for entry in planned.manifest.files.values())
    assert total_bytes(planned) - weights == pytest.approx(len(planned.manifest.to_text()), abs=3000)


def test_the_configuration_and_the_index_are_enough(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = plan_of(tiny_checkpoint)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_checkpoint / name, alone)
    planned = plan_of(alone)
    assert (whole["model"]["basis"], planned["model"]["basis"]) == ("headers", "config")
    assert planned["profiles"] == whole["profiles"]
    assert whole["model"]["checkpoint_bytes"] > 0 and planned["model"]["checkpoint_bytes"] is None
    index = {"metadata": {"total_size": 12345}, "weight_map": {"model.norm.weight": "model-00001.safetensors"}}
    (alone / "model.safetensors.index.json").write_text(json.dumps(index))
    assert plan_of(alone)["model"]["checkpoint_bytes"] == 12345
    text = compile_cli(alone, "--plan")
    assert text.code == 0 and "by config.json, because not all files" in text.out


def test_no_weight_is_read_and_nothing_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Weights that are not finite would be an error, and so would shards that end early."""
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    before = plan_of(model)
    shard = model / "model.safetensors"
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:header] + b"\xff" * (size - header))
    assert plan_of(model, "-o", tmp_path / "out.dymoe") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_tied_heads_and_dense_bits_and_tiers_are_those_that_are_asked_for(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True)
    eight, four = (of_profile(plan_of(model, "--dense-bits", bits), "laptop-8gb") for bits in (8, 4))
    assert four["dense_bytes"] < eight["dense_bytes"] and (eight["dense_bits"], four["dense_bits"]) == (8, 4)
    fewer = of_profile(plan_of(model, "--tiers", "2,4"), "laptop-8gb")
    assert list(fewer["tier_bytes"]) == ["2", "4"] and fewer["points"][-1]["name"] == "uniform-4"
    single = of_profile(plan_of(model, "--tiers", "3"), "laptop-8gb")
    assert [point["name"] for point in single["points"]] == ["uniform-3"] and single["default_point"] == "uniform-3"


def test_all_shipped_profiles_are_planned_for_or_those_that_are_named() -> None:
    assert [profile["name"] for profile in plan_of(MODEL)["profiles"]] == shipped_profiles()
    named = plan_of(MODEL, "--profile", "laptop-16gb", "laptop-8gb")
    assert [profile["name"] for profile in named["profiles"]] == ["laptop-16gb", "laptop-8gb"]


def test_a_device_that_is_too_small_is_said_and_fails_where_it_was_asked_for(tmp_path: Path) -> None:
    small = profile_file(tmp_path, "48MiB")
    planned = of_profile(plan_of(MODEL, "--profile", small, code=4))
    assert not planned["fits"] and planned["points"] == [] and planned["default_point"] is None
    assert planned["why"].startswith("needs ") and "has 48.0 MiB" in planned["why"]
    assert planned["dense_bits"] == 4  # the fewest, which would still not be enough
    outcome = compile_cli(MODEL, "--plan", "--profile", small)
    assert outcome.code == 4 and outcome.err.count("\n") == 1 and "board: too little memory" in outcome.err
    assert "no  needs" in outcome.out


def test_a_profile_without_rates_has_sizes_and_no_speed(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    kept = (
        'name = "board"\nladder = [2, 3, 4]\ndense_bits = 8\nmemory = "1GiB"\nthreads = 2\ndisk_bandwidth = "1GB/s"\n'
    )
    path.write_text(kept, encoding="utf-8")
    planned = of_profile(plan_of(MODEL, "--profile", path))
    assert planned["fits"] and planned["bundle_bytes"] > 10**6
    assert {(point["tokens_per_s"], point["first_token_s"]) for point in planned["points"]} == {(None, None)}
    table = compile_cli(MODEL, "--plan", "--profile", path)
    assert table.code == 0 and "board" in table.out


def test_a_device_with_room_for_some_experts_streams_the_others(tmp_path: Path) -> None:
    floor = of_profile(plan_of(MODEL, "--profile", profile_file(tmp_path, "1GiB")))["floor_bytes"]
    middle = of_profile(plan_of(MODEL, "--profile", profile_file(tmp_path, str(floor + (2 << 20)))))
    assert middle["fits"] and middle["dense_bits_may_change"] and "read from the disk" in middle["why"]
    shares = [point["resident_share"] for point in middle["points"]]
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < 1
    speeds = [point["tokens_per_s"] for point in middle["points"]]
    assert speeds == sorted(speeds, reverse=True) and speeds[-1] < speeds[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tiers", "4,3"), ("--tiers 4,3",)),
        (("--dense-bits", "3"), ("--dense-bits",)),
        (("--profile", "laptop-8tb"), ("laptop-8tb", "no such profile")),
    ],
)
def test_bad_flags_get_one_sentence(flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_sentence(compile_cli(MODEL, "--plan", *flags), *words)


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    quality = compile_cli(MODEL, "--plan", "--max-kl", "0.1")
    assert quality.code == 2 and "--max-kl" in quality.err
    two = compile_cli(MODEL, "-o", tmp_path / "o.dymoe", "--profile", "laptop-8gb", "laptop-16gb")
    assert two.code == 2 and "--plan" in two.err
    assert_one_sentence(compile_cli(tmp_path / "absent", "--plan"), "no such directory")


def test_a_plan_needs_no_torch() -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['dymoe-compile', {str(MODEL)!r}, '--plan']; "
    code += "from dymoe_compile.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "tokens/s by operating point" in done.stdout


def test_what_decides_a_bundle_is_in_its_provenance(shipped_path: Path) -> None:
    kept = Bundle.open(shipped_path).manifest.provenance["profile"]
    profile: Profile = load_profile("laptop-8gb")
    assert kept == profile.to_json() and set(kept) == {"name", "ladder", "dense_bits", "memory_bytes"}
