"""`dymoe-bundle export --format gguf`: what is in the file, read back, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from export.gguf_kit import File
from helpers import Outcome, assert_one_sentence, bundle_cli

from dymoe_runtime import Bundle, Tokenizer, load_kernels
from dymoe_runtime.bundle.records import read_record
from dymoe_runtime.bundle.tiers import dequantize
from dymoe_runtime.model.weights import BundleDense
from dymoe_runtime.spec import ExpertKey

# The most that the 16-bit scale of a block is off, relative to it; and half a step of 8 bits, relative to the largest.
HALF_ULP, HALF_STEP = 2.0**-11, 0.5 / 127


def export(bundle: Path, output: Path, *args: object) -> Outcome:
    return bundle_cli("export", bundle, "-o", output, "--format", "gguf", *args)


def exported(bundle: Path, output: Path, *args: object) -> File:
    outcome = export(bundle, output, *args)
    assert outcome.code == 0, outcome.err
    return File(output)


@pytest.mark.parametrize("tier", [2, 3, 4])
def test_every_value_of_a_tier_is_there_but_for_the_rounding_of_scales(
    shipped_path: Path, tmp_path: Path, tier: int
) -> None:
    bundle, file = Bundle.open(shipped_path), exported(shipped_path, tmp_path / "a.gguf", "--tier", tier)
    for layer in bundle.spec.moe_layers[::2]:
        for name, where in bundle.layout.matrices.items():
            stack = file.tensor(f"blk.{layer}.ffn_{name}_exps.weight")
            assert file.types[f"blk.{layer}.ffn_{name}_exps.weight"] == "Q8_0"
            assert stack.shape == (bundle.spec.num_experts, where.rows, where.cols)
            for expert in (0, 7, bundle.spec.num_experts - 1):
                expected = dequantize(read_record(bundle, ExpertKey(layer, expert)), where, tier)
                assert (np.abs(stack[expert] - expected) <= HALF_ULP * np.abs(expected)).all()


def test_rows_that_are_no_blocks_of_32_are_16_bit_floats(tiny_path: Path, tmp_path: Path) -> None:
    bundle, outcome = Bundle.open(tiny_path), export(tiny_path, tmp_path / "a.gguf")
    file, where = File(tmp_path / "a.gguf"), bundle.layout.matrices["down"]
    assert outcome.code == 0 and "F16" in outcome.out and where.cols % 32
    expected = dequantize(read_record(bundle, ExpertKey(1, 3)), where, 4)
    assert file.types["blk.1.ffn_down_exps.weight"] == "F16"
    assert np.array_equal(file.tensor("blk.1.ffn_down_exps.weight")[3], expected.astype(np.float16))


def test_all_other_tensors_are_there(shipped_path: Path, tmp_path: Path) -> None:
    bundle, file = Bundle.open(shipped_path), exported(shipped_path, tmp_path / "a.gguf")
    spec, kernels = bundle.spec, load_kernels()
    dense = BundleDense(bundle, kernels)
    assert len(file.types) == sum(1 for _ in spec.each_tensor()) + 3 * len(spec.moe_layers)
    assert np.array_equal(file.tensor("blk.3.ffn_gate_inp.weight"), dense.vector("layers.3.router"))
    assert np.array_equal(file.tensor("blk.3.attn_q_norm.weight"), dense.vector("layers.3.attn.q_norm"))
    assert np.array_equal(file.tensor("output_norm.weight"), dense.vector("norm"))
    layout, data = dense.record("layers.2.attn.k") or pytest.fail("it is quantized")
    for name, expected in (
        ("token_embd.weight", dense.embed(np.arange(spec.vocab_size))),
        ("blk.2.attn_k.weight", dequantize([data], layout.matrices["weight"], layout.ladder[0])),
    ):
        blocks = np.abs(expected).reshape(len(expected), -1, 32).max(axis=-1).repeat(32, axis=1)
        assert (np.abs(file.tensor(name) - expected) <= blocks * (HALF_STEP + HALF_ULP)).all()


def test_the_metadata_are_those_of_the_model(shipped_path: Path, tmp_path: Path) -> None:
    bundle, file = Bundle.open(shipped_path), exported(shipped_path, tmp_path / "a.gguf", "--tier", 3)
    spec, attention = bundle.spec, bundle.spec.layers[0].mixer
    assert file.values["general.architecture"] == "qwen3moe"
    for name, value in {
        "block_count": spec.num_layers,
        "context_length": spec.max_context,
        "embedding_length": spec.hidden_size,
        "expert_feed_forward_length": spec.expert_width,
        "expert_count": spec.num_experts,
        "expert_used_count": spec.top_k,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "rope.freq_base": attention.rope.theta,
        "attention.layer_norm_rms_epsilon": pytest.approx(spec.norm_eps),
    }.items():
        assert file.of_model(name) == value, name
    assert (file.values["dymoe.bits"], file.values["dymoe.bundle_sha256"]) == (3, bundle.manifest.digest)


def test_the_vocabulary_is_that_of_the_tokenizer(shipped_path: Path, tmp_path: Path) -> None:
    file, tokenizer = exported(shipped_path, tmp_path / "a.gguf"), Tokenizer.load(shipped_path)
    values = file.values
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert tokens == [tokenizer.token(index) for index in range(len(tokens))]
    assert [index for index, kind in enumerate(types) if kind == 3] == sorted(tokenizer.special_ids.values())
    assert {*types} == {1, 3}
    assert values["tokenizer.ggml.eos_token_id"] in tokenizer.eos_ids
    assert values["tokenizer.ggml.add_bos_token"] is False and values["tokenizer.ggml.add_eos_token"] is False
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    ranks = {merge: rank for rank, merge in enumerate(values["tokenizer.ggml.merges"])}
    for text in ("The quick brown fox, isn't it?", "def f(x):\n    return x + 123\n"):
        ids = [
            index
            for word in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
            for index in merged(word[0], ranks, tokens)
        ]
        assert ids == tokenizer.encode(text)


def merged(word: str, ranks: dict[str, int], tokens: list[str]) -> list[int]:
    """The tokens of a word: pairs merge in the order of their ranks."""
    parts = list(word)
    while pairs := [(ranks.get(" ".join(pair)), at) for at, pair in enumerate(pairwise(parts))]:
        known = [(rank, at) for rank, at in pairs if rank is not None]
        if not known:
            break
        _, at = min(known)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [tokens.index(part) for part in parts]


def test_the_command_says_what_it_wrote_and_what_it_left(tiny_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    values = export(tiny_path, output, "--json").json
    assert (values["bits"], values["architecture"], values["bytes"]) == (4, "qwen3moe", output.stat().st_size)
    assert any("memory budget" in note for note in values["notes"])
    text = export(tiny_path, tmp_path / "b.gguf").out
    assert "times the bundle's weights" in text and values["notes"][0] in text
    assert output.read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--tier", 5), ("--tier 5", "2, 3, 4")),
        (("--portable",), ("--portable", "onnx")),
        (("--context", 64), ("--context", "onnx")),
        (("--int4", "--checkpoint", "x"), ("--int4", "onnx")),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tiny_path: Path, tmp_path: Path, args: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_one_sentence(export(tiny_path, tmp_path / "out", *args), *words)
    assert not list(tmp_path.iterdir())


def test_what_is_at_the_output_stays(tiny_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("mine")
    assert_one_sentence(export(tiny_path, output), str(output), "-o")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and output.read_text() == "mine"
