"""What can be compiled, from the code itself: families, and the formats in which checkpoints store their weights."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from dymoe_compile.checkpoint.formats import FORMATS
from dymoe_compile.checkpoint.quantization import READERS
from dymoe_compile.families import family_module, supported


@dataclass(frozen=True)
class FamilyEntry:
    """A family: the `model_type` of its config.json, and what it is in one line."""

    model_type: str
    aliases: tuple[str, ...]  # other values of `model_type`
    about: str


@dataclass(frozen=True)
class FormatEntry:
    """A kind of formats of tensors in safetensors files, and what it is in one sentence."""

    name: str
    about: str


def supported_families() -> list[FamilyEntry]:
    """Return all families, sorted by `model_type`."""
    modules = {name: family_module(name) for name in supported()}
    return [
        FamilyEntry(name, tuple(getattr(module, "ALIASES", ())), _first_line(module.__doc__).removesuffix("."))
        for name, module in modules.items()
    ]


def supported_formats() -> list[FormatEntry]:
    """Return all kinds of formats, in the order in which they are tried."""
    modules = [sys.modules[find.__module__] for find in FORMATS]
    return [
        FormatEntry(module.__name__.rpartition(".")[2], _first_line(module.__doc__).split(". ")[0].removesuffix("."))
        for module in modules
    ]


def quant_methods() -> list[str]:
    """Return the values of `quant_method` in config.json that are read."""
    return list(READERS)


def to_json() -> dict[str, Any]:
    """Return all that can be compiled as JSON."""
    return {
        "families": [asdict(family) for family in supported_families()],
        "formats": [asdict(kind) for kind in supported_formats()],
        "quant_methods": quant_methods(),
    }


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
