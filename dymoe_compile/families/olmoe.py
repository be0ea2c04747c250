"""OLMoE: query and key norms over all heads at once, routing weights usually not normalized."""

from __future__ import annotations

from dymoe_compile.families import Config, Names, attention_of, common_names, layers_of, model_of, moe_of, rope_of
from dymoe_runtime.spec import ModelSpec, alike_layers


def spec(config: Config) -> ModelSpec:
    """Return the model that an OLMoE config.json describes."""
    moe = moe_of(config, config.integer("intermediate_size"), normalize=config.boolean("norm_topk_prob", default=False))
    attention = attention_of(
        config,
        rope_of(config),
        qk_norm="full",
        bias=config.boolean("attention_bias", default=False),
        clip=None if config.get("clip_qkv", default=None) is None else config.number("clip_qkv"),
    )
    layers = alike_layers(layers_of(config), attention, moe)
    return model_of(config, layers, norm_eps=config.number("rms_norm_eps", default=1e-5))


def names(spec: ModelSpec) -> Names:
    """Return the checkpoint names of the tensors of an OLMoE model."""
    return common_names()
