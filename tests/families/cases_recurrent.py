"""Cases of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from families.harness import Case
from families.tiny import EXPERTS, FULL, MROPE, VISION, Values, model_class, of, with_vision

LINEAR = "linear_attention"
DELTA: Values = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
HYBRID: Values = {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 28, "head_dim": 24}

CASES = [
    Case("qwen3_next", "hybrid", of("Qwen3NextConfig", **HYBRID, intermediate_size=56, mlp_only_layers=[2])),
    Case(
        "qwen3_next",
        "given-layers",
        of(
            "Qwen3NextConfig",
            **{**HYBRID, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 4},
            layer_types=[FULL, LINEAR, FULL, LINEAR],
            norm_topk_prob=False,
            decoder_sparse_step=2,
            intermediate_size=56,
            partial_rotary_factor=0.5,
        ),
    ),
    Case("qwen3_5_moe", "text", of("Qwen3_5MoeTextConfig", **HYBRID)),
    Case(
        "qwen3_5_moe",
        "vision",
        with_vision(
            "Qwen3_5MoeConfig",
            VISION,
            **{**HYBRID, "linear_num_key_heads": 3},
            rope_parameters={**MROPE, "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        ),
        model_class("Qwen3_5MoeForConditionalGeneration"),
    ),
]
