"""Rotary position embeddings as configurations describe them."""

from __future__ import annotations

from typing import Any

from dymoe_compile.families.parts.config import Config
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.model.rope import longrope_attention_factor, yarn_attention_factor
from dymoe_runtime.spec import ROPES, Rope

# Keys that change nothing for text: its three positions of mrope are one, and the others are for other programs.
TEXT_ONLY = ("mrope_section", "mrope_interleaved", "interleaved", "finetuned", "rope_type", "type")
# Kinds that are the same as another one in a context that the model was made for, and no longer one can be asked for.
WITHIN_CONTEXT = {"dynamic": "default", "mrope": "default"}
# Parameters without which a kind means nothing.
NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_of(
    config: Config, head_dim: int, theta: float = 10000.0, partial: float = 1.0, layer_type: str | None = None
) -> Rope:
    """Return the rope from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).

    `theta` is the default of `rope_theta`, `partial` that of `partial_rotary_factor`, which is the share of the
    `head_dim` columns that turn. `layer_type` chooses among ropes that are given for each type of layer.

    Raises DymoeError for a key that is not known, because it may change the mathematics.
    """
    values = _values_of(config, layer_type)
    kind = values.choice("rope_type", "type", default="default", known=(*ROPES, *WITHIN_CONTEXT))
    kind = WITHIN_CONTEXT.get(kind, kind)
    _check_complete(values, kind)
    context = config.integer("max_position_embeddings")
    original = values.integer("original_max_position_embeddings", default=context)
    if kind == "longrope":  # of two, the number beside the rope holds, as in transformers
        original = config.integer("original_max_position_embeddings", default=original)
    factor = values.number("factor", default=context / original if kind in ("yarn", "longrope") else 1.0)
    attention: dict[str, Any] = {"attention_factor": 1.0}
    if kind == "yarn":
        scales = (values.number(name, default=0.0, above=-1.0) for name in ("mscale", "mscale_all_dim"))
        default = yarn_attention_factor(factor, *scales)
        attention = {"attention_factor": values.number("attention_factor", default=default)}
    if kind == "longrope":
        attention = _long_attention(values, factor, original)
    low = values.number("low_freq_factor", default=1.0)
    share = values.number("partial_rotary_factor", default=config.number("partial_rotary_factor", default=partial))
    dims = int(head_dim * share)
    if kind == "proportional":
        dims -= dims % 2
    if not 0 < dims <= head_dim or dims % 2:
        raise DymoeError(
            f"config.json: 'partial_rotary_factor' is {share:g}, expected a share that is an even number of {head_dim} "
            "columns"
        )
    rope = Rope(
        theta=values.number("rope_theta", default=theta, above=1.0),
        kind=kind,
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=_at_least(low, values.number("high_freq_factor", default=4.0 * low)),
        beta_fast=values.number("beta_fast", default=32.0),
        beta_slow=values.number("beta_slow", default=1.0),
        truncate=values.boolean("truncate", default=True),
        dims=0 if dims == head_dim else dims,
        **attention,
        **(_long_factors(values, dims // 2) if kind == "longrope" else {}),
    )
    values.ignore(*TEXT_ONLY)
    _check_known(values)
    return rope


def _long_attention(values: Config, factor: float, original: int) -> dict[str, Any]:
    """Return the factors of cosines and sines for LongRoPE. Phi-3.5-MoE gives one for each length of contexts."""
    default = longrope_attention_factor(factor, original)
    attention = values.number("attention_factor", default=default)
    return {
        "attention_factor": values.number("short_mscale", default=attention),
        "long_attention_factor": values.number("long_mscale", default=attention),
    }


def _long_factors(values: Config, pairs: int) -> dict[str, Any]:
    """Return the factors of LongRoPE for so many pairs of columns."""
    return {
        "short_factors": values.numbers("short_factor", pairs),
        "long_factors": values.numbers("long_factor", pairs),
    }


def _at_least(low: float, high: float) -> float:
    if high < low:
        raise DymoeError(f"config.json: 'high_freq_factor' is {high:g}, expected at least low_freq_factor, {low:g}")
    return high


def _values_of(config: Config, layer_type: str | None) -> Config:
    """Return the parameters of one rope; raise DymoeError if there are several and `layer_type` is none of them."""
    new, old = config.mapping("rope_parameters"), config.mapping("rope_scaling")
    nested = {name for name, value in new.items() if isinstance(value, dict)}
    if nested:
        if layer_type not in nested:
            raise DymoeError(
                f"config.json: 'rope_parameters' gives {', '.join(sorted(nested))} a rope each, which is not "
                f"known for model_type '{config.get('model_type', default='')}'"
            )
        new = dict(new[layer_type])
    theta = config.get("rope_theta", default=None)
    return Config({**({} if theta is None else {"rope_theta": theta}), **old, **new})


def _check_complete(values: Config, kind: str) -> None:
    """Raise DymoeError if a rope of this kind lacks a parameter, or if a factor lacks the kind."""
    for name in NEEDED.get(kind, ()):
        values.get(name)
    if values.get("rope_type", "type", default=None) is None and values.number("factor", default=1.0) != 1.0:
        raise DymoeError("config.json: the rope has a 'factor', but no 'rope_type' says how it scales")


def _check_known(values: Config) -> None:
    """Raise DymoeError for a parameter that nothing has read."""
    unread = values.unread()
    if unread:
        raise DymoeError(
            f"config.json: the rope parameter '{unread[0]}' is not known to this version; it may change the results, "
            "so this variant is not supported"
        )
