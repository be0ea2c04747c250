"""Model families: one file per Hugging Face architecture. The file name is its `model_type`.

A family module has two functions:

    spec(config) -> ModelSpec                 the model that a config.json describes
    names(spec) -> Names                      DyMoE tensor names -> checkpoint tensor names

Each DyMoE name maps to the names that checkpoints use in practice, the usual one first.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.rope import KINDS, yarn_attention_factor
from dymoe_runtime.spec import ACTIVATIONS, AttentionSpec, LayerSpec, ModelSpec, MoeSpec, Rope, RouterSpec

_REQUIRED = object()


class Config:
    """A config.json with typed accessors.

    An accessor takes the first of the given names that is present and not null, else `default`. It raises a DymoeError
    that names the key if the value is missing or wrong.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """Return the value of the first of `names` that is present and not null, else `default`."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is _REQUIRED:
            raise DymoeError(f"config.json: '{names[0]}' is missing; copy config.json from the model's repository")
        return default

    def integer(self, *names: str, default: Any = _REQUIRED, least: int = 1, most: int = 1 << 31) -> int:
        """Return a whole number from `least` to `most`."""
        value = self.get(*names, default=default)
        if not _is_whole(value) or not least <= value <= most:
            self._refuse(names[0], value, f"a whole number from {least} to {most}")
        return int(value)

    def number(self, *names: str, default: Any = _REQUIRED, above: float = 0.0) -> float:
        """Return a finite number larger than `above`."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < math.inf:
            self._refuse(names[0], value, f"a number above {above:g}")
        return float(value)

    def boolean(self, *names: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            self._refuse(names[0], value, "true or false")
        return bool(value)

    def integers(self, *names: str) -> tuple[int, ...]:
        """Return the whole numbers of a list, or a single one as a tuple; empty if the key is missing."""
        value = self.get(*names, default=[])
        values = value if isinstance(value, list) else [value]
        if not all(_is_whole(item) and 0 <= item < 1 << 31 for item in values):
            self._refuse(names[0], value, "whole numbers from 0")
        return tuple(values)

    def choice(self, *names: str, default: str, known: Iterable[str]) -> str:
        """Return a string that must be one of `known`."""
        value = self.get(*names, default=default)
        if value not in tuple(known):
            self._refuse(names[0], value, f"one of those supported: {', '.join(known)}")
        return str(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a copy of an object; empty if the key is missing."""
        value = self.get(name, default={})
        if not isinstance(value, dict):
            self._refuse(name, value, "an object")
        return dict(value)

    @staticmethod
    def _refuse(name: str, value: Any, expected: str) -> NoReturn:
        raise DymoeError(f"config.json: '{name}' is {str(value)[:60]!r}, expected {expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Names:
    """Checkpoint names of the tensors: DyMoE name -> templates with {layer} and {expert}, the usual one first."""

    dense: dict[str, tuple[str, ...]]
    expert: dict[str, tuple[str, ...]]  # gate, up, down of one expert
    stacked: dict[str, tuple[str, ...]] = field(default_factory=dict)  # gate_up [E, 2I, H], down [E, H, I]


class Family(Protocol):
    """A family module."""

    def spec(self, config: Config) -> ModelSpec:
        """Return the model that `config` describes."""

    def names(self, spec: ModelSpec) -> Names:
        """Return the checkpoint names of the tensors of a model."""


def supported() -> list[str]:
    """Return the `model_type` of every family, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family_of(values: dict[str, Any]) -> Family:
    """Return the family for a parsed config.json; raise DymoeError if its `model_type` is not supported."""
    model_type = values.get("model_type")
    if model_type not in supported():
        what = f"model_type '{model_type}' is not supported" if model_type else "'model_type' is missing"
        raise DymoeError(f"config.json: {what}; supported are {', '.join(supported())}")
    family: Family = importlib.import_module(f"{__name__}.{model_type}")
    return family


def attention_of(config: Config, rope: Rope, **rest: Any) -> AttentionSpec:
    """Return the attention of a layer, from the keys that all families share; `rest` sets its other fields.

    Raises DymoeError if the heads do not divide into key-value heads, or the head dimension is odd.
    """
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    head_dim = config.integer("head_dim", default=hidden // heads)
    if heads % kv_heads:
        raise DymoeError(f"config.json: {heads} attention heads do not divide into {kv_heads} key-value heads")
    if head_dim % 2:
        raise DymoeError(f"config.json: head_dim {head_dim} is odd, rotary embedding needs an even one")
    return AttentionSpec(heads, kv_heads, head_dim, rope, **rest)


def moe_of(config: Config, width: int, normalize: bool) -> MoeSpec:
    """Return the router and the experts of a layer, from the keys that all families share.

    `width` is the width of an expert. With `normalize`, the routing weights of a token sum to 1.

    Raises DymoeError if the model has no routed experts, or fewer than a token needs.
    """
    experts = config.integer("num_experts", "num_local_experts", "n_routed_experts", default=0, least=0)
    if experts == 0:
        raise DymoeError(
            "config.json: the model has no routed experts (num_experts is 0 or missing); DyMoE compiles MoE models only"
        )
    top_k = config.integer("num_experts_per_tok")
    if top_k > experts:
        raise DymoeError(f"config.json: num_experts_per_tok {top_k} exceeds the {experts} experts")
    return MoeSpec(RouterSpec(experts, top_k, normalize), width)


def model_of(config: Config, layers: tuple[LayerSpec, ...], norm_eps: float, dense_width: int = 0) -> ModelSpec:
    """Return the model with these layers, from the keys that all families share.

    Raises DymoeError if no layer has routed experts.
    """
    if not any(isinstance(layer.feed_forward, MoeSpec) for layer in layers):
        raise DymoeError("config.json: no layer has routed experts; DyMoE compiles MoE models only")
    return ModelSpec(
        model_type=config.get("model_type"),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        max_context=config.integer("max_position_embeddings", least=2),
        norm_eps=norm_eps,
        layers=layers,
        activation=config.choice("hidden_act", default="silu", known=ACTIVATIONS),
        tie_embeddings=config.boolean("tie_word_embeddings", default=False),
        eos_ids=config.integers("eos_token_id"),
        dense_width=dense_width,
    )


def layers_of(config: Config) -> int:
    """Return the number of layers."""
    return config.integer("num_hidden_layers", most=10_000)


def window_of(config: Config) -> int | None:
    """Return the number of positions that a token attends to, itself included, or None for all."""
    return config.integer("sliding_window", default=0, least=0) or None


def rope_of(config: Config, theta: float = 10000.0) -> Rope:
    """Return the rope from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).

    `theta` is the default of `rope_theta`.
    """
    merged = {**config.mapping("rope_scaling"), **config.mapping("rope_parameters")}
    values = Config({"rope_theta": config.get("rope_theta", default=theta), **merged})
    kind = values.choice("rope_type", "type", default="default", known=KINDS)
    context = config.integer("max_position_embeddings")
    original = values.integer("original_max_position_embeddings", default=context)
    factor = values.number("factor", default=context / original if kind == "yarn" else 1.0)
    attention = 1.0
    if kind == "yarn":
        scales = (values.number(name, default=0.0, above=-1.0) for name in ("mscale", "mscale_all_dim"))
        attention = values.number("attention_factor", default=yarn_attention_factor(factor, *scales))
    low = values.number("low_freq_factor", default=1.0)
    return Rope(
        theta=values.number("rope_theta", above=1.0),
        kind=kind,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=values.number("high_freq_factor", default=4.0 * low, above=low),
        beta_fast=values.number("beta_fast", default=32.0),
        beta_slow=values.number("beta_slow", default=1.0),
        attention_factor=attention,
        truncate=values.boolean("truncate", default=True),
    )


def common_names(moe: str = "mlp", *other_moe: str) -> Names:
    """Return the names of the Llama-like layout; `moe` and `other_moe` are names of its expert block."""
    blocks = (moe, *other_moe)
    layer = "model.layers.{layer}."
    dense = {
        "embed": ("model.embed_tokens.weight",),
        "norm": ("model.norm.weight",),
        "lm_head": ("lm_head.weight",),
        "attn_norm": (layer + "input_layernorm.weight",),
        "mlp_norm": (layer + "post_attention_layernorm.weight",),
        "attn.q_norm": (layer + "self_attn.q_norm.weight",),
        "attn.k_norm": (layer + "self_attn.k_norm.weight",),
        "router": tuple(f"{layer}{block}.gate.weight" for block in blocks),
    }
    for name in "qkvo":
        dense[f"attn.{name}"] = (f"{layer}self_attn.{name}_proj.weight",)
        dense[f"attn.{name}_bias"] = (f"{layer}self_attn.{name}_proj.bias",)
    for name in ("gate", "up", "down"):
        dense[f"mlp.{name}"] = (f"{layer}mlp.{name}_proj.weight",)
    expert = {
        name: tuple(f"{layer}{block}.experts.{{expert}}.{name}_proj.weight" for block in blocks)
        for name in ("gate", "up", "down")
    }
    stacked = {name: tuple(f"{layer}{block}.experts.{name}_proj" for block in blocks) for name in ("gate_up", "down")}
    return Names(dense, expert, stacked)
