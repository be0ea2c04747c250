"""Experts that were trained in MXFP4: a bundle keeps them exactly, at its highest tier.

The shipped model stands for one that was trained so: its experts are rounded to MXFP4. They are stored like those of
gpt-oss, which keep their codes, or packed, which any model may be; those are quantized as usual.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compile_kit import assert_codes_nest, assert_findings_fit
from helpers import EXAMPLES, MODEL, compile_cli, run_cli
from kernel_kit import ALL, COMPILED, kernels_of
from safetensors.torch import load_file, save_file

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_runtime.bundle.bundle import MANIFEST, VERSION, Bundle
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.bundle.tiers import MXFP4
from dymoe_runtime.spec import MATRICES, ExpertKey

MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LADDER = (2, 3, 4)


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nibbles uint8 [rows, cols / 2] and scales uint8 [rows, cols / 32], by OCP Microscaling Formats 1.0 (6.3)."""
    groups = weight.float().view(len(weight), -1, 32)
    exponents = groups.abs().amax(-1).log2().floor() - 2
    scaled = groups * torch.exp2(-exponents)[..., None]
    magnitude = torch.bucketize(scaled.abs(), (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2)
    codes = (magnitude + 8 * (scaled < 0)).to(torch.uint8).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, (exponents + 127).to(torch.uint8)


def save_rounded(directory: Path, packed: bool) -> Path:
    """The shipped model with its experts rounded, in the layout of gpt-oss or that of compressed-tensors."""
    directory.mkdir()
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(MODEL / "model.safetensors")
    stored = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}.mlp.experts."
        experts = [
            {name: to_mxfp4(tensors[f"{place}{expert}.{name}_proj.weight"]) for name in MATRICES}
            for expert in range(config["num_experts"])
        ]
        if packed:
            for expert, matrices in enumerate(experts):
                for name, (codes, scales) in matrices.items():
                    stored[f"{place}{expert}.{name}_proj.weight_packed"] = codes
                    stored[f"{place}{expert}.{name}_proj.weight_scale"] = scales
        else:
            for kind, part in enumerate(("blocks", "scales")):
                gate_up = torch.stack([torch.cat([m["gate"][kind], m["up"][kind]]) for m in experts])
                down = torch.stack([m["down"][kind] for m in experts])
                shape = (-1, 16) if part == "blocks" else (-1,)
                stored[f"{place}gate_up_proj_{part}"] = gate_up.unflatten(-1, shape)
                stored[f"{place}down_proj_{part}"] = down.unflatten(-1, shape)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    way = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"} if packed else None
    config["quantization_config"] = way or {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint whose experts keep their codes. Read only."""
    return save_rounded(tmp_path_factory.mktemp("mxfp4") / "trained", packed=False)


@pytest.fixture(scope="module")
def few_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text as short as calibration allows."""
    path = tmp_path_factory.mktemp("mxfp4") / "few.txt"
    path.write_text((EXAMPLES / "calibration" / "wiki.txt").read_text(encoding="utf-8")[:1200], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def kept(trained: Path, few_words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, with dense weights of 16 bits. Read only."""
    return compiled(trained, few_words, tmp_path_factory.mktemp("mxfp4") / "kept.dymoe", "2,3,4")


def compiled(model: Path, text: Path, output: Path, tiers: str) -> Path:
    outcome = compile_cli(model, "-o", output, "--tiers", tiers, "--dense-bits", 16, "--calibration", text)
    assert outcome.code == 0, outcome.err
    return output


def kl_of(bundle: Path, original: Path, text: Path) -> float:
    """KL at 4 bits to the weights as they are in the checkpoint, in nats per token, with a KV cache of 32 bits."""
    setting = ("--tiers", 4, "--kv-bits", 32, "--eval-phase", "decode")
    outcome = run_cli(bundle, "--eval", text, *setting, "--reference", original, "--json")
    assert outcome.code == 0, outcome.err
    (file,) = outcome.json["files"]
    assert file["tokens"] > 400
    return float(file["kl"])


def test_a_bundle_says_that_it_keeps_mxfp4(kept: Path) -> None:
    bundle = Bundle.open(kept)
    assert json.loads((kept / MANIFEST).read_text(encoding="utf-8"))["version"] == VERSION
    assert bundle.spec.expert_grid == MXFP4
    assert all(where.grid == MXFP4 for where in bundle.layout.matrices.values())
    assert_findings_fit(kept)
    assert_codes_nest(bundle)


@pytest.mark.parametrize("isa", ALL)
def test_kept_experts_are_those_of_the_checkpoint(kept: Path, trained: Path, isa: str) -> None:
    bundle, checkpoint = Bundle.open(kept), Checkpoint.open(trained)
    for key in (ExpertKey(0, 0), ExpertKey(2, 7), ExpertKey(5, 15)):
        segments, expert = read_record(bundle, key), checkpoint.expert(key)
        for name in MATRICES:
            weight = kernels_of(isa).dequantize(bundle.layout, 4, segments, name)
            assert np.array_equal(weight, expert[name].float().numpy())


@pytest.mark.skipif(not COMPILED, reason="the NumPy kernels take long")
def test_kept_experts_cost_less_than_those_quantized_as_usual(
    kept: Path, trained: Path, few_words: Path, tmp_path: Path
) -> None:
    """Their KL is that of activations rounded to int8 alone: with the NumPy kernels, which round none, it is 3e-9."""
    packed = save_rounded(tmp_path / "packed", packed=True)
    usual = compiled(packed, few_words, tmp_path / "usual.dymoe", "4")  # at its best: no lower tier takes part
    assert Bundle.open(usual).spec.expert_grid == ""
    text = tmp_path / "text.txt"
    domains = ((EXAMPLES / "heldout" / f"{name}.txt").read_text(encoding="utf-8")[:1200] for name in ("wiki", "code"))
    text.write_text("\n".join(domains), encoding="utf-8")
    kl = kl_of(kept, trained, text)
    assert kl <= 1e-3
    assert kl_of(usual, trained, text) > 4 * kl
