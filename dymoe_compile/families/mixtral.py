"""Mixtral: eight wide experts, gates always normalized, w1/w3/w2 for gate/up/down."""

from __future__ import annotations

from dataclasses import replace

from dymoe_compile.families import Config, Names, common_names, common_spec, rope_of, window_of
from dymoe_runtime.spec import ModelSpec

THETA = 1_000_000.0


def spec(config: Config) -> ModelSpec:
    return common_spec(
        config,
        norm_eps=config.number("rms_norm_eps", default=1e-5),
        rope=rope_of(config, THETA),
        norm_topk=True,
        expert_width=config.integer("intermediate_size"),
        sliding_window=window_of(config),
    )


def names(spec: ModelSpec) -> Names:
    common = common_names("block_sparse_moe", "mlp")
    theirs = {"gate": "w1", "up": "w3", "down": "w2"}
    template = "model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{}.weight"
    expert = {name: (template.format(their), *common.expert[name]) for name, their in theirs.items()}
    return replace(common, expert=expert)
