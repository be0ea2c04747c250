"""A family against transformers: a tiny random model, its checkpoint, and what both make of the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dymoe_compile.checkpoint.original import open_original
from dymoe_runtime.kernels import load_kernels
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.state import SequenceState

PROMPT, STEPS = 37, 20
# Sizes of every tiny model, unless a case gives others. The window is shorter than the prompt.
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """A configuration of a family that exercises some of its features."""

    family: str  # file in dymoe_compile/families
    name: str  # what this configuration is about
    config: Callable[[dict[str, Any]], Any]  # COMMON -> a transformers configuration
    model: Callable[[Any], torch.nn.Module] | None = None  # by default, AutoModelForCausalLM.from_config
    logits: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = field(
        default=lambda model, ids: model(input_ids=ids, use_cache=False).logits
    )

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


def random_model(case: Case, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random model in float32, whose norms, biases and other small tensors are not trivial."""
    import transformers

    torch.manual_seed(seed)
    config = case.config({**COMMON, **changes})
    config._attn_implementation = "eager"
    for name in ("text_config", "vision_config"):
        if (inner := getattr(config, name, None)) is not None:
            inner._attn_implementation = "eager"
    make = case.model or transformers.AutoModelForCausalLM.from_config
    model = make(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or "embed_scale" in name or not tensor.is_floating_point():
                continue
            if "norm" in name and tensor.dim() == 1:
                tensor.add_(torch.empty_like(tensor).uniform_(-0.4, 0.4, generator=generator))
            elif tensor.dim() == 1 or "bias" in name or "sinks" in name or tensor.numel() <= tensor.shape[-1]:
                tensor.add_(torch.empty_like(tensor).normal_(0, 0.1, generator=generator))
            else:
                size = 0.3 if "experts" in name or "gate" in name or "router" in name else 0.15
                tensor.copy_(torch.empty_like(tensor).normal_(0, size, generator=generator))
    return model


def difference(case: Case, directory: Path, kernels: Kernels | None = None, seed: int = 0) -> tuple[float, float]:
    """Return (largest absolute difference of logits, share of positions with the same best token).

    Our logits are those of a prompt and of single steps that continue it.
    """
    model = random_model(case, seed)
    model.save_pretrained(directory)
    ids = np.random.default_rng(seed).integers(1, COMMON["vocab_size"], PROMPT + STEPS)
    with torch.no_grad():
        theirs = case.logits(model, torch.from_numpy(ids)[None])[0].numpy()
    ours = our_logits(directory, ids, kernels)
    return float(np.abs(ours - theirs).max()), float((ours.argmax(-1) == theirs.argmax(-1)).mean())


def our_logits(directory: Path, ids: np.ndarray, kernels: Kernels | None = None) -> np.ndarray:
    """The logits [T, vocab] of a checkpoint in float32: a prompt of PROMPT tokens, then one token at a time."""
    decoder = open_original(directory, kernels or load_kernels("numpy")).decoder
    state = SequenceState(decoder.spec, len(ids), 32)
    hidden = [decoder.forward(ids[:PROMPT], state)]
    hidden += [decoder.forward(ids[at : at + 1], state) for at in range(PROMPT, len(ids))]
    return decoder.logits(np.concatenate(hidden))
