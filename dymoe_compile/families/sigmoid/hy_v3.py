"""Hy3: per-head query and key norms, sigmoid router with a bias for the choice, a shared expert, first layer dense."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import dense_by_list, first_layers, layers_of, layers_with
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.spec import ModelSpec, SharedSpec

THETA = 11_158_840.0


def spec(config: Config) -> ModelSpec:
    """Return the model that a Hy3 config.json describes."""
    config.fixed("mlp_bias", False)
    # These choose precisions, and kernels for training.
    config.ignore("enable_moe_fp32_combine", "enable_attention_fp32_softmax", "enable_lm_head_fp32", "use_grouped_mm")
    width = config.integer("moe_intermediate_size", "expert_hidden_dim", default=1536)
    moe = moe_of(
        config,
        width,
        normalize=config.boolean("route_norm", default=True),
        shared=SharedSpec(config.integer("num_shared_experts", default=1) * width),
        score="sigmoid" if config.boolean("moe_router_use_sigmoid", default=True) else "softmax",
        selection_bias=config.boolean("moe_router_enable_expert_bias", default=True),
        scale=config.number("router_scaling_factor", default=2.826),
        eps=1e-20,
    )
    head_dim = head_dim_of(config, 128)
    attention = attention_of(
        config,
        rope_of(config, head_dim, THETA),
        head_dim=head_dim,
        qk_norm="head" if config.boolean("qk_norm", default=True) else "none",
        **biases_of(config),
    )
    dense = dense_by_list(config, first_layers(config, default=1))
    layers = layers_with([attention] * layers_of(config), moe, dense, config.integer("intermediate_size"))
    return model_of(config, layers, norm_eps=1e-5)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Hy3 model: names of its maker, then those of transformers."""
    return common_names(shared=("shared_mlp", "shared_experts")).replace_dense(
        router=(f"{LAYER}mlp.router.gate.weight", f"{LAYER}mlp.gate.weight"),
        router_select=(f"{LAYER}mlp.expert_bias", f"{LAYER}mlp.e_score_correction_bias"),
    )
