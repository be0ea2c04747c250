"""Tensors of a checkpoint that its language model does without, by kind."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Kinds of tensors that are outside the layers of the language model.
OUTSIDE = {
    "vision": (
        r"(?:^|\.)(?:visual|vision\w*|vit\w*|image\w*|multi_modal_projector|mm_projector|resampler\w*|mlp1|embed_vision"
        r"|aligner)\b"
    ),
    "audio": r"(?:^|\.)(?:audio\w*|embed_audio|sound\w*)\b",
    "speech output": r"^(?:talker|code2wav|token2wav)\.",
}
# Kinds that can be anywhere.
ANYWHERE = {
    "prediction of further tokens": r"(?:^|\.)mtp(?:\.|_\w+\.|s\.)",
    "tables of rotary embeddings": r"(?:^|\.)inv_freq$",
    "scales of activations": r"[._](?:input|output|activation)(?:_global|_activation)?_(?:scale|scale_ub|zero_point)$",
    "scales of the KV cache": r"\.(?:q|k|v|kv)_scale$",
}
FURTHER_TOKENS = "prediction of further tokens"
SAME_HEAD = "output head equal to the embedding"
ZERO_BIASES = "biases that are zero"
# Only a layer that predicts further tokens has these: norms of its two inputs, and what joins them.
JOINS_INPUTS = re.compile(r"\.(?:eh_proj|enorm|hnorm|shared_head)\.")


def kind_of(name: str, layers: str) -> str | None:
    """Return what kind of tensor `name` is, or None if it may belong to the language model.

    `layers` is the prefix of the names of that model's layers.
    """
    kinds = ANYWHERE if name.startswith(layers) else {**OUTSIDE, **ANYWHERE}
    return next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), None)


def further_layers(names: Iterable[str], layers: str, count: int, declared: int) -> set[int]:
    """Return the layers from `count` on that predict further tokens.

    These are the next `declared` layers, and those with tensors that no other layer has. Other layers may be there
    because config.json says too few.
    """
    numbers = {name: number for name in names if (number := layer_of(name, layers)) is not None and number >= count}
    joining = {number for name, number in numbers.items() if JOINS_INPUTS.search(name)}
    return joining | {number for number in numbers.values() if number < count + declared}


def layer_of(name: str, layers: str) -> int | None:
    """Return the number of the layer that the tensor `name` is of, or None if it is outside the layers."""
    number = name[len(layers) :].split(".", 1)[0] if name.startswith(layers) else ""
    return int(number) if number.isdecimal() else None
