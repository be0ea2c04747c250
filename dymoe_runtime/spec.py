"""The specification of a model: its layers as data, and the form of it that the manifest of a bundle keeps.

A layer has a mixer (attention, or another operation across tokens) and a feed-forward part (routed experts or a dense
MLP). `model/mixers/` has the mathematics of each kind of mixer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

from dymoe_runtime.errors import DymoeError

MATRICES = ("gate", "up", "down")
# Bits of a KV cache.
KV_BITS = (8, 16, 32)
# Activations of a gated MLP, named as in Hugging Face configurations.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")

# (name, shape) of tensors.
Shapes = Iterator[tuple[str, tuple[int, ...]]]


class ExpertKey(NamedTuple):
    """One routed expert; prints as `layer.expert`."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; the names are those of Hugging Face's `rope_parameters`."""

    theta: float = 10000.0
    kind: str = "default"  # default, linear, llama3 or yarn
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


class MixerSpec(Protocol):
    """The first half of a layer, as data."""

    @property
    def kind(self) -> str:
        """Return the key of `model.mixers.MIXERS` for the implementation of this mixer."""

    def tensor_shapes(self, hidden: int) -> Shapes:
        """Yield (name, shape) of each tensor of this mixer in a model of width `hidden`."""


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention (arXiv 2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    window: int | None = None  # positions that a token sees, itself included; None: all
    qk_norm: str = "none"  # none, head (over head_dim) or full (over all heads)
    bias: bool = False  # in all four projections
    clip: float | None = None  # largest magnitude of queries, keys and values
    kind: ClassVar[str] = "gqa"

    def tensor_shapes(self, hidden: int) -> Shapes:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name, rows, cols in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield f"attn.{name}", (rows, cols)
            if self.bias:
                yield f"attn.{name}_bias", (rows,)
        if self.qk_norm != "none":
            head = self.qk_norm == "head"
            yield "attn.q_norm", (self.head_dim if head else q,)
            yield "attn.k_norm", (self.head_dim if head else kv,)


@dataclass(frozen=True)
class RouterSpec:
    """A router: softmax over all experts, of which the `top_k` likeliest run."""

    experts: int
    top_k: int
    normalize: bool  # routing weights are divided by their sum


@dataclass(frozen=True)
class MoeSpec:
    """A feed-forward part of routed experts."""

    router: RouterSpec
    width: int  # of each expert
    kind: ClassVar[str] = "moe"

    def tensor_shapes(self, hidden: int) -> Shapes:
        """Yield (name, shape) of each tensor outside the experts in a model of width `hidden`."""
        yield "router", (self.router.experts, hidden)


@dataclass(frozen=True)
class MlpSpec:
    """A feed-forward part of one dense MLP."""

    width: int
    kind: ClassVar[str] = "mlp"

    def tensor_shapes(self, hidden: int) -> Shapes:
        """Yield (name, shape) of each tensor of the MLP in a model of width `hidden`."""
        for name, shape in mlp_shapes(hidden, self.width).items():
            yield f"mlp.{name}", shape


@dataclass(frozen=True)
class LayerSpec:
    """One layer: a mixer, then a feed-forward part, each after a norm of its own."""

    mixer: MixerSpec
    feed_forward: MoeSpec | MlpSpec


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer whose layers with routed experts all have the same `MoeSpec`.

    Raises ValueError if they differ, or if no layer has experts.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_context: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    activation: str = "silu"  # of experts and dense MLPs
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    dense_width: int = 0  # of dense MLPs; the manifest keeps it even if no layer has one

    def __post_init__(self) -> None:
        if len({layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoeSpec)}) != 1:
            raise ValueError("a model has layers with experts, and they are alike")

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Return the indices of the layers that have experts."""
        return tuple(n for n, layer in enumerate(self.layers) if isinstance(layer.feed_forward, MoeSpec))

    @cached_property
    def moe(self) -> MoeSpec:
        """Return the feed-forward part that all layers with experts share."""
        return next(layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoeSpec))

    @property
    def num_experts(self) -> int:
        """Return the number of experts in a layer."""
        return self.moe.router.experts

    @property
    def top_k(self) -> int:
        """Return the number of experts that a token uses in a layer."""
        return self.moe.router.top_k

    @property
    def expert_width(self) -> int:
        """Return the intermediate width of an expert."""
        return self.moe.width

    @property
    def total_experts(self) -> int:
        """Return the number of experts in all layers."""
        return len(self.moe_layers) * self.num_experts

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Return matrix name -> (rows, cols) of one expert."""
        return mlp_shapes(self.hidden_size, self.expert_width)

    @property
    def expert_weights(self) -> int:
        """Return the number of weights in all experts."""
        return self.total_experts * 3 * self.hidden_size * self.expert_width

    def is_moe(self, layer: int) -> bool:
        """Return whether `layer` has experts."""
        return isinstance(self.layers[layer].feed_forward, MoeSpec)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise DymoeError if a token id of the tokenizer is outside the model's vocabulary."""
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise DymoeError(
                f"tokenizer.json: gives token {max(ids)}, the model knows {self.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name in the bundle -> shape of every tensor outside the experts."""
        return dict(self.each_tensor())

    def each_tensor(self) -> Shapes:
        """Yield (name in the bundle, shape) of every tensor outside the experts."""
        yield "embed", (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            for name, shape in self._layer_shapes(self.layers[layer]):
                yield f"layers.{layer}.{name}", shape
        yield "norm", (self.hidden_size,)
        if not self.tie_embeddings:
            yield "lm_head", (self.vocab_size, self.hidden_size)

    def _layer_shapes(self, layer: LayerSpec) -> Shapes:
        yield "attn_norm", (self.hidden_size,)
        yield from layer.mixer.tensor_shapes(self.hidden_size)
        yield "mlp_norm", (self.hidden_size,)
        yield from layer.feed_forward.tensor_shapes(self.hidden_size)


def alike_layers(
    count: int, mixer: MixerSpec, moe: MoeSpec, dense_layers: tuple[int, ...] = (), dense_width: int = 0
) -> tuple[LayerSpec, ...]:
    """Return `count` layers with the same mixer.

    Layers in `dense_layers` have a dense MLP of `dense_width`; the others have the experts of `moe`.
    """
    dense = set(dense_layers)
    return tuple(LayerSpec(mixer, MlpSpec(dense_width) if n in dense else moe) for n in range(count))


def mlp_shapes(hidden: int, width: int) -> dict[str, tuple[int, int]]:
    """Return matrix name -> (rows, cols) of a gated MLP."""
    return {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
