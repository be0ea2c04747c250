"""What is known of a model before its weights are read: from config.json, the index and the headers of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dymoe_compile.checkpoint.directory import CONFIG, INDEX, REMEDY, TensorFiles, read_config, read_json
from dymoe_compile.checkpoint.quantization import read_quantization
from dymoe_compile.checkpoint.tensors import CheckpointTensors
from dymoe_compile.families import family_of, text_config
from dymoe_compile.families.parts.config import Config
from dymoe_runtime.bundle.bundle import TOKENIZER
from dymoe_runtime.bundle.tiers import grid_for
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ModelSpec

# From what a model is known: all headers of its tensors, or the configuration where not all of these are there.
HEADERS, CONFIGURATION = "headers", "config"
# quant_method of config.json whose experts were trained so -> bits that they were trained with.
TRAINED = {"mxfp4": 4}


@dataclass(frozen=True)
class Source:
    """A model to plan for; `basis` says from what it is known."""

    spec: ModelSpec
    basis: str
    trained_bits: int | None
    checkpoint_bytes: int | None
    tokenizer_bytes: int | None

    def spec_for(self, ladder: tuple[int, ...]) -> ModelSpec:
        """Return the specification in a bundle with this ladder."""
        return replace(self.spec, expert_grid=grid_for(ladder, self.trained_bits))


class HeadersOnly(TensorFiles):
    """Files of a checkpoint none of whose weights is read; config.json is believed where only they could tell."""

    def are_equal(self, a: str, b: str) -> bool:
        return (self.info(a).dtype, self.info(a).shape) == (self.info(b).dtype, self.info(b).shape)

    def is_zero(self, name: str) -> bool:
        return True


def read_source(directory: Path) -> Source:
    """Return what config.json and the headers in a directory tell; where shards are missing, config.json alone.

    Raises DymoeError as compiling does, but for what only weights could tell.
    """
    values = read_config(directory)
    tokenizer = directory / TOKENIZER
    tokenizer_bytes = tokenizer.stat().st_size if tokenizer.is_file() else None
    if _has_weights(directory):
        tensors = CheckpointTensors.open(directory, HeadersOnly)
        nbytes = sum(path.stat().st_size for path in tensors.files.shards)
        return Source(tensors.spec, HEADERS, tensors.trained_bits(), nbytes, tokenizer_bytes)
    read_quantization(directory, values)
    config = Config(text_config(values))
    try:
        spec = family_of(values).spec(config)
    except ValueError as error:  # of a specification whose parts do not fit
        raise DymoeError(f"{directory / CONFIG}: {error}; {REMEDY}") from error
    config.check_read()
    settings = config.values.get("quantization_config")
    trained = TRAINED.get(str(settings.get("quant_method"))) if isinstance(settings, Mapping) else None
    return Source(spec, CONFIGURATION, trained, _indexed_bytes(directory), tokenizer_bytes)


def _has_weights(directory: Path) -> bool:
    """Return whether the shards that the index names are there or, without one, any safetensors file."""
    if not (directory / INDEX).exists():
        return any(directory.glob("*.safetensors"))
    named = read_json(directory / INDEX).get("weight_map")
    return not isinstance(named, dict) or all((directory / str(name)).exists() for name in set(named.values()))


def _indexed_bytes(directory: Path) -> int | None:
    """Return the bytes of all tensors as the index says them, or None if it does not."""
    if not (directory / INDEX).exists():
        return None
    metadata = read_json(directory / INDEX).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(total) if isinstance(total, (int, float)) and total > 0 else None
