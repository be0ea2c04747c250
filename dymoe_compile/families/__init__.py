"""Model families: one file per Hugging Face architecture. The file name is its `model_type`.

Packages group them: by how their routers turn logits into scores, and `recurrent` has those with layers that keep a
state. A family module has two functions, and may have `ALIASES`, other values of `model_type` that it takes:

    spec(config) -> ModelSpec                 the model that a config.json describes
    names(spec) -> Names                      DyMoE tensor names -> tensors of a checkpoint

The package `parts` has what families are made of.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from dymoe_compile.families.parts.config import Config
from dymoe_compile.families.parts.names import Names
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ModelSpec

PARTS = "parts"
# Where a configuration of several modalities keeps that of its language model.
TEXT_CONFIGS = (("text_config",), ("thinker_config", "text_config"), ("language_config",), ("llm_config",))
# Keys of the whole configuration that hold for its language model, whatever that says itself; of two, the inner one's.
WHOLE = ("tie_word_embeddings", "eos_token_id", "quantization_config")


class Family(Protocol):
    """A family module."""

    def spec(self, config: Config) -> ModelSpec:
        """Return the model that `config` describes."""

    def names(self, spec: ModelSpec) -> Names:
        """Return the sources of the tensors of a model."""


def supported() -> list[str]:
    """Return the `model_type` of every family, sorted."""
    return sorted(_places())


def aliases() -> dict[str, str]:
    """Return other values of `model_type` -> the family that takes each of them."""
    return {alias: name for name in supported() for alias in getattr(family_module(name), "ALIASES", ())}


def family_module(name: str) -> ModuleType:
    """Return the module of the family `name`; raise KeyError if it is none of `supported()`."""
    return importlib.import_module(_places()[name])


def text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the language model in a parsed config.json."""
    for path in TEXT_CONFIGS:
        inner: Any = values
        whole: dict[str, Any] = {}
        for name in path:
            whole |= {key: inner[key] for key in WHOLE if inner.get(key) is not None}
            inner = inner.get(name)
            if not isinstance(inner, Mapping):
                break
        else:
            return {**inner, **whole, "model_type": inner.get("model_type") or values.get("model_type")}
    return values


def family_of(values: Mapping[str, Any]) -> Family:
    """Return the family for a parsed config.json, by its own `model_type` or by that of its language model.

    Raises DymoeError if none is supported, or if both are, but by different families.
    """
    types = [values.get("model_type"), text_config(values).get("model_type")]
    outer, inner = map(_family_name, types)
    if outer is not None and inner != outer:
        raise DymoeError(
            f"config.json: model_type '{types[0]}' with a language model of model_type '{str(types[1])[:60]}' is not "
            "supported"
        )
    if inner is not None:
        return cast(Family, family_module(inner))
    model_type = str(next((name for name in types if name), ""))[:60]
    if not model_type:
        raise DymoeError(f"config.json: 'model_type' is missing; supported are {', '.join(supported())}")
    near = get_close_matches(model_type, supported(), 3, 0.5)
    raise DymoeError(
        f"config.json: model_type '{model_type}' is not supported; "
        + (f"the nearest supported ones are {', '.join(near)}; " if near else "")
        + "dymoe-compile --supported lists all, docs/adding-a-family.md says how to add one"
    )


def _family_name(model_type: object) -> str | None:
    """Return the family that takes `model_type`, or None."""
    name = aliases().get(model_type, model_type) if isinstance(model_type, str) else None
    return name if name in _places() else None


@cache
def _places() -> dict[str, str]:
    """Return family -> name of its module, which is in a package beside `parts`."""
    packages = [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg and module.name != PARTS]
    return {
        module.name: f"{__name__}.{package}.{module.name}"
        for package in packages
        for module in pkgutil.iter_modules([str(Path(__path__[0]) / package)])
    }
