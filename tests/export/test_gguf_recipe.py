"""Recipes for llama.cpp's quantizers: which matrix gets how many bits, and what is in the importance matrix."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from export.gguf_kit import File
from helpers import Outcome, assert_one_sentence, bundle_cli, compiled, save_tiny

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.export.gguf.recipe import Matrix, solve_recipe
from dymoe_compile.export.gguf.types import TYPES, types_for
from dymoe_compile.export.walk import windows_of
from dymoe_runtime import Bundle, load_kernels
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey

WEIGHTS = 1 << 20


def matrix(name: str, harm: float, cols: int = 256) -> Matrix:
    """A matrix whose error costs `harm` times the squared error of a type."""
    return Matrix(name, WEIGHTS, {each: harm * each.error for each in types_for(cols)})


def test_a_matrix_whose_errors_do_more_harm_gets_more_bits_within_the_budget() -> None:
    matrices = [matrix("mild", 1.0), matrix("harsh", 30.0), matrix("narrow", 30.0, cols=32)]
    costs = []
    for bits in (3.0, 4.5, 6.0):
        recipe = solve_recipe(matrices, int(3 * WEIGHTS * bits / 8))
        assert sum(m.nbytes(recipe.types[m.name]) for m in matrices) <= 3 * WEIGHTS * bits / 8
        assert recipe.types["mild"].bits < recipe.types["harsh"].bits
        assert recipe.types["narrow"].block == 32
        costs.append(recipe.kl)
    assert costs == sorted(costs, reverse=True)


def test_what_cannot_be_so_small_is_one_sentence() -> None:
    with pytest.raises(DymoeError, match=r"at least .* --size or --bits"):
        solve_recipe([matrix("a", 1.0)], WEIGHTS // 8)


def test_types_without_an_importance_matrix_do_not_need_one() -> None:
    assert {each.name for each in types_for(256, has_importance=False)} >= {"q2_K", "iq4_xs", "q8_0"}
    assert not any(each.needs_importance for each in types_for(256, has_importance=False))
    assert [each.name for each in types_for(40)] == ["f16"]
    assert [each.bits for each in TYPES] == sorted(each.bits for each in TYPES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose rows are blocks of 32 columns. Read only."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    return save_tiny(tmp_path_factory.mktemp("blocks"), "qwen3_moe", **sizes)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint, compiled. Read only."""
    return compiled(checkpoint, tmp_path_factory.mktemp("bundle") / "blocks.dymoe", calibration_text)


def export(bundle: Path, output: Path, *args: object) -> Outcome:
    return bundle_cli("export", bundle, "-o", output, "--format", "gguf", *args)


@pytest.fixture(scope="module")
def exported(bundle: Path, checkpoint: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What llama-quantize needs for 5 bits a weight. Read only."""
    output = tmp_path_factory.mktemp("recipe") / "out"
    outcome = export(bundle, output, "--bits", 5, "--checkpoint", checkpoint, "--calibration", calibration_text)
    assert outcome.code == 0 and "README.md" in outcome.out, outcome.err
    return output


def test_the_original_is_the_checkpoint(exported: Path, checkpoint: Path) -> None:
    file, original = File(exported / "original.gguf"), Checkpoint.open(checkpoint)
    stack = file.tensor("blk.1.ffn_up_exps.weight")
    for expert in range(original.spec.num_experts):
        assert np.array_equal(stack[expert], original.expert(ExpertKey(1, expert))["up"].float().numpy())
    assert np.array_equal(file.tensor("token_embd.weight"), original.tensor("embed").float().numpy())


def test_every_matrix_has_a_type_and_all_fit_the_bits(exported: Path) -> None:
    lines = (exported / "types.txt").read_text().split()
    chosen = dict(line.split("=") for line in lines)
    bits = {each.name: each.bits for each in TYPES}
    file = File(exported / "original.gguf")
    quantized = [name for name in file.types if name.endswith("weight") and not re.search("_norm|ffn_gate_inp", name)]
    assert {name for name in quantized for pattern in chosen if re.search(pattern, name)} == set(quantized)
    assert len(chosen) == len(quantized)
    weights = {name: file.tensor(name).size for name in quantized}
    taken = sum(weights[re.sub(r"[\\^$]", "", name)] * bits[kind] for name, kind in chosen.items())
    record = json.loads((exported / "export.json").read_text())
    assert taken <= 5 * sum(weights.values())
    assert record["quantized_bits"] == pytest.approx(taken / sum(weights.values()), abs=0.001)
    assert record["mode"] == "recipe" and record["types"] and record["expected_kl"] > 0
    assert (
        "llama-quantize --imatrix importance.gguf --tensor-type-file types.txt" in (exported / "README.md").read_text()
    )


def test_the_importance_is_that_of_the_inputs(
    exported: Path, bundle: Path, checkpoint: Path, calibration_text: Path
) -> None:
    """For the first layer, computed here from the embeddings; and for experts, that each token counts once a choice."""
    file, opened = File(exported / "importance.gguf"), Bundle.open(bundle)
    ids = windows_of(opened, [str(calibration_text)]).train
    decoder = open_original(checkpoint, load_kernels("numpy")).decoder
    x = torch.from_numpy(decoder.embed(ids.reshape(-1))).double()
    norm = torch.from_numpy(decoder.dense.vector("layers.0.attn_norm"))
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + opened.spec.norm_eps) * norm
    assert np.allclose(file.tensor("blk.0.attn_q.weight.in_sum2")[0], normed.square().sum(0).numpy(), rtol=1e-4)
    assert file.tensor("blk.0.attn_q.weight.counts").tolist() == [[ids.size]]
    for name in ("gate", "up", "down"):
        counts = file.tensor(f"blk.1.ffn_{name}_exps.weight.counts")
        assert counts.shape == (opened.spec.num_experts, 1) and counts.sum() == ids.size * opened.spec.top_k
    assert file.values["general.type"] == "imatrix"


def test_two_recipes_are_the_same_bytes_and_a_size_is_kept(
    exported: Path, bundle: Path, checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    record = json.loads((exported / "export.json").read_text())
    again = ("--checkpoint", checkpoint, "--calibration", calibration_text, "--json")
    outcome = export(bundle, tmp_path / "out", "--size", record["quantized_bytes"], *again)
    assert outcome.json["quantized_bytes"] <= record["quantized_bytes"]
    for name in ("original.gguf", "importance.gguf", "types.txt"):
        assert (exported / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--bits", 4), ("--size or --bits and --checkpoint",)),
        (("--checkpoint", "x"), ("--size or --bits and --checkpoint",)),
        (("--bits", 4, "--size", "3MiB", "--checkpoint", "x"), ("--size and --bits",)),
        (("--calibration", "x"), ("--calibration",)),
    ],
)
def test_flags_that_do_not_go_together_are_one_sentence(
    tiny_path: Path, tmp_path: Path, args: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_one_sentence(export(tiny_path, tmp_path / "out", *args), *words)
    assert not list(tmp_path.iterdir())


def test_too_few_bits_leave_nothing(bundle: Path, checkpoint: Path, calibration_text: Path, tmp_path: Path) -> None:
    outcome = export(
        bundle, tmp_path / "out", "--bits", 0.5, "--checkpoint", checkpoint, "--calibration", calibration_text
    )
    assert outcome.code == 1 and "give more --size or --bits" in outcome.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
