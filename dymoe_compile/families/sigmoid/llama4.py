"""Llama 4: chunked attention with rotary embedding, some layers with neither; one expert a token, and a shared one."""

from __future__ import annotations

from dataclasses import replace

from dymoe_compile.families.parts.blocks import attention_of, biases_of, head_dim_of, model_of, moe_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import FULL, kinds_of, layers_of, layers_with
from dymoe_compile.families.parts.names import LAYER, Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_compile.families.parts.sources import ones, turned_heads
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import AttentionSpec, ModelSpec, SharedSpec

ALIASES = ("llama4_text",)
CHUNKED = "chunked_attention"
THETA, CHUNK, WIDTH, DENSE_WIDTH = 500_000.0, 8192, 8192, 16384


def spec(config: Config) -> ModelSpec:
    """Return the model that the language part of a Llama 4 config.json describes."""
    config.fixed("num_experts_per_tok", 1)
    width = config.integer("intermediate_size", default=WIDTH)
    moe = moe_of(
        config.view(num_experts_per_tok=1),
        width,
        normalize=False,
        shared=SharedSpec(width),
        score="sigmoid",
        scales_input=True,
    )
    dense_width = config.integer("intermediate_size_mlp", default=DENSE_WIDTH)
    layers = layers_with(_mixers(config), moe, _dense_layers(config), dense_width)
    return model_of(config, layers, norm_eps=1e-5)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of a Llama 4 model."""
    common = common_names("feed_forward", dense="feed_forward", shared=("shared_expert",))
    return common.replace_stacked(transposed=True).replace_dense(
        **turned_heads(spec),  # in layers without rotary embedding, reordering queries and keys alike changes nothing
        attn__q_norm=ones(),
        attn__k_norm=ones(),
        router=(f"{LAYER}feed_forward.router.weight",),
    )


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer.

    Layers with rotary embedding normalize queries and keys after it, without weights; rotation does not change that
    norm, so it comes before here.
    """
    head_dim = head_dim_of(config, 128)
    nope = attention_of(config, None, head_dim=head_dim, temperature=_temperature(config), **biases_of(config))
    norm = "head" if config.boolean("use_qk_norm", default=True) else "none"
    rope = replace(nope, rope=rope_of(config, head_dim, THETA), qk_norm=norm, temperature=None)
    rotates = _rotates(config)
    kinds = kinds_of(config, "layer_types", (CHUNKED, FULL), [CHUNKED if yes else FULL for yes in rotates])
    chunk = config.integer("attention_chunk_size", default=CHUNK)
    return [
        replace(rope if yes else nope, chunk=chunk if kind == CHUNKED else None)
        for yes, kind in zip(rotates, kinds, strict=True)
    ]


def _rotates(config: Config) -> list[bool]:
    """Return whether each layer has rotary embedding: `no_rope_layers` has, against its name, a 1 for those."""
    interval = config.integer("no_rope_layer_interval", default=4)
    given, count = config.integers("no_rope_layers"), layers_of(config)
    if given and len(given) < count:
        raise DymoeError(f"config.json: 'no_rope_layers' has {len(given)} entries for {count} layers")
    return [bool(given[layer] if given else (layer + 1) % interval) for layer in range(count)]


def _dense_layers(config: Config) -> set[int]:
    """Return the layers without experts, those that `moe_layers` does not list or `interleave_moe_layer_step` skips."""
    step, count = config.integer("interleave_moe_layer_step", default=1), layers_of(config)
    if config.get("moe_layers", default=None) is None:
        return {layer for layer in range(count) if (layer + 1) % step}
    return set(range(count)) - set(config.integers("moe_layers"))


def _temperature(config: Config) -> tuple[float, float] | None:
    """Return the temperature of layers without rotary embedding; early files have a number for `true`."""
    given = config.values.get("attn_temperature_tuning")
    view = config.view(attn_temperature_tuning=bool(given)) if isinstance(given, int) else config
    tuned = view.boolean("attn_temperature_tuning", default=True)
    floor, scale = config.number("floor_scale", default=8192), config.number("attn_scale", default=0.1)
    return (floor, scale) if tuned else None
