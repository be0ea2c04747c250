"""The specification of a model: its layers as data. `bundle/bundle.py` has the form that a manifest keeps.

A layer has a mixer (attention, or another operation across tokens) and a feed-forward part (routed experts or a dense
MLP). `model/mixers/` has the mathematics of each kind of mixer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, NamedTuple, Protocol

from msgspec import Meta

from dymoe_runtime.errors import DymoeError

MATRICES = ("gate", "up", "down")
# Bits of a KV cache.
KV_BITS = (8, 16, 32)
# Activations of a gated MLP, named as in Hugging Face configurations. `clamped_swiglu` makes another one.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
CLAMPED = "clamped_swiglu"
# Norms of the residual stream and of what layers add to it: RMSNorm, or LayerNorm without or with biases.
NORMS = ("rms", "layer", "layer_bias")
# Grids of the experts' codes: scalar, that of weights that were trained in MXFP4, and trellis-coded.
GRIDS = ("", "mxfp4", "trellis")

# Kinds of rotary embeddings.
ROPES = ("default", "linear", "llama3", "yarn", "proportional", "longrope")
# Positions that the convolution of a gated delta rule can see; compiled code has a limit.
MAX_TAPS = 16

# Types of numbers in a specification, with the limits that reading one checks. All are far from what would overflow.
Count = Annotated[int, Meta(ge=1, le=1 << 31)]
Number = Annotated[int, Meta(ge=0, le=1 << 31)]
Real = Annotated[float, Meta(ge=-1e38, le=1e38)]
Factor = Annotated[float, Meta(ge=0, le=1e38)]
Positive = Annotated[float, Meta(gt=0, le=1e38)]

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
    """Rotary position embedding; the names are those of Hugging Face's `rope_parameters`.

    The first `dims` columns of a head turn, columns i and i + dims / 2 together. In kind `proportional`, all columns
    are paired that way, and the frequencies of the pairs from dims / 2 on are 0.

    Kind `longrope` (arXiv 2402.13753) divides the frequency of each pair by its own factor. Keys in a KV cache are
    rotated already, so the factors are those of the longest context that the sequence may have: the short ones up to
    `original_max_position_embeddings`, else the long ones, which `long_attention_factor` belongs to.
    """

    theta: Positive = 10000.0
    kind: str = "default"  # one of ROPES
    factor: Positive = 1.0
    original_max_position_embeddings: Number = 0
    low_freq_factor: Factor = 1.0
    high_freq_factor: Factor = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive = 1.0
    truncate: bool = True
    dims: Number = 0  # 0: all columns of a head
    short_factors: tuple[Positive, ...] = ()  # by pair of columns
    long_factors: tuple[Positive, ...] = ()
    long_attention_factor: Positive = 1.0

    def check(self, head_dim: int) -> None:
        """Raise ValueError unless this can turn the columns of heads of `head_dim`."""
        _expect_one("rope.kind", self.kind, ROPES)
        dims = self.dims or head_dim
        _expect(dims % 2 == 0 and dims <= head_dim, f"a rotary embedding of {dims} columns does not fit {head_dim}")
        if self.kind == "longrope":
            lengths = {len(self.short_factors), len(self.long_factors)}
            _expect(lengths == {dims // 2}, f"longrope needs {dims // 2} short and long factors")
        if self.kind == "yarn":
            _expect(
                self.theta > 1 and self.original_max_position_embeddings > 0, "yarn needs a theta above 1 and a context"
            )


class MixerSpec(Protocol):
    """The first half of a layer, as data."""

    @property
    def kind(self) -> str:
        """Return the key of `model.mixers.MIXERS` for the implementation of this mixer."""

    def tensor_shapes(self, hidden: int) -> Shapes:
        """Yield (name, shape) of each tensor of this mixer in a model of width `hidden`."""


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention (arXiv 2305.13245). Raises ValueError if heads or options do not fit."""

    heads: Count
    kv_heads: Count
    head_dim: Count
    rope: Rope | None  # None: no position embedding
    window: Count | None = None  # positions that a token sees, itself included; None: all
    qk_norm: str = "none"  # none, head (over head_dim) or full (over all heads)
    bias: bool = False  # in the projections to queries, keys and values
    clip: Positive | None = None  # largest magnitude of queries, keys and values
    output_bias: bool = False
    chunk: Count | None = None  # a token sees only positions of its own chunk of that many
    norm_after_rope: bool = False  # whether qk_norm comes after the rotary embedding
    value_norm: bool = False  # whether values are normalized, over head_dim
    sinks: bool = False  # a learned score for each head, which takes attention from the positions (arXiv 2309.17453)
    gate: str = "none"  # of the output before the last projection: none, element (of each value) or head
    gate_activation: str = "sigmoid"  # or softplus
    scale: Positive | None = None  # of the scores; None: 1 / sqrt(head_dim)
    # (floor, scale): queries at position p are multiplied by 1 + scale * log(1 + floor((p + 1) / floor)).
    temperature: tuple[Positive, Real] | None = None
    kind: ClassVar[str] = "gqa"

    def __post_init__(self) -> None:
        fits = self.heads % self.kv_heads == 0
        _expect(fits, f"{self.heads} attention heads do not divide into {self.kv_heads} key-value heads")
        _expect(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, attention needs an even one")
        _expect_one("qk_norm", self.qk_norm, ("none", "head", "full"))
        _expect_one("gate", self.gate, ("none", "element", "head"))
        _expect_one("gate_activation", self.gate_activation, ("sigmoid", "softplus"))
        if self.rope is not None:
            self.rope.check(self.head_dim)

    def tensor_shapes(self, hidden: int) -> Shapes:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name, rows, cols in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield f"attn.{name}", (rows, cols)
            if self.output_bias if name == "o" else self.bias:
                yield f"attn.{name}_bias", (rows,)
        if self.gate != "none":
            yield "attn.gate", (q if self.gate == "element" else self.heads, hidden)
        if self.qk_norm != "none":
            head = self.qk_norm == "head"
            yield "attn.q_norm", (self.head_dim if head else q,)
            yield "attn.k_norm", (self.head_dim if head else kv,)
        if self.value_norm:
            yield "attn.v_norm", (self.head_dim,)
        if self.sinks:
            yield "attn.sinks", (self.heads,)


@dataclass(frozen=True)
class GatedDeltaSpec:
    """A gated delta rule (Gated DeltaNet, arXiv 2412.06464) behind a causal convolution.

    Each head of values has a state [key_dim, value_dim]; `value_heads / key_heads` of them share a head of keys.

    Raises ValueError if they do not divide, or the convolution is too long.
    """

    key_heads: Count
    value_heads: Count
    key_dim: Count
    value_dim: Count
    taps: Count  # positions that the convolution sees, the token's own included
    kind: ClassVar[str] = "gated_delta"

    def __post_init__(self) -> None:
        fits = self.value_heads % self.key_heads == 0
        _expect(fits, f"{self.value_heads} heads of values do not divide into {self.key_heads} of keys")
        _expect(self.taps <= MAX_TAPS, f"the convolution has {self.taps} taps, {MAX_TAPS} are the most")

    @property
    def keys(self) -> int:
        """Return the columns of all keys, which is also that of all queries."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Return the columns of all values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Return the columns that pass the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    def tensor_shapes(self, hidden: int) -> Shapes:
        yield "delta.qkv", (self.channels, hidden)
        yield "delta.z", (self.values, hidden)
        yield "delta.ba_exact", (2 * self.value_heads, hidden)  # update rates, then decays; see `is_exact`
        yield "delta.conv_exact", (self.channels, self.taps)
        yield "delta.a_log", (self.value_heads,)
        yield "delta.dt_bias", (self.value_heads,)
        yield "delta.norm", (self.value_dim,)
        yield "delta.o", (hidden, self.values)


# How a router turns logits into scores, of which the routing weights are taken.
SCORES = ("softmax", "sigmoid", "softmax_of_chosen", "sparsemixer")
# What a group of experts is ranked by: its two highest scores, or the highest one.
GROUP_SCORES = ("top2", "max")


@dataclass(frozen=True)
class RouterSpec:
    """A router, which chooses `top_k` experts for each token.

    1. logits = x @ router.T, plus `router_bias` with `bias`; with `softcap` c they become c * tanh(logits / c).
    2. scores: the softmax over all experts; the sigmoid of each; or, with the others, the logits.
    3. The experts of the highest scores are chosen, of equal ones that with the highest logit. With `selection_bias`,
       `router_select` is added to the scores for that choice alone. With `groups`, only experts of the `top_groups`
       best of so many equal groups can be chosen.
    4. Routing weights are the scores of the chosen experts; with `softmax_of_chosen`, the softmax of those scores. With
       `sparsemixer` (arXiv 2409.12136), the weight of an expert with logit m is its share of the softmax over those not
       chosen before it, without the experts of a logit l for which (m - l) / max(|l|, m) exceeds `threshold`.
    5. With `normalize` they are divided by their sum plus `eps`, or by at least `least_sum`. Then they are multiplied
       by `scale` and, with `expert_scale`, by the expert's number of `router_scale`.

    Raises ValueError if the numbers of experts and groups do not fit.
    """

    experts: Count
    top_k: Count
    normalize: bool  # routing weights are divided by their sum
    score: str = "softmax"  # one of SCORES
    bias: bool = False
    selection_bias: bool = False
    groups: Count = 1
    top_groups: Count = 1
    group_score: str = "top2"  # one of GROUP_SCORES
    scale: Real = 1.0
    eps: Factor = 0.0
    least_sum: Factor = 0.0
    softcap: Factor = 0.0  # 0: none
    expert_scale: bool = False
    plain_norm: bool = False  # the router reads the residual stream normalized without the norm's weights
    # The routing weight of the only expert multiplies its input instead of its output.
    scales_input: bool = False
    threshold: Factor = 0.0  # of the score sparsemixer

    def __post_init__(self) -> None:
        _expect_one("score", self.score, SCORES)
        _expect_one("group_score", self.group_score, GROUP_SCORES)
        _expect(1 <= self.top_k <= self.experts, f"a token uses {self.top_k} experts, and there are {self.experts}")
        fits = 1 <= self.top_groups <= self.groups and self.experts % self.groups == 0
        _expect(
            fits and self.top_k <= self.experts // self.groups * self.top_groups,
            f"{self.groups} groups of experts do not fit {self.experts} experts, {self.top_k} a token",
        )
        _expect(not self.scales_input or self.top_k == 1, "a routing weight multiplies the input of one expert only")

    @property
    def weighs_by_share(self) -> bool:
        """Return whether routing weights are shares of the softmax over all experts, so that tokens compare by them."""
        return self.score == "softmax" and not self.expert_scale

    def tensor_shapes(self, hidden: int) -> Shapes:
        """Yield (name, shape) of each tensor of the router in a model of width `hidden`."""
        yield "router", (self.experts, hidden)
        if self.bias:
            yield "router_bias", (self.experts,)
        if self.selection_bias:
            yield "router_select", (self.experts,)
        if self.expert_scale:
            yield "router_scale", (self.experts,)


@dataclass(frozen=True)
class SharedSpec:
    """A dense MLP beside the routed experts, through which each token goes. It is a part of the dense weights.

    With `own_norms`, it has a norm before it and one after it, and so do the routed experts: the norm of the layer is
    theirs.
    """

    width: Count
    gated: bool = False  # its output is multiplied by the sigmoid of x . shared_gate
    scale: Real = 1.0  # of its output
    own_norms: bool = False

    def tensor_shapes(self, hidden: int) -> Shapes:
        """Yield (name, shape) of each tensor of the MLP but its norms in a model of width `hidden`."""
        for name, shape in mlp_shapes(hidden, self.width).items():
            yield f"shared.{name}", shape
        if self.gated:
            yield "shared_gate", (hidden,)


@dataclass(frozen=True)
class MoeSpec:
    """A feed-forward part of routed experts."""

    router: RouterSpec
    width: Count  # of each expert
    shared: SharedSpec | None = None
    biases: bool = False  # of gate, up and down, which the record of an expert holds
    kind: ClassVar[str] = "moe"

    def tensor_shapes(self, hidden: int) -> Shapes:
        """Yield (name, shape) of each tensor outside the experts in a model of width `hidden`."""
        yield from self.router.tensor_shapes(hidden)
        if self.shared is not None:
            yield from self.shared.tensor_shapes(hidden)


@dataclass(frozen=True)
class MlpSpec:
    """A feed-forward part of one dense MLP."""

    width: Count
    kind: ClassVar[str] = "mlp"

    def tensor_shapes(self, hidden: int) -> Shapes:
        """Yield (name, shape) of each tensor of the MLP in a model of width `hidden`."""
        for name, shape in mlp_shapes(hidden, self.width).items():
            yield f"mlp.{name}", shape


@dataclass(frozen=True)
class LayerSpec:
    """One layer: a mixer, then a feed-forward part, each of which adds to the residual stream.

    With `pre_norms`, each reads the norm of the stream. With `post_norms`, its output is normalized. In a `parallel`
    layer, both read the same norm of the stream that enters the layer.

    Raises ValueError for a parallel layer with norms other than that one, or with a scalar.
    """

    mixer: MixerSpec
    feed_forward: MoeSpec | MlpSpec
    pre_norms: bool = True
    post_norms: bool = False
    residual_scale: Real = 1.0  # of what each part adds
    scalar: bool = False  # whether the residual stream leaves the layer multiplied by a learned number
    parallel: bool = False

    def __post_init__(self) -> None:
        shared = self.feed_forward.shared if isinstance(self.feed_forward, MoeSpec) else None
        others = not self.pre_norms or self.post_norms or self.scalar or (shared is not None and shared.own_norms)
        if self.parallel and others:
            raise ValueError("a parallel layer has one norm, which is before both of its parts, and no scalar")

    @property
    def feed_norm(self) -> str | None:
        """Return the name of the norm through which the feed-forward part reads the residual stream, or None."""
        if not self.pre_norms:
            return None
        return "attn_norm" if self.parallel else "mlp_norm"


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer whose layers with routed experts all have the same `MoeSpec`.

    Raises ValueError if they differ, if no layer has experts, or if an option is not known.
    """

    model_type: str
    vocab_size: Count
    hidden_size: Count
    max_context: Count
    norm_eps: Factor
    layers: tuple[LayerSpec, ...]
    activation: str = "silu"  # of experts and dense MLPs
    tie_embeddings: bool = False
    eos_ids: tuple[Number, ...] = ()
    dense_width: Number = 0  # of dense MLPs; version 3 of the bundle format keeps it even if no layer has one
    embed_scale: Real = 1.0  # of embeddings
    logit_scale: Real = 1.0
    logit_softcap: Factor = 0.0  # c: logits become c * tanh(logits / c); 0: none
    expert_grid: str = ""  # of the experts' codes: that of the bundle format, or mxfp4 for weights that were trained so
    norm: str = "rms"  # one of NORMS, of all norms but those in mixers
    head_bias: bool = False  # whether logits have a bias

    def __post_init__(self) -> None:
        if len({layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoeSpec)}) != 1:
            raise ValueError("a model has layers with experts, and they are alike")
        _expect_one("norm", self.norm, NORMS)
        _expect_one("expert_grid", self.expert_grid, GRIDS)
        if clamped_parameters(self.activation) is None:
            _expect_one("activation", self.activation, ACTIVATIONS)

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
    def expert_vectors(self) -> dict[str, int]:
        """Return vector name -> length of one expert, which its record holds beside its matrices."""
        if not self.moe.biases:
            return {}
        return {f"{name}_bias": rows for name, (rows, _) in self.expert_shapes.items()}

    @property
    def expert_weights(self) -> int:
        """Return the number of weights in all experts."""
        return self.total_experts * 3 * self.hidden_size * self.expert_width

    @property
    def head(self) -> str:
        """Return the name of the matrix whose product with hidden states are the logits."""
        return "embed" if self.tie_embeddings else "lm_head"

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
        yield from self._norm_shapes("norm")
        if not self.tie_embeddings:
            yield "lm_head", (self.vocab_size, self.hidden_size)
        if self.head_bias:
            yield f"{self.head}_bias", (self.vocab_size,)

    def _norm_shapes(self, name: str) -> Shapes:
        yield name, (self.hidden_size,)
        if self.norm == "layer_bias":
            yield f"{name}_bias", (self.hidden_size,)

    def _layer_shapes(self, layer: LayerSpec) -> Shapes:
        if layer.pre_norms:
            yield from self._norm_shapes("attn_norm")
        yield from layer.mixer.tensor_shapes(self.hidden_size)
        if layer.post_norms:
            yield from self._norm_shapes("attn_post_norm")
        if layer.feed_norm == "mlp_norm":
            yield from self._norm_shapes("mlp_norm")
        yield from layer.feed_forward.tensor_shapes(self.hidden_size)
        shared = layer.feed_forward.shared if isinstance(layer.feed_forward, MoeSpec) else None
        if shared is not None and shared.own_norms:
            for name in ("shared_norm", "shared_post_norm", "experts_post_norm"):
                yield from self._norm_shapes(name)
        if layer.post_norms:
            yield from self._norm_shapes("mlp_post_norm")
        if layer.scalar:
            yield "scalar", (1,)


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


