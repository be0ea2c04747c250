"""Shared fixtures: the shipped model, tiny random checkpoints, and a compiled bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "model"

torch.set_num_threads(2)


def tiny_config(family: str, **changes: object) -> object:
    """A transformers configuration small enough to run in milliseconds."""
    transformers = pytest.importorskip("transformers")
    common = dict(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    own = {
        "qwen3_moe": dict(
            moe_intermediate_size=40, intermediate_size=72, head_dim=16, num_experts=6, norm_topk_prob=True
        ),
        "olmoe": dict(intermediate_size=40, num_experts=6),
        "mixtral": dict(intermediate_size=40, num_local_experts=6),
    }[family]
    config_class = {
        "qwen3_moe": transformers.Qwen3MoeConfig,
        "olmoe": transformers.OlmoeConfig,
        "mixtral": transformers.MixtralConfig,
    }[family]
    return config_class(**{**common, **own, **changes})


def tiny_model(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random transformers model whose norms and biases are not trivial."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.3 if "experts" in name or "gate" in name else 0.15)
    return model
