"""The metadata of a model in a GGUF file: its sizes, its rotary embedding and its router."""

from __future__ import annotations

import math

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from dymoe_compile.export.gguf.architectures import Architecture, attentions_of, context_of
from dymoe_runtime.spec import MlpSpec, ModelSpec, Rope


def write_metadata(writer: GGUFWriter, spec: ModelSpec, architecture: Architecture) -> None:
    """Add what llama.cpp needs to know of a model to `writer`."""
    attention = attentions_of(spec)[0]
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(context_of(spec, architecture))
    writer.add_embedding_length(spec.hidden_size)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    _write_experts(writer, spec, architecture)
    _write_windows(writer, spec)
    full = next((mixer for mixer in attentions_of(spec) if mixer.window is None), attention)
    assert full.rope is not None
    _write_rope(writer, full.rope, attention.head_dim)
    if "scaled logits" in architecture.may:
        writer.add_embedding_scale(spec.embed_scale)
        writer.add_residual_scale(spec.layers[0].residual_scale)
        writer.add_logit_scale(1 / spec.logit_scale)
        writer.add_attention_scale(attention.scale or attention.head_dim**-0.5)


def _write_experts(writer: GGUFWriter, spec: ModelSpec, architecture: Architecture) -> None:
    moe, router = spec.moe, spec.moe.router
    dense = [layer.feed_forward.width for layer in spec.layers if isinstance(layer.feed_forward, MlpSpec)]
    writer.add_feed_forward_length(dense[0] if dense else moe.width)
    if architecture.expert_width:
        writer.add_expert_feed_forward_length(moe.width)
    writer.add_expert_count(router.experts)
    writer.add_expert_used_count(router.top_k)
    writer.add_expert_gating_func(
        ExpertGatingFuncType.SIGMOID if router.score == "sigmoid" else ExpertGatingFuncType.SOFTMAX
    )
    writer.add_expert_weights_norm(router.normalize or router.score == "softmax_of_chosen")
    writer.add_expert_weights_scale(router.scale)
    writer.add_leading_dense_block_count(len(dense))
    if architecture.name == "ernie4_5-moe":
        writer.add_interleave_moe_layer_step(1)
    if router.groups > 1:
        writer.add_expert_group_count(router.groups)
        writer.add_expert_group_used_count(router.top_groups)
    if moe.shared is not None:
        writer.add_expert_shared_feed_forward_length(moe.shared.width)
        writer.add_expert_shared_count(moe.shared.width // moe.width)


def _write_windows(writer: GGUFWriter, spec: ModelSpec) -> None:
    windows = [mixer.window for mixer in attentions_of(spec)]
    if sizes := {window for window in windows if window is not None and window < spec.max_context}:
        writer.add_sliding_window(max(sizes))
        writer.add_sliding_window_pattern([window is not None for window in windows])


def _write_rope(writer: GGUFWriter, rope: Rope, head_dim: int) -> None:
    writer.add_rope_dimension_count(rope.dims or head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        # llama.cpp multiplies this by what YaRN proposes for the factor.
        writer.add_rope_scaling_attn_factors(rope.attention_factor / (1 + 0.1 * math.log(max(rope.factor, 1))))
