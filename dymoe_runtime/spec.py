"""ModelSpec: all that the decoder needs to know about a model; and what its experts may be stored at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from dymoe_runtime.errors import DymoeError

MATRICES = ("gate", "up", "down")


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


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer with routed experts."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    rope: Rope
    num_experts: int
    top_k: int
    norm_topk: bool  # gates of the chosen experts are divided by their sum
    expert_width: int
    activation: str = "silu"
    qk_norm: str = "none"  # none, head (over head_dim) or full (over all heads)
    attention_bias: bool = False
    clip_qkv: float | None = None
    sliding_window: int | None = None
    dense_layers: tuple[int, ...] = ()  # layers with one dense MLP in place of experts
    dense_width: int = 0
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Matrix name -> (rows, cols) of one routed expert."""
        return mlp_shapes(self.hidden_size, self.expert_width)

    @property
    def expert_weights(self) -> int:
        """Weights in all routed experts."""
        return len(self.moe_layers) * self.num_experts * 3 * self.hidden_size * self.expert_width

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Our name -> shape of every tensor outside the routed experts."""
        return dict(self.each_tensor())

    def each_tensor(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """`tensor_shapes` one by one."""
        hidden = self.hidden_size
        yield "embed", (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            for name, shape in self._layer_shapes(layer):
                yield f"layers.{layer}.{name}", shape
        yield "norm", (hidden,)
        if not self.tie_embeddings:
            yield "lm_head", (self.vocab_size, hidden)

    def _layer_shapes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "attn_norm", (hidden,)
        for name, rows, cols in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield f"attn.{name}", (rows, cols)
            if self.attention_bias:
                yield f"attn.{name}_bias", (rows,)
        if self.qk_norm != "none":
            head = self.qk_norm == "head"
            yield "attn.q_norm", (self.head_dim if head else q,)
            yield "attn.k_norm", (self.head_dim if head else kv,)
        yield "mlp_norm", (hidden,)
        if layer in self.dense_layers:
            for name, shape in mlp_shapes(hidden, self.dense_width).items():
                yield f"mlp.{name}", shape
        else:
            yield "router", (self.num_experts, hidden)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ModelSpec:
        values = dict(data)
        values["rope"] = strict(Rope, values.get("rope", {}), "manifest.json: spec.rope")
        for name in ("dense_layers", "eos_ids"):
            values[name] = tuple(values.get(name, ()))
        return strict(ModelSpec, values, "manifest.json: spec")


def mlp_shapes(hidden: int, width: int) -> dict[str, tuple[int, int]]:
    """Shapes of a gated MLP, matrix name -> (rows, cols)."""
    return {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}


def strict(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """Build dataclass `cls` from `data`; an unknown or missing key is a DymoeError that names it."""
    known = {field.name for field in fields(cls)}
    if unknown := sorted(set(data) - known):
        raise DymoeError(f"{where}: unknown key '{unknown[0]}'; known keys are {', '.join(sorted(known))}")
    try:
        return cls(**data)
    except TypeError as error:
        raise DymoeError(f"{where}: {error}") from error


def check_ladder(ladder: Sequence[int]) -> tuple[int, ...]:
    """Return `ladder` as a tuple; ValueError unless it climbs strictly within 2..8."""
    tiers = tuple(ladder)
    whole = all(type(tier) is int for tier in tiers)
    if not whole or not tiers or list(tiers) != sorted(set(tiers)) or tiers[0] < 2 or tiers[-1] > 8:
        raise ValueError(f"tiers {list(ladder)}: expected increasing bits between 2 and 8, such as 2,3,4")
    return tiers
