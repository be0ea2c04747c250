"""Sources of tensors that checkpoints store in another form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dymoe_compile.families.parts.names import LAYER, Shape, Source
from dymoe_runtime.spec import AttentionSpec, ModelSpec

if TYPE_CHECKING:
    import torch


def plus_one(*templates: str) -> Source:
    """Return the source of a norm that checkpoints store as its weights minus 1."""
    return Source((templates,), lambda shape: [shape], lambda shape, tensors: tensors[0].float() + 1)


def reshaped(*templates: str, shape: Callable[[Shape], Shape]) -> Source:
    """Return the source of a tensor that checkpoints store in another shape, with the same order of elements."""
    return Source((templates,), lambda wanted: [shape(wanted)], lambda wanted, tensors: tensors[0].reshape(wanted))


def one_row(*templates: str) -> Source:
    """Return the source of a vector that checkpoints store as a matrix of one row."""
    return reshaped(*templates, shape=lambda wanted: (1, *wanted))


def ones() -> Source:
    """Return the source of a norm without weights."""
    import torch

    return Source((), lambda shape: [], lambda shape, tensors: torch.ones(shape))


def part_of_rows(index: int, parts: int, *templates: str) -> Source:
    """Return the source of the rows of part `index` of a matrix of `parts` equal parts."""
    return Source(
        (templates,),
        lambda shape: [(parts * shape[0], *shape[1:])],
        lambda shape, tensors: tensors[0][index * shape[0] : (index + 1) * shape[0]],
    )


def half_of_heads(index: int, head_dim: int, *templates: str) -> Source:
    """Return the source of half `index` (0 or 1) of each head, from a matrix whose heads have 2 * head_dim rows."""

    def make(shape: Shape, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        heads = tensors[0].reshape(-1, 2, head_dim, *shape[1:])
        return heads[:, index].reshape(shape)

    return Source((templates,), lambda shape: [(2 * shape[0], *shape[1:])], make)


def parts_of_groups(groups: int, sizes: Sequence[int], chosen: Sequence[int], *templates: str) -> Source:
    """Return the source of the parts `chosen` of a matrix whose rows are `groups` groups of parts with `sizes` rows.

    All rows of the first part that is chosen come first, in the order of groups.
    """

    def make(shape: Shape, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        parts = torch.split(tensors[0].reshape(groups, -1, *shape[1:]), list(sizes), dim=1)
        return torch.cat([parts[part].reshape(-1, *shape[1:]) for part in chosen])

    return Source((templates,), lambda shape: [(groups * sum(sizes), *shape[1:])], make)


def halves(first: str, second: str) -> Source:
    """Return the source of a matrix whose halves are two tensors."""

    def make(shape: Shape, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.cat(list(tensors))

    return Source(((first,), (second,)), lambda shape: [(shape[0] // 2, *shape[1:])] * 2, make)


def scaled_columns(matrix: str, scale: str) -> Source:
    """Return the source of a matrix [R, H] whose input is multiplied by the tensor `scale` [H] and by 1 / sqrt(H)."""

    def make(shape: Shape, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        factors: torch.Tensor = tensors[1].float() * shape[1] ** -0.5  # [H]
        return tensors[0].float() * factors

    return Source(((matrix,), (scale,)), lambda shape: [shape, (shape[1],)], make)


def deinterleaved(head_dim: int, dims: int, *templates: str) -> Source:
    """Return the source of queries or keys whose rotary embedding turns columns 2 i and 2 i + 1 together.

    The rows of each head are reordered, so that the first `dims` of them turn by halves, as in `Rope`.
    """

    def make(shape: Shape, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        heads = tensors[0].reshape(-1, head_dim, *shape[1:])
        order = [*range(0, dims, 2), *range(1, dims, 2), *range(dims, head_dim)]
        return heads[:, order].reshape(shape)

    return Source((templates,), lambda shape: [shape], make)


def turned_heads(spec: ModelSpec) -> dict[str, Source]:
    """Return the sources of queries and keys whose rotary embedding turns neighbouring columns, all of a head."""
    head_dim = first_head_dim(spec)
    return {
        f"attn__{name}{ours}": deinterleaved(head_dim, head_dim, f"{LAYER}self_attn.{name}_proj.{theirs}")
        for name in "qk"
        for ours, theirs in (("", "weight"), ("_bias", "bias"))
    }


def first_head_dim(spec: ModelSpec) -> int:
    """Return the columns of a head of the first attention, or 0 if there is none."""
    return next((layer.mixer.head_dim for layer in spec.layers if isinstance(layer.mixer, AttentionSpec)), 0)
