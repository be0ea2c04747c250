"""The tensors of a GGUF file: their names, and their numbers in the types of llama.cpp.

Rows of whole numbers go to Q8_0: 32 columns share a scale, which is a 16-bit float, and codes are signed bytes. The
codes of a tier's values fit as they are, so that only their scales are rounded, to 11 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as Type

from dymoe_compile.export.gguf.architectures import Architecture, attentions_of
from dymoe_compile.export.matrices import Format, Rows, WholeNumbers, values_of
from dymoe_compile.export.source import Expert, Source
from dymoe_runtime.bundle.bundle import dense_kind
from dymoe_runtime.model.rope import inverse_frequencies
from dymoe_runtime.spec import MATRICES, ModelSpec, Rope

# Columns that share a scale in Q8_0, and the bytes of such a block.
BLOCK, BLOCK_BYTES = 32, 34
# Name of a tensor of the model -> its name in GGUF, of a layer without the prefix `layers.N.`.
NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
    "attn_norm": "attn_norm.weight",
    "attn.o": "attn_output.weight",
    "attn.o_bias": "attn_output.bias",
    "attn.q_norm": "attn_q_norm.weight",
    "attn.k_norm": "attn_k_norm.weight",
    "attn.sinks": "attn_sinks.weight",
    "mlp_norm": "ffn_norm.weight",
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "router_select": "exp_probs_b.bias",
    "shared_gate": "ffn_gate_inp_shexp.weight",
}
NAMES |= {f"attn.{part}": f"attn_{part}.weight" for part in "qkv"}
NAMES |= {f"attn.{part}_bias": f"attn_{part}.bias" for part in "qkv"}
NAMES |= {f"mlp.{matrix}": f"ffn_{matrix}.weight" for matrix in MATRICES}
NAMES |= {f"shared.{matrix}": f"ffn_{matrix}_shexp.weight" for matrix in MATRICES}
# Where an architecture calls the norm before the experts one after attention.
POST_NORM = "post_attention_norm.weight"
# Factors of the wavelengths of all layers.
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its name, its shape, its type, and its number of bytes."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor."""
        rows, cols = int(np.prod(self.shape[:-1])), self.shape[-1]
        return rows * (cols // BLOCK * BLOCK_BYTES if self.type == Type.Q8_0 else cols * SIZES[self.type])


SIZES = {Type.F32: 4, Type.F16: 2, Type.BF16: 2}


def type_of(form: Format, cols: int) -> Type:
    """Return the type that holds rows of a format."""
    if form.is_whole:
        return Type.Q8_0 if cols % BLOCK == 0 else Type.F16
    return Type.BF16 if form.bits == 16 else Type.F32


def plan(source: Source, architecture: Architecture) -> Iterator[tuple[Planned, str]]:
    """Yield the tensors to write, each with the name by which `numbers` finds it, in the order of writing."""
    spec = source.spec
    for name, shape in spec.each_tensor():
        type_ = type_of(source.dense_form(name), shape[-1]) if dense_kind(name, shape) else Type.F32
        yield Planned(gguf_name(name, architecture), shape, type_), name
    if not any(name == "lm_head" for name, _ in spec.each_tensor()) and architecture.own_head:
        form = type_of(source.dense_form("embed"), spec.hidden_size)
        yield Planned(NAMES["lm_head"], (spec.vocab_size, spec.hidden_size), form), "embed"
    if (factors := rope_factors(spec)) is not None:
        yield Planned(ROPE_FACTORS, factors.shape, Type.F32), ROPE_FACTORS
    for layer in spec.moe_layers:
        for name, (rows, cols) in spec.expert_shapes.items():
            type_ = type_of(source.expert_form, cols)
            yield Planned(expert_name(layer, name), (spec.num_experts, rows, cols), type_), f"{layer}.{name}"
        for name, length in spec.expert_vectors.items():
            yield Planned(expert_name(layer, name), (spec.num_experts, length), Type.F32), f"{layer}.{name}"


def gguf_name(name: str, architecture: Architecture) -> str:
    """Return the name in GGUF of a tensor outside the experts."""
    if not name.startswith("layers."):
        return NAMES[name]
    _, layer, rest = name.split(".", 2)
    known = POST_NORM if rest == "mlp_norm" and architecture.post_norm else NAMES[rest]
    return f"blk.{layer}.{known}"


def expert_name(layer: int, name: str) -> str:
    """Return the name in GGUF of a matrix, or of a bias, of all experts of a layer."""
    matrix, _, bias = name.partition("_")
    return f"blk.{layer}.ffn_{matrix}_exps.{bias or 'weight'}"


def dense_numbers(source: Source, name: str, planned: Planned, architecture: Architecture) -> np.ndarray:
    """Return the numbers of a tensor outside the experts, as the bytes or floats of its type."""
    if planned.name == ROPE_FACTORS:
        factors = rope_factors(source.spec)
        assert factors is not None
        return factors
    order = _row_order(source.spec, name) if architecture.pairs else None
    if planned.type == Type.F32 and dense_kind(name, planned.shape) is None:
        vector = source.vector(name)
        return np.ascontiguousarray(vector if order is None else vector[order], np.float32)
    form = source.dense_form(name)
    data = np.concatenate([encoded(rows, form, planned.type) for rows in source.dense(name)])
    return data if order is None else data[order]


def encoded(rows: Rows, form: Format, type_: Type) -> np.ndarray:
    """Return rows [n, cols] in a type: bytes uint8 [n, m] for Q8_0, else floats, BF16 as uint16."""
    if not isinstance(rows, WholeNumbers):
        return np.ascontiguousarray(rows)
    if type_ == Type.F16:
        return values_of(rows, form).astype(np.float16)
    count, cols = rows.codes.shape
    blocks = np.empty((count, cols // BLOCK, BLOCK_BYTES), np.uint8)
    scales = rows.scales.repeat(form.block // BLOCK, axis=1)[:, : cols // BLOCK].astype(np.float16)
    blocks[:, :, :2] = scales[..., None].view(np.uint8)
    blocks[:, :, 2:] = (rows.codes ^ 0x80).reshape(count, -1, BLOCK)  # a code of 128 is 0
    return blocks.reshape(count, -1)


class Stacks:
    """The experts of one layer, each matrix and each bias stacked over all experts."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._layer = -1
        self._stacks: dict[str, np.ndarray] = {}

    def numbers(self, name: str) -> np.ndarray:
        """Return the numbers of the tensor `LAYER.NAME` [experts, ...]. Layers are asked for in order."""
        layer, _, matrix = name.partition(".")
        if int(layer) != self._layer:
            self._stacks.clear()
            self._load(int(layer))
        return self._stacks.pop(matrix)

    def _load(self, layer: int) -> None:
        self._layer = layer
        spec, form = self._source.spec, self._source.expert_form
        for index, expert in enumerate(self._source.experts(layer)):
            for name, part in self._parts(expert, form):
                if index == 0:
                    self._stacks[name] = np.empty((spec.num_experts, *part.shape), part.dtype)
                self._stacks[name][index] = part

    @staticmethod
    def _parts(expert: Expert, form: Format) -> Iterator[tuple[str, np.ndarray]]:
        for name, rows in expert.matrices.items():
            cols = rows.codes.shape[1] if isinstance(rows, WholeNumbers) else rows.shape[1]
            yield name, encoded(rows, form, type_of(form, cols))
        yield from expert.vectors.items()


def rope_factors(spec: ModelSpec) -> np.ndarray | None:
    """Return by what the wavelengths of each pair of columns are multiplied, float32 [n], or None if by one factor."""
    mixer = attentions_of(spec)[0]
    if mixer.rope is None or mixer.rope.kind != "llama3":
        return None
    plain = inverse_frequencies(Rope(mixer.rope.theta, dims=mixer.rope.dims), mixer.head_dim)
    factors: np.ndarray = plain / inverse_frequencies(mixer.rope, mixer.head_dim)
    return factors.astype(np.float32)


def _row_order(spec: ModelSpec, name: str) -> np.ndarray | None:
    """Return the order of rows in which a rotary embedding of neighbouring columns finds its pairs, or None.

    In the model, column i of a head turns with column i + n / 2.
    """
    part = name.rpartition(".attn.")[2]
    if part not in ("q", "k", "q_bias", "k_bias"):
        return None
    mixer = attentions_of(spec)[0]
    heads = mixer.heads if part.startswith("q") else mixer.kv_heads
    rows = np.arange(heads * mixer.head_dim).reshape(heads, 2, mixer.head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)
