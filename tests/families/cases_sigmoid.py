"""Cases of families whose routers take the sigmoid of each logit."""

from __future__ import annotations

from typing import Any

from families.harness import Case
from families.tiny import (
    FAST_YARN,
    FULL,
    HEAD,
    LLAMA3,
    MSCALE_YARN,
    SLIDING,
    SMALL,
    WINDOW,
    Values,
    model_class,
    of,
    with_vision,
)

KINDS = [SLIDING, FULL, SLIDING, FULL]
WIDTHS: Values = {"num_experts_per_tok": 3, "intermediate_size": 56, "moe_intermediate_size": 40}
GROUPS: Values = {**WIDTHS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7}
MINIMAX: Values = {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40}
DOTS: Values = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
}
AFMOE: Values = {**SMALL, "sliding_window": WINDOW}
FLINT: Values = {**SMALL, "shared_expert_intermediate_size": 24, "sliding_window": WINDOW, "head_dim": 12}
LLAMA: Values = {
    "intermediate_size": 40,
    "intermediate_size_mlp": 56,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "head_dim": HEAD,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "attn_scale": 0.3,
}
LLAMA_VISION: Values = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}


def exaone_full(common: Values) -> Any:
    """No window: all layers turn."""
    config = of(
        "ExaoneMoeConfig",
        **WIDTHS,
        num_experts=6,
        norm_topk_prob=False,
        layer_types=[FULL] * 4,
        mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
        rope_parameters=FAST_YARN,
    )(common)
    object.__setattr__(config, "sliding_window", None)  # the model knows it, the configuration's check does not
    return config


