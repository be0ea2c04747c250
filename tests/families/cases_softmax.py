"""Cases of families whose routers take the softmax of all logits, or of those that they have chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families.harness import COMMON, Case
from families.tiny import (
    EXPERTS,
    FAST_YARN,
    FULL,
    HEAD,
    LLAMA3,
    MROPE,
    MSCALE_YARN,
    SLIDING,
    VISION,
    WINDOW,
    YARN,
    Values,
    model_class,
    of,
    with_vision,
)

DEEPSTACK: Values = {**VISION, "deepstack_visual_indexes": [0]}
AUDIO: Values = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "num_mel_bins": 8,
    "output_dim": 48,
    "downsample_hidden_size": 8,
    "n_window": 4,
}
MELLUM: Values = {"num_experts_per_tok": 3, "intermediate_size": 56, "moe_intermediate_size": 40}
ERNIE: Values = {"intermediate_size": 56, "moe_intermediate_size": 40}
HUNYUAN: Values = {"num_experts": 8, "moe_topk": 3, "intermediate_size": 40, "head_dim": 12}
# What the config.json of Hunyuan-A13B says.
ALPHA: Values = {
    "type": "dynamic",
    "alpha": 1000.0,
    "factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
FLEX_OLMO: Values = {"num_experts": 7, "num_experts_per_tok": 5, "intermediate_size": 20}
GEMMA: Values = {
    "moe_intermediate_size": 40,
    "num_experts": 8,
    "top_k_experts": 3,
    "enable_moe_block": True,
    "intermediate_size": 36,
    "hidden_size_per_layer_input": 0,
    "head_dim": 12,
    "global_head_dim": 20,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 5.0,
}
GEMMA_VISION: Values = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}
GRANITE: Values = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 20,
    "embedding_multiplier": 2.5,
    "attention_multiplier": 0.6,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.8,
}


def transposed(config: Any) -> torch.nn.Module:
    """A Qwen3-VL-MoE that saves its experts as on the hub: transformers reads them so, but does not write them."""
    import transformers
    from safetensors.torch import load_file, save_file

    class Transposed(transformers.Qwen3VLMoeForConditionalGeneration):
        def save_pretrained(self, directory: Path, **rest: Any) -> None:
            super().save_pretrained(directory, **rest)
            path = Path(directory) / "model.safetensors"
            tensors = {
                name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
                for name, tensor in load_file(path).items()
            }
            save_file(tensors, path, {"format": "pt"})

    return Transposed(config)


def thinker(common: Values) -> Any:
    """The configuration of a Qwen3-Omni without a talker."""
    import transformers
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    rope = {**MROPE, "rope_theta": 20000.0}
    text = {**common, **EXPERTS, "head_dim": HEAD, "norm_topk_prob": False, "rope_parameters": rope}
    config = Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=DEEPSTACK, audio_config=AUDIO)
    return transformers.Qwen3OmniMoeConfig(thinker_config=config, enable_audio_output=False)


def thinker_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.thinker(input_ids=ids, use_cache=False).logits
    return logits


def gemma_vision(common: Values) -> Any:
    """A Gemma 4 with a vision tower and without one for audio."""
    text = {**common, **GEMMA, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    return of("Gemma4Config", text_config=text, vision_config=GEMMA_VISION, audio_config=None)({})


QWEN = [
    Case(
        "qwen2_moe",
        "window-and-dense-layers",
        of(
            "Qwen2MoeConfig",
            **EXPERTS,
            shared_expert_intermediate_size=28,
            intermediate_size=56,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=3,
            mlp_only_layers=[1],
            norm_topk_prob=True,
            rope_parameters=YARN,
        ),
    ),
    Case(
        "qwen2_moe",
        "plain",
        of(
            "Qwen2MoeConfig",
            **EXPERTS,
            shared_expert_intermediate_size=28,
            qkv_bias=False,
            decoder_sparse_step=2,
            intermediate_size=56,
            tie_word_embeddings=True,
        ),
    ),
    Case(
        "qwen3_vl_moe",
        "vision",
        with_vision(
            "Qwen3VLMoeConfig",
            DEEPSTACK,
            **EXPERTS,
            head_dim=HEAD,
            attention_bias=True,
            mlp_only_layers=[2],
            intermediate_size=56,
            rope_parameters={**MROPE, "rope_theta": 20000.0},
        ),
        model_class("Qwen3VLMoeForConditionalGeneration"),
    ),
    Case(
        "qwen3_vl_moe",
        "hub-layout",  # the shape of down does not show that it is transposed
        with_vision("Qwen3VLMoeConfig", DEEPSTACK, **{**EXPERTS, "moe_intermediate_size": 48}, head_dim=6),
        transposed,
    ),
    Case(
        "qwen3_omni_moe",
        "thinker",
        thinker,
        model_class("Qwen3OmniMoeForConditionalGeneration"),
        thinker_logits,
    ),
    Case(
        "mellum",
        "by-layer",
        of(
            "MellumConfig",
            **MELLUM,
            num_experts=8,
            head_dim=HEAD,
            sliding_window=WINDOW,
            attention_bias=True,
            layer_types=[SLIDING, FULL, SLIDING, FULL],
            mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
            rope_parameters={FULL: FAST_YARN, SLIDING: {"rope_type": "default", "rope_theta": 700.0}},
        ),
    ),
    Case("mellum", "defaults", of("MellumConfig", **MELLUM, num_experts=7, head_dim=6, norm_topk_prob=False)),
]
OTHERS = [
    Case(
        "ernie4_5_moe",
        "interval",
        of(
            "Ernie4_5_MoeConfig",
            **ERNIE,
            head_dim=HEAD,
            moe_num_experts=8,
            moe_k=3,
            moe_num_shared_experts=2,
            moe_norm_min=0.8,  # a clamp of the sum of routing weights that acts
            moe_layer_start_index=0,
            moe_layer_interval=2,
            tie_word_embeddings=True,
        ),
    ),
    Case(
        "ernie4_5_moe",
        "range",
        of(
            "Ernie4_5_MoeConfig",
            **ERNIE,
            moe_num_experts=6,
            moe_k=2,
            moe_num_shared_experts=0,
            moe_layer_start_index=1,
            moe_layer_end_index=2,
            rope_parameters=FAST_YARN,
            tie_word_embeddings=False,
        ),
    ),
    Case(
        "hunyuan_v1_moe",
        "lists and alpha",
        of(
            "HunYuanMoEV1Config",
            **{**HUNYUAN, "head_dim": 6, "moe_topk": [3] * 4},
            attention_bias=True,
            rope_parameters={**ALPHA, "rope_type": "dynamic", "rope_theta": 10000.0},
            num_shared_expert=[1] * 4,
            moe_intermediate_size=[40] * 4,
            use_qk_norm=True,
            tie_word_embeddings=True,
        ),
    ),
    Case(
        "hunyuan_v1_moe",
        "dynamic without alpha",
        of("HunYuanMoEV1Config", **HUNYUAN, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    ),
    Case("flex_olmo", "gates not normalized, biases", of("FlexOlmoConfig", **FLEX_OLMO, attention_bias=True)),
    Case(
        "flex_olmo",
        "gates normalized, yarn, tied",
        of("FlexOlmoConfig", **FLEX_OLMO, norm_topk_prob=True, rope_parameters=MSCALE_YARN, tie_word_embeddings=True),
    ),
    Case(
        "gemma4",
        "keys-as-values",
        of(
            "Gemma4TextConfig",
            **GEMMA,
            num_hidden_layers=6,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
        ),
    ),
    Case(
        "gemma4",
        "given-layers",
        of(
            "Gemma4TextConfig",
            **{**GEMMA, "final_logit_softcapping": None, "global_head_dim": 12},
            layer_types=[FULL, SLIDING, SLIDING, FULL],
            attention_bias=True,
            tie_word_embeddings=False,
            hidden_activation="silu",
        ),
    ),
    Case("gemma4", "vision", gemma_vision, model_class("Gemma4ForConditionalGeneration")),
]
OF_CHOSEN = [
    Case(
        "gpt_oss",
        "default-yarn",
        of(
            "GptOssConfig",
            num_local_experts=8,
            num_experts_per_tok=3,
            intermediate_size=40,
            head_dim=HEAD,
            sliding_window=WINDOW,
            max_position_embeddings=131072,
        ),
    ),
    Case(
        "gpt_oss",
        "low-limit",
        of(
            "GptOssConfig",
            num_local_experts=8,
            num_experts_per_tok=2,
            intermediate_size=48,
            head_dim=6,
            sliding_window=WINDOW,
            swiglu_limit=0.7,
            swiglu_alpha=1.3,
            attention_bias=False,
            layer_types=[FULL, FULL, SLIDING, FULL],
            rope_parameters={**YARN, "truncate": True},
        ),
    ),
    Case("granitemoe", "multipliers and biases", of("GraniteMoeConfig", **GRANITE, attention_bias=True)),
    Case(
        "granitemoeshared",
        "shared MLP, llama3, tied",
        of(
            "GraniteMoeSharedConfig",
            **GRANITE,
            shared_intermediate_size=24,
            rope_parameters=LLAMA3,
            tie_word_embeddings=True,
        ),
    ),
    Case("granitemoeshared", "without one", of("GraniteMoeSharedConfig", **GRANITE)),
]
COHERE: Values = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 40,
    "head_dim": HEAD,
    "sliding_window": WINDOW,
}
COHERE_CASES = [
    Case(
        "cohere2_moe",
        "window shorter than prompt, average",
        of("Cohere2MoeConfig", **COHERE, num_shared_experts=2, expert_selection_fn="sigmoid", logit_scale=0.25),
    ),
    Case(
        "cohere2_moe",
        "dense first, sum, biases",
        of(
            "Cohere2MoeConfig",
            **COHERE,
            num_shared_experts=1,
            shared_expert_combination_strategy="sum",
            first_k_dense_replace=2,
            prefix_dense_intermediate_size=56,
            sliding_window_pattern=2,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    Case(
        "cohere2_moe",
        "dense without rope, sigmoid shares, RMSNorm",
        of(
            "Cohere2MoeConfig",
            **COHERE,
            layer_types=[FULL, SLIDING, FULL, SLIDING],
            mlp_layer_types=["dense", "sparse", "dense", "sparse"],
            prefix_dense_sliding_window_pattern=2,
            expert_selection_fn="sigmoid",
            norm_topk_prob=False,
            rms_norm_eps=1e-6,
        ),
    ),
]
PAIRS = COMMON["hidden_size"] // COMMON["num_attention_heads"] // 2
# Each number of the long factors is different, and far from that of the short ones.
LONGROPE: Values = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + 0.1 * i for i in range(PAIRS)],
    "long_factor": [1.5 + 0.7 * i for i in range(PAIRS)],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
}


def with_long_factors(config: Any) -> Any:
    """A model with the factors of a context above the original one.

    transformers 5.24 does not tell its rotary embedding the length, so that it has the short ones there, too, unlike
    the model's own code and earlier releases.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = model_class("PhimoeForCausalLM")(config)
    length = config.rope_parameters["original_max_position_embeddings"] + 1
    model.model.rotary_emb.rope_init_fn = lambda config: ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
    return model


PHI: Values = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 40}
PHI_CASES = [
    Case(
        "phimoe",
        "biases, short longrope, wide threshold",
        of(
            "PhimoeConfig",
            **PHI,
            attention_bias=True,
            lm_head_bias=True,
            router_jitter_noise=0.4,
            rope_parameters={**LONGROPE, "original_max_position_embeddings": 128},
        ),
    ),
    Case(
        "phimoe",
        "long longrope, window",
        of(
            "PhimoeConfig",
            **PHI,
            sliding_window=WINDOW,
            rope_parameters={**LONGROPE, "original_max_position_embeddings": 32},
        ),
        with_long_factors,
    ),
    Case(
        "phimoe",
        "tied head with a bias, any threshold",
        of("PhimoeConfig", **PHI, tie_word_embeddings=True, lm_head_bias=True, router_jitter_noise=5.0),
    ),
]
CASES = [*QWEN, *OTHERS, *OF_CHOSEN, *COHERE_CASES, *PHI_CASES]
