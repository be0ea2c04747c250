"""Parts of a model's specification, from the keys that many families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dymoe_compile.families.parts.config import Config
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import (
    ACTIVATIONS,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    Rope,
    RouterSpec,
    SharedSpec,
)

# Other names of the same activations.
SAME_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}


def head_dim_of(config: Config, default: int | None = None) -> int:
    """Return the columns of a head; without `default`, heads divide the hidden size if `head_dim` is missing."""
    share = config.integer("hidden_size") // config.integer("num_attention_heads")
    return config.integer("head_dim", default=share if default is None else default)


def biases_of(config: Config, default: bool = False) -> dict[str, bool]:
    """Return the fields of attention for biases of all its projections, or of none."""
    biased = config.boolean("attention_bias", default=default)
    return {"bias": biased, "output_bias": biased}


def attention_of(config: Config, rope: Rope | None, **rest: Any) -> AttentionSpec:
    """Return the attention of a layer, from the keys that all families share; `rest` sets or replaces its fields.

    Raises DymoeError if the heads do not divide into key-value heads, or the head dimension is odd.
    """
    heads = rest.pop("heads", None) or config.integer("num_attention_heads")
    kv_heads = rest.pop("kv_heads", None) or config.integer("num_key_value_heads", default=heads)
    head_dim = rest.pop("head_dim", None) or head_dim_of(config)
    if heads % kv_heads:
        raise DymoeError(f"config.json: {heads} attention heads do not divide into {kv_heads} key-value heads")
    if head_dim % 2:
        raise DymoeError(f"config.json: head_dim {head_dim} is odd, rotary embedding needs an even one")
    return AttentionSpec(heads, kv_heads, head_dim, rope, **rest)


def moe_of(
    config: Config,
    width: int,
    normalize: bool,
    shared: SharedSpec | None = None,
    biases: bool = False,
    experts: Sequence[str] = ("num_experts", "num_local_experts", "n_routed_experts"),
    top_k: Sequence[str] = ("num_experts_per_tok",),
    **router: Any,
) -> MoeSpec:
    """Return the router and the experts of a layer, from the keys that all families share.

    `width` is the width of an expert. With `normalize`, the routing weights of a token sum to 1. `experts` and `top_k`
    are the names of those keys. `router` sets other fields of the router.

    Raises DymoeError if the model has no routed experts, or fewer than a token needs, or groups that do not divide.
    """
    count = config.integer(*experts, default=0, least=0)
    if count == 0:
        raise DymoeError(
            "config.json: the model has no routed experts (num_experts is 0 or missing); DyMoE compiles MoE models only"
        )
    chosen = config.integer(*top_k)
    if chosen > count:
        raise DymoeError(f"config.json: {top_k[0]} {chosen} exceeds the {count} experts")
    spec = RouterSpec(count, chosen, normalize, **router)
    if count % spec.groups or spec.top_groups > spec.groups or chosen > count // spec.groups * spec.top_groups:
        raise DymoeError(f"config.json: {spec.groups} groups of experts do not fit {count} experts, {chosen} a token")
    return MoeSpec(spec, width, shared, biases)


def shared_of(config: Config, width: int, default: int, *names: str) -> SharedSpec | None:
    """Return the shared experts of `width`, which are one MLP. Their number is that of the first key that is present.

    `names` are by default those of DeepSeek and of its relatives.
    """
    count = config.integer(*(names or ("n_shared_experts", "num_shared_experts")), default=default, least=0)
    return SharedSpec(count * width) if count else None


def deepseek_moe(config: Config, normalize: bool, shared: int, scale: float = 1.0) -> MoeSpec:
    """Return experts with a router as in DeepSeek-V3 (arXiv 2412.19437), from the keys that its relatives share.

    Scores are sigmoids, with a bias for the choice; experts may be in groups. `normalize`, `shared` and `scale` are the
    defaults of `norm_topk_prob`, of the number of shared experts and of `routed_scaling_factor`.
    """
    # Both names of the score mean a sigmoid.
    config.choice("scoring_func", default="sigmoid", known=("sigmoid", "noaux_tc"))
    config.fixed("topk_method", "noaux_tc")
    width = config.integer("moe_intermediate_size")
    return moe_of(
        config,
        width,
        normalize=config.boolean("norm_topk_prob", default=normalize),
        shared=shared_of(config, width, shared),
        score="sigmoid",
        selection_bias=True,
        groups=config.integer("n_group", default=1),
        top_groups=config.integer("topk_group", default=1),
        scale=config.number("routed_scaling_factor", default=scale),
        eps=1e-20,
    )


def model_of(
    config: Config, layers: tuple[LayerSpec, ...], norm_eps: float, tied: bool = False, **rest: Any
) -> ModelSpec:
    """Return the model with these layers, from the keys that all families share; `rest` sets other fields.

    `norm_eps` and `tied` are the defaults of `rms_norm_eps` and `tie_word_embeddings`.

    Raises DymoeError if no layer has routed experts.
    """
    if not any(isinstance(layer.feed_forward, MoeSpec) for layer in layers):
        raise DymoeError("config.json: no layer has routed experts; DyMoE compiles MoE models only")
    widths = [layer.feed_forward.width for layer in layers if isinstance(layer.feed_forward, MlpSpec)]
    fields = {"activation": rest.get("activation") or activation_of(config), "dense_width": max(widths, default=0)}
    return ModelSpec(
        model_type=config.string("model_type"),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        max_context=config.integer("max_position_embeddings", least=2),
        norm_eps=config.number("rms_norm_eps", default=norm_eps),
        layers=layers,
        tie_embeddings=config.boolean("tie_word_embeddings", default=tied),
        eos_ids=config.integers("eos_token_id", single=True),
        **{**fields, **rest},
    )


def activation_of(config: Config, name: str = "hidden_act", default: str = "silu") -> str:
    """Return the activation of experts and dense MLPs."""
    activation = config.choice(name, default=default, known=(*ACTIVATIONS, *SAME_ACTIVATIONS))
    return SAME_ACTIVATIONS.get(activation, activation)
