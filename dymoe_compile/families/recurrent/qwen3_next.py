"""Qwen3-Next: a gated delta rule in three layers of four, gated attention in the others; norms are stored minus 1."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import FULL, dense_by_step, each_nth, kinds_of, layers_with
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_compile.families.parts.sources import (
    first_head_dim,
    half_of_heads,
    one_row,
    parts_of_groups,
    plus_one,
    reshaped,
)
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import AttentionSpec, GatedDeltaSpec, MixerSpec, ModelSpec, SharedSpec

LINEAR = "linear_attention"
DELTA = LAYER + "linear_attn."


def spec(config: Config) -> ModelSpec:
    """Return the model that a Qwen3-Next config.json describes."""
    config.fixed("attention_bias", False)
    config.fixed("attn_output_gate", True)
    for name in ("hidden_act", "output_gate_type"):  # the gated delta rule knows one activation
        config.choice(name, default="silu", known=("silu", "swish"))
    # Other Qwen models have a window; this one has none, though some files keep the keys.
    config.ignore("sliding_window", "use_sliding_window", "max_window_layers")
    moe = moe_of(
        config,
        config.integer("moe_intermediate_size", default=512),
        normalize=config.boolean("norm_topk_prob", default=True),
        shared=SharedSpec(config.integer("shared_expert_intermediate_size", default=512), gated=True),
    )
    mixers: dict[str, MixerSpec] = {FULL: _attention(config), LINEAR: _delta(config)}
    default = each_nth(config, config.integer("full_attention_interval", default=4), FULL, LINEAR)
    kinds = kinds_of(config, "layer_types", (LINEAR, FULL), default)
    width = config.integer("intermediate_size", default=5632)
    layers = layers_with([mixers[kind] for kind in kinds], moe, dense_by_step(config), width)
    return model_of(config, layers, norm_eps=1e-6)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Qwen3-Next model."""
    common = hybrid_names(spec)
    delta = next((layer.mixer for layer in spec.layers if isinstance(layer.mixer, GatedDeltaSpec)), None)
    if delta is None:
        return common
    keys, shared = delta.key_heads, delta.value_heads // delta.key_heads
    sizes = (delta.key_dim, delta.key_dim, shared * delta.value_dim, shared * delta.value_dim)
    return common.replace_dense(
        delta__qkv=parts_of_groups(keys, sizes, (0, 1, 2), DELTA + "in_proj_qkvz.weight"),
        delta__z=parts_of_groups(keys, sizes, (3,), DELTA + "in_proj_qkvz.weight"),
        delta__ba_exact=parts_of_groups(keys, (shared, shared), (0, 1), DELTA + "in_proj_ba.weight"),
    )


def hybrid_names(spec: ModelSpec) -> Names:
    """Return the names of a hybrid model, without those of the input projections of the gated delta rule."""
    head_dim, query = first_head_dim(spec), LAYER + "self_attn.q_proj.weight"
    return common_names(shared=("shared_expert",)).replace_dense(
        norm=plus_one("model.norm.weight"),
        attn_norm=plus_one(LAYER + "input_layernorm.weight"),
        mlp_norm=plus_one(LAYER + "post_attention_layernorm.weight"),
        attn__q=half_of_heads(0, head_dim, query),
        attn__gate=half_of_heads(1, head_dim, query),
        attn__q_norm=plus_one(LAYER + "self_attn.q_norm.weight"),
        attn__k_norm=plus_one(LAYER + "self_attn.k_norm.weight"),
        shared_gate=one_row(LAYER + "mlp.shared_expert_gate.weight"),
        delta__conv_exact=reshaped(DELTA + "conv1d.weight", shape=lambda wanted: (wanted[0], 1, wanted[1])),
        delta__a_log=(DELTA + "A_log",),
        delta__dt_bias=(DELTA + "dt_bias",),
        delta__norm=(DELTA + "norm.weight",),
        delta__o=(DELTA + "out_proj.weight",),
    )


def _attention(config: Config) -> AttentionSpec:
    head_dim, kv_heads = head_dim_of(config, 256), config.integer("num_key_value_heads", default=2)
    rope = rope_of(config, head_dim, partial=0.25)
    return attention_of(config, rope, head_dim=head_dim, kv_heads=kv_heads, qk_norm="head", gate="element")


def _delta(config: Config) -> GatedDeltaSpec:
    """Return the gated delta rule; raise DymoeError if its heads of values do not divide into those of keys."""
    delta = GatedDeltaSpec(
        key_heads=config.integer("linear_num_key_heads", default=16),
        value_heads=config.integer("linear_num_value_heads", default=32),
        key_dim=config.integer("linear_key_head_dim", default=128),
        value_dim=config.integer("linear_value_head_dim", default=128),
        taps=config.integer("linear_conv_kernel_dim", default=4),
    )
    if delta.value_heads % delta.key_heads:
        raise DymoeError(
            f"config.json: {delta.value_heads} linear value heads do not divide into {delta.key_heads} key heads"
        )
    return delta
