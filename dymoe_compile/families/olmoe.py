"""OLMoE: query and key norms over all heads at once, gates usually not normalized."""

from __future__ import annotations

from dymoe_compile.families import Config, Names, common_names, common_spec, rope_of
from dymoe_runtime.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    return common_spec(
        config,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        rope=rope_of(config),
        norm_topk=config.boolean("norm_topk_prob", default=False),
        expert_width=config.integer("intermediate_size"),
        qk_norm="full",
        attention_bias=config.boolean("attention_bias", default=False),
        clip_qkv=None if config.get("clip_qkv", default=None) is None else config.number("clip_qkv"),
    )


def names(spec: ModelSpec) -> Names:
    return common_names()
