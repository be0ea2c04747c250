"""Which models have an architecture in llama.cpp, how their rows are ordered, and how text is split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from export.gguf_kit import File, bundle_like, spec_of
from families.cases import CASES
from families.harness import COMMON, Case
from helpers import save_tiny, tiny_config

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.export.gguf.architectures import ARCHITECTURES, architecture_of, context_of
from dymoe_compile.export.gguf.original import write_original
from dymoe_compile.export.gguf.splits import BYTE_LEVEL, merges_reach_all, split_name
from dymoe_compile.job.progress import silent
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import AttentionSpec

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_model_has_an_architecture_or_is_refused_by_name(case: Case) -> None:
    spec = spec_of(case.config(dict(COMMON)))
    try:
        architecture = architecture_of(spec)
    except DymoeError as error:
        assert str(error).startswith(f"{spec.model_type}: ") and "dymoe-run" in str(error)
    else:
        assert ARCHITECTURES[spec.model_type] is architecture


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": "none"}, "lacks head norms"),
        ({"sinks": True}, "has sinks"),
        ({"clip": 3.0}, "has clipped"),
        ({"rope": None}, "layers without positions"),
    ],
)
def test_what_an_architecture_cannot_run_is_named(changes: dict[str, object], words: str) -> None:
    spec = spec_of(tiny_config("qwen3_moe"))
    layers = tuple(replace(layer, mixer=replace(layer.mixer, **changes)) for layer in spec.layers)
    with pytest.raises(DymoeError, match=words):
        architecture_of(replace(spec, layers=layers))


def test_without_windows_the_context_is_the_window() -> None:
    spec = spec_of(tiny_config("mixtral", sliding_window=100))
    assert context_of(spec, architecture_of(spec)) == 100 < spec.max_context


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_rows_of_heads_are_in_the_order_of_the_rotary_embedding(family: str, tmp_path: Path) -> None:
    """Mixtral's architecture turns neighbouring columns, that of OLMoE those half a head apart, as the checkpoint."""
    heads = {"num_key_value_heads": 4} if family == "olmoe" else {}
    checkpoint = Checkpoint.open(save_tiny(tmp_path, family, **heads))
    sizes = write_original(bundle_like(checkpoint, tmp_path), checkpoint, tmp_path / "a.gguf", silent)
    file, attention = File(tmp_path / "a.gguf"), checkpoint.spec.layers[0].mixer
    assert isinstance(attention, AttentionSpec) and set(sizes) == set(file.types)
    stored, ours = file.tensor("blk.1.attn_k.weight"), checkpoint.tensor("layers.1.attn.k").float().numpy()
    heads = ours.reshape(attention.kv_heads, attention.head_dim, -1)
    if family == "mixtral":
        half = attention.head_dim // 2
        heads = np.stack([heads[:, :half], heads[:, half:]], axis=2)
    assert np.array_equal(stored, heads.reshape(ours.shape))
    assert np.array_equal(file.tensor("blk.1.attn_v.weight"), checkpoint.tensor("layers.1.attn.v").float().numpy())


def tokenizer(*steps: dict[str, object], **model: object) -> dict[str, object]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, "model": model}


BYTES = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((split(QWEN), BYTES), "qwen2"),
        ((split(QWEN, "Removed", True), BYTES), "qwen2"),
        ((split(QWEN.replace(r"\p{N}| ", r"\p{N}{1,3}| ")), BYTES), "llama-bpe"),
        (({**BYTES, "use_regex": True},), "gpt-2"),
        ((DIGITS, {**BYTES, "use_regex": True}), "starcoder"),
        ((split(BYTE_LEVEL), BYTES), "gpt-2"),
    ],
)
def test_a_split_gets_the_name_that_llamacpp_has_for_it(steps: tuple[dict[str, object], ...], name: str) -> None:
    assert split_name(tokenizer(*steps, vocab={"a": 0}, merges=[]), has_merges=True) == name


@pytest.mark.parametrize(
    "steps",
    [
        (split(QWEN, "MergedWithNext"), BYTES),
        (split(QWEN + "|x"), BYTES),
        (DIGITS, split(QWEN), BYTES),
        (BYTES,),
        ({**BYTES, "use_regex": True, "add_prefix_space": True},),
    ],
)
def test_a_split_without_a_name_is_refused_unless_nothing_merges(steps: tuple[dict[str, object], ...]) -> None:
    values = tokenizer(*steps, vocab={"a": 0}, merges=[])
    with pytest.raises(DymoeError, match="splits text"):
        split_name(values, has_merges=True)
    assert split_name(values, has_merges=False) == "gpt-2"


def test_words_that_merges_do_not_reach_decide_whether_merges_may_be_ignored() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    steps = ({**BYTES, "use_regex": True},)
    for merges, reached in ((["a b", "ab c"], True), (["a b"], False)):
        assert merges_reach_all({"vocab": vocab, "merges": merges}) == reached
        values = tokenizer(*steps, vocab=vocab, merges=merges, ignore_merges=True)
        if reached:
            assert split_name(values, has_merges=True) == "gpt-2"
        else:
            with pytest.raises(DymoeError, match="ignore_merges"):
                split_name(values, has_merges=True)
