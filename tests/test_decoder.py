"""The decoder at full precision equals transformers, and decoding equals prefilling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, tiny_model

from dymoe_compile.reference import open_reference
from dymoe_runtime.decoder import in_groups
from dymoe_runtime.kv_cache import KVCache

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}

VARIANTS = [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3_moe", {"mlp_only_layers": [1], "rope_parameters": YARN}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 7}),
    ("qwen3_moe", {"num_key_value_heads": 1, "hidden_act": "gelu", "num_experts_per_tok": 6}),
    ("olmoe", {}),
    ("olmoe", {"clip_qkv": 0.5, "attention_bias": True, "num_key_value_heads": 4}),
    ("olmoe", {"norm_topk_prob": True, "rope_parameters": LLAMA3}),
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 5, "rope_parameters": LINEAR}),
    ("mixtral", {"head_dim": 20, "tie_word_embeddings": True, "num_experts_per_tok": 1}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_equal_transformers(family: str, changes: dict, tmp_path: Path) -> None:
    model = tiny_model(family, **changes)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(1).integers(0, 97, 70)
    check_against(model, tmp_path, ids)


def test_shipped_model_equals_transformers() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    check_against(model, MODEL, np.random.default_rng(1).integers(0, 4096, 300))


def check_against(model: torch.nn.Module, path: Path, ids: np.ndarray) -> None:
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    decoder = open_reference(path)
    got = decoder.logits(decoder.forward(ids))
    assert np.abs(got - expected).max() <= 1e-3
    assert np.array_equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_decoding_equals_prefilling(family: str, changes: dict, tmp_path: Path) -> None:
    tiny_model(family, **changes).save_pretrained(tmp_path)
    ids = np.random.default_rng(2).integers(0, 97, 40)
    decoder = open_reference(tmp_path)
    whole = decoder.logits(decoder.forward(ids))
    cache = KVCache(decoder.spec, 40, bits=32)
    pieces = [ids[:11], ids[11:30], *in_groups(ids[30:], 1)]
    stepwise = np.concatenate([decoder.logits(decoder.forward(piece, cache)) for piece in pieces])
    cache = KVCache(decoder.spec, 40, bits=32)
    pieces = in_groups(ids, 23)
    grouped = np.concatenate([decoder.logits(decoder.forward(piece, cache, group=8)) for piece in pieces])
    assert np.abs(whole - stepwise).max() <= 1e-4
    assert np.abs(whole - grouped).max() <= 1e-4
