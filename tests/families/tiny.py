"""Tiny configurations: what the cases of several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Values = dict[str, Any]
MakeConfig = Callable[[Values], Any]

# A window shorter than the prompt, and heads whose columns are no power of two.
WINDOW, HEAD = 9, 20
SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS: Values = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
SMALL: Values = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40, "moe_intermediate_size": 20}
YARN: Values = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MSCALE_YARN: Values = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
FAST_YARN: Values = {
    "rope_type": "yarn",
    "rope_theta": 3000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
}
LLAMA3: Values = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Parameters of the rope of models that read images: positions of text are the same in its three sections.
MROPE: Values = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 0]}
VISION: Values = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


def of(kind: str, **values: Any) -> MakeConfig:
    """The function that makes a configuration of the transformers class `kind` from COMMON and `values`."""

    def config(common: Values) -> Any:
        import transformers

        return getattr(transformers, kind)(**{**common, **values})

    return config


def with_vision(kind: str, vision: Values, **values: Any) -> MakeConfig:
    """The function that makes a configuration of a model with a vision tower."""

    def config(common: Values) -> Any:
        return of(kind, text_config={**common, **values}, vision_config=vision, tie_word_embeddings=False)({})

    return config


def model_class(name: str) -> Callable[[Any], Any]:
    """The function that makes a model of the transformers class `name`."""

    def model(config: Any) -> Any:
        import transformers

        return getattr(transformers, name)(config)

    return model