def is_exact(name: str) -> bool:
    """Return whether the dense tensor `name` stays float32 though it is a matrix: routers, and names in `_exact`."""
    return name.endswith((".router", "_exact"))


def clamped_swiglu(alpha: float, limit: float) -> str:
    """Return the name of the activation clamp(g) * sigmoid(alpha * clamp(g)) * (clamp(u) + 1).

    g is the gate, at most `limit`; u is up, from -limit to limit. gpt-oss uses it.

    >>> clamped_swiglu(1.702, 7.0)
    'clamped_swiglu:1.702:7.0'
    """
    return f"{CLAMPED}:{alpha!r}:{limit!r}"


def clamped_parameters(activation: str) -> tuple[float, float] | None:
    """Return (alpha, limit) of a name that `clamped_swiglu` made, or None for another activation.

    Raises ValueError if the name is malformed.
    """
    if not activation.startswith(CLAMPED):
        return None
    _, *parts = activation.split(":")
    if len(parts) != 2:
        raise ValueError(f"activation {activation[:60]!r}: expected {CLAMPED}:ALPHA:LIMIT")
    alpha, limit = map(float, parts)
    _expect(abs(alpha) < 1e38 and 0 < limit < 1e38, f"activation {activation[:60]!r}: not two numbers that fit")
    return alpha, limit


def _expect(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def _expect_one(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value[:60]!r}: expected {', '.join(map(repr, known))}")
