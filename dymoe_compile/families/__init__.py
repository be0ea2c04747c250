"""One file per Hugging Face architecture; the file name is its `model_type`.

A family module has two functions:

    spec(config) -> ModelSpec                 config.json in our words
    names(spec) -> Names                      our tensor names <- theirs

Each of our names maps to the names that checkpoints are seen to use, the usual one first.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from dymoe_runtime.activations import ACTIVATIONS
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.rope import KINDS, yarn_attention_factor
from dymoe_runtime.spec import ModelSpec, Rope

_REQUIRED = object()


class Config:
    """config.json with errors that name the key."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The first of `names` that is present and not null, else `default`."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is _REQUIRED:
            raise DymoeError(f"config.json: '{names[0]}' is missing; copy config.json from the model's repository")
        return default

    def integer(self, *names: str, default: Any = _REQUIRED, least: int = 1, most: int = 1 << 31) -> int:
        value = self.get(*names, default=default)
        if not _is_whole(value) or not least <= value <= most:
            self._refuse(names[0], value, f"a whole number from {least} to {most}")
        return int(value)

    def number(self, *names: str, default: Any = _REQUIRED, above: float = 0.0) -> float:
        """A finite number larger than `above`."""
        value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < math.inf:
            self._refuse(names[0], value, f"a number above {above:g}")
        return float(value)

    def boolean(self, *names: str, default: bool) -> bool:
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            self._refuse(names[0], value, "true or false")
        return bool(value)

    def integers(self, *names: str) -> tuple[int, ...]:
        """A list of whole numbers, or a single one; none where the key is missing."""
        value = self.get(*names, default=[])
        values = value if isinstance(value, list) else [value]
        if not all(_is_whole(item) and 0 <= item < 1 << 31 for item in values):
            self._refuse(names[0], value, "whole numbers from 0")
        return tuple(values)

    def choice(self, *names: str, default: str, known: Iterable[str]) -> str:
        value = self.get(*names, default=default)
        if value not in tuple(known):
            self._refuse(names[0], value, f"one of those supported: {', '.join(known)}")
        return str(value)

    def mapping(self, name: str) -> dict[str, Any]:
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
    """Where a checkpoint keeps its tensors; templates take {layer} and {expert}."""

    dense: dict[str, tuple[str, ...]]
    expert: dict[str, tuple[str, ...]]  # gate, up, down of one expert
    stacked: dict[str, tuple[str, ...]] = field(default_factory=dict)  # gate_up [E, 2I, H], down [E, H, I]


class Family(Protocol):
    def spec(self, config: Config) -> ModelSpec: ...

    def names(self, spec: ModelSpec) -> Names: ...


def supported() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family_of(values: dict[str, Any]) -> Family:
    """The family for a parsed config.json; DymoeError if there is none or the model has no experts."""
    model_type = values.get("model_type")
    if model_type not in supported():
        what = f"model_type '{model_type}' is not supported" if model_type else "'model_type' is missing"
        raise DymoeError(f"config.json: {what}; supported are {', '.join(supported())}")
    family: Any = importlib.import_module(f"{__name__}.{model_type}")
    return family


def common_spec(config: Config, **family: Any) -> ModelSpec:
    """A ModelSpec from the keys that all families share; `family` gives the rest."""
    heads = config.integer("num_attention_heads")
    hidden = config.integer("hidden_size")
    experts = config.integer("num_experts", "num_local_experts", "n_routed_experts", default=0, least=0)
    if experts == 0:
        raise DymoeError(
            "config.json: the model has no routed experts (num_experts is 0 or missing); DyMoE compiles MoE models only"
        )
    spec = ModelSpec(
        model_type=config.get("model_type"),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers_of(config),
        num_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", default=heads),
        max_context=config.integer("max_position_embeddings", least=2),
        num_experts=experts,
        top_k=config.integer("num_experts_per_tok"),
        activation=config.choice("hidden_act", default="silu", known=ACTIVATIONS),
        tie_embeddings=config.boolean("tie_word_embeddings", default=False),
        eos_ids=config.integers("eos_token_id"),
        **{"head_dim": config.integer("head_dim", default=hidden // heads), **family},
    )
    check(spec)
    return spec


def check(spec: ModelSpec) -> None:
    """Refuse a configuration that contradicts itself."""
    if spec.num_heads % spec.num_kv_heads:
        raise DymoeError(
            f"config.json: {spec.num_heads} attention heads do not divide into {spec.num_kv_heads} key-value heads"
        )
    if spec.top_k > spec.num_experts:
        raise DymoeError(f"config.json: num_experts_per_tok {spec.top_k} exceeds the {spec.num_experts} experts")
    if spec.head_dim % 2:
        raise DymoeError(f"config.json: head_dim {spec.head_dim} is odd, rotary embedding needs an even one")
    if not spec.moe_layers:
        raise DymoeError("config.json: no layer has routed experts; DyMoE compiles MoE models only")


def layers_of(config: Config) -> int:
    return config.integer("num_hidden_layers", most=10_000)


def window_of(config: Config) -> int | None:
    """Tokens that attention looks back, itself included; None for all."""
    return config.integer("sliding_window", default=0, least=0) or None


def rope_of(config: Config, theta: float = 10000.0) -> Rope:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
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
    """Names of the Llama-like layout; `moe` is what its expert block is called."""
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
