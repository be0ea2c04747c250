"""What the tests of the decoder share: tiny models that have each feature of each family."""

from __future__ import annotations

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

# Family, and what its configuration changes of `helpers.tiny_config`.
VARIANTS: list[tuple[str, dict]] = [
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
