"""How config.json says that a checkpoint is quantized, and which ways this version reads.

The tensors themselves say most of it. This module reads what they do not, and refuses what `formats` does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dymoe_compile.checkpoint.directory import CONFIG, read_json
from dymoe_compile.families import text_config
from dymoe_runtime.errors import DymoeError

MODELOPT = "hf_quant_config.json"
MODELOPT_ALGORITHMS = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES", "MXFP8"),
    *("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
)
COMPRESSED_FORMATS = (
    *("dense", "float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
GPTQ_BITS = (2, 3, 4, 8)
# quant_method -> its usual name, for those that are not read.
OTHERS = {
    "bitsandbytes": "bitsandbytes",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "hqq": "HQQ",
    "quark": "Quark",
    "quanto": "Quanto",
    "torchao": "torchao",
    "vptq": "VPTQ",
    "gguf": "GGUF",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "none": "a method that 'quant_method' does not name",
}
# The name of a method in config.json, if it is another one than that in `READERS`.
ALIASES = {"intel/auto-round": "auto-round", "modelopt_fp4": "modelopt", "modelopt_mixed": "modelopt"}


@dataclass(frozen=True)
class Quantization:
    """What the configuration says of quantized tensors, beyond what their types and shapes say."""

    method: str = ""  # a key of READERS, or empty if the checkpoint is not quantized
    layout: str = ""  # of `qweight`: gptq or awq
    block: tuple[int, int] = (128, 128)  # rows and columns that share a scale, unless shapes say otherwise
    bits: tuple[int, ...] = (4, 8)  # of packed integers, as far as the tensors leave a choice
    group_size: int = 128  # columns that share a scale, unless shapes say otherwise
    stored_less_one: bool = False  # whether GPTQ stores its zero points less 1
    symmetric: bool = False  # whether all zero points are in the middle


def read_quantization(directory: Path, values: Mapping[str, Any]) -> Quantization:
    """Return how the checkpoint in `directory` is quantized; `values` is its parsed config.json.

    Raises DymoeError for a method or a variant of one that this version does not read.
    """
    settings = _settings(directory, {**values, **text_config(values)})
    if not settings:
        return Quantization()
    method = settings.get("quant_method")
    if method is None and {"group_size", "bits"} <= set(settings):
        _refuse("MLX")
    method = ALIASES.get(str(method).lower(), str(method).lower())
    if method not in READERS:
        _refuse(OTHERS.get(method, f"the method {method[:60]!r}"))
    return replace(READERS[method](settings), method=method)


def _settings(directory: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object that describes the quantization, empty if there is none."""
    for name in ("quantization_config", "compression_config", "quantization"):
        settings = values.get(name)
        if settings is not None and not isinstance(settings, dict):
            raise DymoeError(f"{CONFIG}: '{name}' is {str(settings)[:60]!r}, expected an object")
        if settings:
            return {"quant_method": "compressed-tensors", **settings} if name == "compression_config" else settings
    if (directory / MODELOPT).exists():
        settings = read_json(directory / MODELOPT).get("quantization")
        if isinstance(settings, dict) and settings.get("quant_algo"):
            return {"quant_method": "modelopt", **settings}
    return {}


def _refuse(what: str, found: str = CONFIG) -> NoReturn:
    raise DymoeError(
        f"{found}: the checkpoint is quantized with {what}, which this version does not read; give the unquantized "
        "checkpoint, or one in FP8, MXFP4, NVFP4, AWQ, GPTQ or compressed-tensors"
    )


def _fp8(settings: Mapping[str, Any]) -> Quantization:
    return Quantization(block=_block(settings.get("weight_block_size")))


def _mxfp4(settings: Mapping[str, Any]) -> Quantization:
    return Quantization()


def _block(value: Any) -> tuple[int, int]:
    """Return rows and columns of a block; the usual ones if it is not said."""
    if value is None:
        return Quantization.block
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise DymoeError(f"{CONFIG}: 'weight_block_size' is {str(value)[:60]!r}, expected two whole numbers from 1")
    return value[0], value[1]


def _compressed_tensors(settings: Mapping[str, Any]) -> Quantization:
    groups = settings.get("config_groups") or {}
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    for part in (settings, *groups):
        if (name := part.get("format")) not in (None, *COMPRESSED_FORMATS):
            _refuse(f"the format {str(name)[:60]!r} of compressed-tensors")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        _refuse(f"the sparse format {str(sparsity['format'])[:60]!r} of compressed-tensors")
    transforms = settings.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        _refuse("compressed-tensors and transforms of activations")
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    bits = [part["num_bits"] for part in weights if type(part.get("num_bits")) is int and part.get("type") != "float"]
    blocks = [part["block_structure"] for part in weights if part.get("block_structure")]
    return Quantization(
        block=_block(blocks[0] if blocks else None), bits=tuple(dict.fromkeys(bits)) or Quantization.bits
    )


def _modelopt(settings: Mapping[str, Any]) -> Quantization:
    layers = settings.get("quantized_layers")
    layers = [layer for layer in layers.values() if isinstance(layer, dict)] if isinstance(layers, dict) else []
    for part in (settings, *layers):
        name = str(part.get("quant_algo") or MODELOPT_ALGORITHMS[0])
        if name.upper() not in MODELOPT_ALGORITHMS:
            _refuse(f"the algorithm {name[:60]!r} of ModelOpt")
    return Quantization()


def _awq(settings: Mapping[str, Any]) -> Quantization:
    layout = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    if layout != "gemm":
        _refuse(f"the layout {layout[:60]!r} of AWQ")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        _refuse(f"{str(bits)[:60]} bits of AWQ, not 4")
    return Quantization(layout="awq", group_size=_group_size(settings))


def _gptq(settings: Mapping[str, Any]) -> Quantization:
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        _refuse(f"the layout {layout[:60] if layout != 'gptq' else 'marlin'!r} of GPTQ")
    bits = settings.get("bits", 4)
    if bits not in GPTQ_BITS:
        _refuse(f"{str(bits)[:60]} bits of GPTQ, not one of {', '.join(map(str, GPTQ_BITS))}")
    return Quantization(
        layout="gptq",
        group_size=_group_size(settings),
        stored_less_one=layout == "gptq",
        symmetric=settings.get("sym") is True,
    )


def _auto_round(settings: Mapping[str, Any]) -> Quantization:
    """AutoRound stores what it has found like AutoGPTQ or like AutoAWQ."""
    packing = str(settings.get("packing_format") or settings.get("backend") or "auto_round")
    if packing.endswith("awq"):
        return _awq({**settings, "version": "gemm"})
    if not packing.endswith("auto_gptq"):
        _refuse(f"the packing {packing[:60]!r} of AutoRound")
    return _gptq({**settings, "checkpoint_format": "gptq"})


def _group_size(settings: Mapping[str, Any]) -> int:
    size = settings.get("group_size", settings.get("q_group_size", Quantization.group_size))
    return size if type(size) is int and size > 0 else Quantization.group_size


# quant_method -> what reads its settings.
READERS = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
}