# The router of DeepSeek-V3.
GROUPED = [
    Case(
        "glm4_moe",
        "groups",
        of(
            "Glm4MoeConfig",
            **GROUPS,
            n_routed_experts=8,
            n_shared_experts=2,
            first_k_dense_replace=2,
            head_dim=HEAD,
            attention_bias=True,
            use_qk_norm=True,
        ),
    ),
    Case(
        "glm4_moe",
        "plain",
        of(
            "Glm4MoeConfig",
            **WIDTHS,
            n_routed_experts=6,
            first_k_dense_replace=0,
            norm_topk_prob=False,
            head_dim=24,
            rope_parameters={**FAST_YARN, "partial_rotary_factor": 0.25},
        ),
    ),
    Case(
        "exaone_moe",
        "windows",
        of(
            "ExaoneMoeConfig",
            **GROUPS,
            num_experts=8,
            num_shared_experts=2,
            head_dim=HEAD,
            first_k_dense_replace=1,
            sliding_window=WINDOW,
            sliding_window_pattern=3,
            rope_parameters={"rope_type": "default", "rope_theta": 3000.0},
        ),
    ),
    Case("exaone_moe", "full", exaone_full),
    Case(
        "solar_open",
        "groups",
        of(
            "SolarOpenConfig",
            **GROUPS,
            n_routed_experts=8,
            n_shared_experts=2,
            head_dim=HEAD,
            attention_bias=True,
            rope_parameters=FAST_YARN,
        ),
    ),
    Case(
        "solar_open",
        "plain",
        of("SolarOpenConfig", **WIDTHS, n_routed_experts=6, head_dim=6, norm_topk_prob=False, tie_word_embeddings=True),
    ),
    Case(
        "dots1",
        "groups and windows",
        of(
            "Dots1Config",
            **{**DOTS, "n_shared_experts": 2},
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            attention_bias=True,
            sliding_window=WINDOW,
            max_window_layers=2,
            head_dim=6,
        ),
    ),
    Case(
        "dots1",
        "yarn, gates not normalized, tied",
        of("Dots1Config", **DOTS, rope_parameters=MSCALE_YARN, tie_word_embeddings=True),
    ),
]
OTHERS = [
    Case("minimax_m2", "partial", of("MiniMaxM2Config", **MINIMAX, head_dim=HEAD, rotary_dim=8, rms_norm_eps=1e-5)),
    Case(
        "minimax_m2",
        "full",
        of(
            "MiniMaxM2Config",
            intermediate_size=24,
            num_local_experts=5,
            num_experts_per_tok=1,
            head_dim=6,
            tie_word_embeddings=True,
            rope_parameters=FAST_YARN,
        ),
    ),
    Case(
        "laguna",
        "by-layer",
        of(
            "LagunaConfig",
            **WIDTHS,
            num_experts=8,
            head_dim=HEAD,
            sliding_window=WINDOW,
            shared_expert_intermediate_size=36,
            moe_routed_scaling_factor=2.5,
            moe_router_logit_softcapping=1.5,
            num_attention_heads_per_layer=[4, 6, 2, 8],
            layer_types=KINDS,
            attention_bias=True,
            rope_parameters={
                FULL: {**FAST_YARN, "partial_rotary_factor": 0.5, "attention_factor": 1.2},
                SLIDING: {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 1.0},
            },
        ),
    ),
    Case(
        "laguna",
        "elements",
        of(
            "LagunaConfig",
            **WIDTHS,
            num_experts=6,
            head_dim=12,
            sliding_window=WINDOW,
            shared_expert_intermediate_size=24,
            layer_types=KINDS,
            mlp_layer_types=["dense", "sparse", "dense", "sparse"],
            gating="per-element",
        ),
    ),
    Case(
        "hy_v3",
        "biases, two shared experts, dense layers between",
        of(
            "HYV3Config",
            **SMALL,
            attention_bias=True,
            num_shared_experts=2,
            head_dim=HEAD,
            mlp_layer_types=["dense", "sparse", "dense", "sparse"],
            rope_parameters=LLAMA3,
        ),
    ),
    Case(
        "hy_v3",
        "defaults, tied",
        of("HYV3Config", **SMALL, head_dim=12, router_scaling_factor=1.5, tie_word_embeddings=True),
    ),
    Case(
        "afmoe",
        "all features",
        of(
            "AfmoeConfig",
            **AFMOE,
            head_dim=HEAD,
            num_key_value_heads=1,
            mup_enabled=True,
            route_scale=2.826,
            attention_bias=True,
            num_dense_layers=1,
            global_attn_every_n_layers=2,
        ),
    ),
    Case(
        "afmoe",
        "no dense layer, layer types, yarn",
        of(
            "AfmoeConfig",
            **AFMOE,
            head_dim=12,
            num_dense_layers=0,
            num_shared_experts=1,
            layer_types=[FULL, SLIDING, SLIDING, FULL],
            rope_parameters=MSCALE_YARN,
            tie_word_embeddings=True,
        ),
    ),
    Case("flint", "defaults", of("FlintConfig", **FLINT, num_hidden_layers=5)),
    Case(
        "flint",
        "gates not normalized, sparse steps, biases, llama3",
        of(
            "FlintConfig",
            **{**FLINT, "head_dim": HEAD},
            norm_topk_prob=False,
            decoder_sparse_step=2,
            mlp_only_layers=[],
            attention_bias=True,
            layer_types=[SLIDING, FULL, SLIDING, SLIDING],
            rope_parameters=LLAMA3,
            tie_word_embeddings=True,
        ),
    ),
]
LLAMA4 = [
    Case(
        "llama4",
        "chunks",
        of(
            "Llama4TextConfig",
            **LLAMA,
            attention_bias=True,
            rope_parameters={**LLAMA3, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
        ),
    ),
    Case(
        "llama4",
        "dense-layers",
        of(
            "Llama4TextConfig",
            **{**LLAMA, "head_dim": 6},
            interleave_moe_layer_step=2,
            no_rope_layers=[0, 1, 1, 0],
            use_qk_norm=False,
            attn_temperature_tuning=False,
            rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        ),
    ),
    Case(
        "llama4",
        "vision",
        with_vision("Llama4Config", LLAMA_VISION, **LLAMA, moe_layers=[1, 3]),
        model_class("Llama4ForConditionalGeneration"),
    ),
]
CASES = [*GROUPED, *OTHERS, *LLAMA4]
