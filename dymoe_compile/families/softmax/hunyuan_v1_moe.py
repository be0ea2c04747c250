"""Hunyuan-A13B: per-head query and key norms after the rotary embedding, a shared expert, a list for each number."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import layers_of, layers_with
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ModelSpec, MoeSpec, Rope, SharedSpec

# What these switch on is neither here nor in transformers.
VARIANTS = (
    "use_cla",
    "use_mla",
    "moe_layer_num_skipped",
    "moe_drop_tokens",
    "group_limited_greedy",
    "position_embedding_xdrope",
    "mlp_bias",
)


def spec(config: Config) -> ModelSpec:
    """Return the model that a Hunyuan config.json describes."""
    for name in VARIANTS:
        config.fixed(name, False)
    config.ignore("cla_share_factor", "moe_random_routing_dropped_token", "dense_list")  # parameters of those variants
    config.ignore(*(name for name in config.values if name.startswith("vit_")))  # of an image encoder
    config.choice("norm_type", default="rms", known=("rms", "hf_rms"))
    head_dim = head_dim_of(config.view(head_dim=config.get("head_dim", "attention_head_dim", default=None)))
    attention = attention_of(
        config,
        _rope(config, head_dim) if config.boolean("use_rotary_pos_emb", default=True) else None,
        head_dim=head_dim,
        qk_norm="head" if config.boolean("use_qk_norm", default=True) else "none",
        norm_after_rope=True,
        **biases_of(config),
    )
    return model_of(config, layers_with([attention] * layers_of(config), _moe(config)), norm_eps=1e-5)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Hunyuan model."""
    return common_names(shared=("shared_mlp",)).replace_dense(
        attn__q_norm=(f"{LAYER}self_attn.query_layernorm.weight",),
        attn__k_norm=(f"{LAYER}self_attn.key_layernorm.weight",),
        router=(f"{LAYER}mlp.gate.wg.weight",),
    )


def _moe(config: Config) -> MoeSpec:
    """Return the experts of each layer; raise DymoeError if layers differ in their number or their width."""
    lists = ("num_experts", "moe_topk", "num_experts_per_tok", "num_shared_expert", "moe_intermediate_size")
    numbers = config.view(**{name: _same_number(config, name) for name in lists})
    width = config.integer("intermediate_size")
    shared = SharedSpec(numbers.integer("num_shared_expert", default=1) * width)
    return moe_of(
        numbers,
        numbers.integer("moe_intermediate_size", default=width),
        normalize=config.boolean("norm_topk_prob", default=True),
        shared=shared if config.boolean("use_mixed_mlp_moe", default=True) else None,
        top_k=("moe_topk", "num_experts_per_tok"),
    )


def _same_number(config: Config, name: str) -> object:
    """Return the number that a list gives all layers, or the value if it is no list."""
    value = config.get(name, default=None)
    values = value[: layers_of(config)] if isinstance(value, list) else [value]
    if not values or any(other != values[0] for other in values):
        raise DymoeError(f"config.json: '{name}' differs between layers, which is not supported")
    return values[0]


def _rope(config: Config, head_dim: int) -> Rope:
    """Return the rope. In kind `dynamic`, `alpha` stretches its base by a fixed factor (NTK-aware scaling)."""
    given = {**config.mapping("rope_scaling"), **config.mapping("rope_parameters")}
    if given.get("rope_type", given.get("type")) != "dynamic" or not given.get("alpha"):
        return rope_of(config, head_dim)
    values = Config({"rope_theta": config.get("rope_theta", default=None), **given})
    theta, alpha = values.number("rope_theta", default=10000.0, above=1.0), values.number("alpha")
    return Rope(theta * alpha ** (head_dim / max(head_dim - 2, 1)))
