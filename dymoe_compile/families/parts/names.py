"""The checkpoint tensors that a model's tensors are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dymoe_runtime.spec import MATRICES

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
# Names of a tensor in checkpoints, the usual one first, with {layer} and {expert}. They begin with `model.` or
# `lm_head.`, whatever prefix a checkpoint has.
Templates = tuple[str, ...]

LAYER = "model.layers.{layer}."
# Mixtral's names of the matrices of an expert.
NUMBERED = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Source:
    """How a tensor of the model is made of tensors of a checkpoint.

    `make` gets the shape of the tensor and the checkpoint's tensors, whose names are `inputs`. `shapes` returns the
    shapes that those must have.
    """

    inputs: tuple[Templates, ...]
    shapes: Callable[[Shape], Sequence[Shape]]
    make: Callable[[Shape, Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Stacked:
    """Experts of a layer in one tensor for gate and up, and one for down.

    gate_up is [experts, 2 I, H] and down [experts, H, I]; with `transposed`, [experts, H, 2 I] and [experts, I, H]. The
    rows of gate come first, or with `interleaved`, rows of gate and up take turns. Biases, if any, are
    [experts, 2 I] and [experts, H].
    """

    gate_up: Templates
    down: Templates
    gate_up_bias: Templates = ()
    down_bias: Templates = ()
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Names:
    """The sources of a model's tensors, by DyMoE name; those of a layer without the prefix `layers.N.`."""

    dense: dict[str, Templates | Source]
    expert: dict[str, Templates] = field(default_factory=dict)  # gate, up, down of one expert, and their biases
    stacked: Stacked | None = None

    def replace_dense(self, **changes: Templates | Source) -> Names:
        """Return these names with other sources; in keywords, `__` stands for a dot."""
        dense = {name.replace("__", "."): source for name, source in changes.items()}
        return replace(self, dense={**self.dense, **dense})

    def replace_stacked(self, **changes: Any) -> Names:
        """Return these names with other values in `stacked`."""
        assert self.stacked is not None
        return replace(self, stacked=replace(self.stacked, **changes))


def common_names(
    *blocks: str, dense: str = "mlp", shared: Sequence[str] = (), theirs: Mapping[str, str] | None = None
) -> Names:
    """Return the names of the Llama-like layout.

    `blocks` are names of its expert block (`mlp`), `dense` that of its dense MLPs, and `shared` are names of the shared
    expert in the expert block. `theirs` are names that the maker has for the matrices gate, up and down of an expert.
    """
    blocks = blocks or ("mlp",)
    attention = f"{LAYER}self_attn."
    sources: dict[str, Templates | Source] = {
        "embed": ("model.embed_tokens.weight",),
        "norm": ("model.norm.weight",),
        "lm_head": ("lm_head.weight",),
        "attn_norm": (f"{LAYER}input_layernorm.weight",),
        "mlp_norm": (f"{LAYER}post_attention_layernorm.weight",),
        "attn.q_norm": (f"{attention}q_norm.weight",),
        "attn.k_norm": (f"{attention}k_norm.weight",),
        "attn.sinks": (f"{attention}sinks",),
        "router": tuple(f"{LAYER}{block}.gate.weight" for block in blocks),
        "router_select": tuple(
            f"{LAYER}{block}.{name}"
            for name in ("gate.e_score_correction_bias", "e_score_correction_bias")
            for block in blocks
        ),
    }
    for name in "qkvo":
        sources[f"attn.{name}"] = (f"{attention}{name}_proj.weight",)
        sources[f"attn.{name}_bias"] = (f"{attention}{name}_proj.bias",)
    for name in MATRICES:
        sources[f"mlp.{name}"] = (f"{LAYER}{dense}.{name}_proj.weight",)
        sources[f"shared.{name}"] = tuple(
            f"{LAYER}{block}.{mlp}.{name}_proj.weight" for block in blocks for mlp in shared
        )
    expert = {name: expert_names(f"{name}_proj", *blocks) for name in MATRICES}
    for name, other in (theirs or {}).items():
        expert[name] = expert_names(other, blocks[0]) + expert[name]
    gate_up, down = (tuple(f"{LAYER}{block}.experts.{name}_proj" for block in blocks) for name in ("gate_up", "down"))
    return Names(sources, expert, Stacked(gate_up, down))


def expert_names(matrix: str, *blocks: str) -> Templates:
    """Return the names of a matrix of one expert in these blocks."""
    return tuple(f"{LAYER}{block}.experts.{{expert}}.{matrix}.weight" for block in blocks)
