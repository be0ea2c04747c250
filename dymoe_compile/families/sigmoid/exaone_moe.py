"""EXAONE MoE: layers with a window turn queries and keys, the others do not; the router of DeepSeek-V3."""

from __future__ import annotations

from dymoe_compile.families.parts.blocks import attention_of, deepseek_moe, head_dim_of, model_of
from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.layers import (
    FULL,
    SLIDING,
    attention_kinds,
    dense_by_list,
    each_nth,
    first_layers,
    layers_of,
    layers_with,
    window_of,
)
from dymoe_compile.families.parts.names import Names, common_names
from dymoe_compile.families.parts.rope import rope_of
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import AttentionSpec, ModelSpec

WINDOW = 4096
PERIOD = 4  # each so many layers, one is without a window


def spec(config: Config) -> ModelSpec:
    """Return the model that an EXAONE MoE config.json describes."""
    moe = deepseek_moe(config, normalize=True, shared=1, scale=2.5)
    layers = layers_with(_mixers(config), moe, _dense_layers(config), config.integer("intermediate_size"))
    return model_of(config, layers, norm_eps=1e-5)


def names(spec: ModelSpec) -> Names:
    """Return the sources of the tensors of an EXAONE MoE model."""
    return common_names(shared=("shared_experts",))


def _mixers(config: Config) -> list[AttentionSpec]:
    """Return the attention of each layer; all turn if no layer has a window."""
    rope, window = rope_of(config, head_dim_of(config)), window_of(config, WINDOW)
    mixers = {
        FULL: attention_of(config, rope if window is None else None, qk_norm="head"),
        SLIDING: attention_of(config, rope, qk_norm="head", window=window),
    }
    if window is None or config.get("layer_types", default=None) is not None:
        config.ignore("sliding_window_pattern")
        default = [FULL] * layers_of(config)
    else:
        default = each_nth(config, config.integer("sliding_window_pattern", default=PERIOD))
    return [mixers[kind] for kind in attention_kinds(config, window, default)]


def _dense_layers(config: Config) -> set[int]:
    """Return the layers with a dense MLP: by a list, which the first releases called `is_moe_layer`, or the first."""
    routed = config.get("is_moe_layer", default=None)
    if routed is None:
        return dense_by_list(config, first_layers(config, default=1))
    kinds = [is_moe for is_moe in routed if is_moe in (True, False)] if isinstance(routed, list) else []
    if len(kinds) < layers_of(config):
        raise DymoeError("config.json: 'is_moe_layer' must give each layer true or false")
    config.ignore("first_k_dense_replace")  # the list says that
    return dense_by_list(config, {n for n, is_moe in enumerate(kinds) if not is_moe})
