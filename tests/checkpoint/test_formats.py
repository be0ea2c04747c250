"""Quantized checkpoints: every format against an encoder in plain loops, and against transformers if that has one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.directory import TensorFiles
from dymoe_compile.checkpoint.formats import find
from dymoe_compile.checkpoint.formats.read import read
from dymoe_compile.checkpoint.quantization import Quantization, read_quantization
from dymoe_compile.checkpoint.tensors import CheckpointTensors
from dymoe_runtime.bundle.tensorfile import header_bytes
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.spec import ExpertKey

# A tensor in a file: its type there, and an array of its shape that has its bytes.
Tensor = tuple[str, np.ndarray]
Tensors = dict[str, Tensor]


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    sizes = {name: (dtype, array.shape, array.nbytes) for name, (dtype, array) in tensors.items()}
    path.write_bytes(header_bytes(sizes) + b"".join(array.tobytes() for _, array in tensors.values()))


def open_files(directory: Path, tensors: Mapping[str, Tensor]) -> TensorFiles:
    write(directory / "model.safetensors", tensors)
    return TensorFiles(directory)


def settings(**quantization: Any) -> Quantization:
    """The quantization that a config.json with these settings describes."""
    return read_quantization(Path("nowhere"), {"quantization_config": quantization} if quantization else {})


def bf16(values: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """A tensor in BF16 near `values`, and its values."""
    codes = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return ("BF16", codes), (codes.astype(np.uint32) << 16).view(np.float32)


def f16(values: np.ndarray) -> tuple[Tensor, np.ndarray]:
    return ("F16", values.astype(np.float16)), values.astype(np.float16).astype(np.float32)


def f32(values: np.ndarray) -> tuple[Tensor, np.ndarray]:
    return ("F32", values.astype(np.float32)), values.astype(np.float32)


def e8m0(values: np.ndarray, dtype: str = "U8") -> tuple[Tensor, np.ndarray]:
    """Powers of two near `values`: 2**(code - 127)."""
    codes = np.round(np.log2(values)).astype(int) + 127
    return (dtype, codes.astype(np.uint8)), (2.0 ** (codes - 127)).astype(np.float32)


def minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of a small floating-point number without infinities: sign, exponent, mantissa, highest bit first."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == 0:
        return sign * 2.0 ** (1 - bias) * mantissa / (1 << mantissa_bits)
    return sign * 2.0 ** (exponent - bias) * (1 + mantissa / (1 << mantissa_bits))


E4M3 = np.array([minifloat(code, 4, 3) if code & 127 != 127 else math.nan for code in range(256)], np.float32)
E5M2 = np.array([minifloat(code, 5, 2) if code & 124 != 124 else math.nan for code in range(256)], np.float32)
E2M1 = np.array([minifloat(code, 2, 1) for code in range(16)], np.float32)


def random_e4m3(random: np.random.Generator, *shape: int) -> np.ndarray:
    return (random.integers(0, 127, shape) | random.integers(0, 2, shape) << 7).astype(np.uint8)


def stream(rows: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers [rows, count] as int32 words [rows, count * bits / 32], one stream of bits each, lowest first."""
    words = []
    for row in rows.tolist():
        number = sum(value << (bits * i) for i, value in enumerate(row))
        words.append([number >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return np.array(words, np.uint32).view(np.int32)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """4-bit codes [..., count] as bytes [..., count / 2], the first in the low bits."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def spread(values: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """The value of each weight's block."""
    return np.array([[values[r // block[0], c // block[1]] for c in range(shape[1])] for r in range(shape[0])])


# What a case has: the tensors of the matrix `m.weight`, its values, and the settings in config.json.
Case = tuple[Tensors, np.ndarray, dict[str, Any]]
CASES: dict[str, Callable[[np.random.Generator], Case]] = {}


def case(make: Callable[..., Case], name: str, *args: Any) -> None:
    CASES[name] = lambda random: make(random, *args)


def plain(random: np.random.Generator, encode: Callable[[np.ndarray], tuple[Tensor, np.ndarray]]) -> Case:
    tensor, values = encode(random.normal(size=(5, 7)))
    return {"m.weight": tensor}, values, {}


case(plain, "BF16", bf16)
case(plain, "F16", f16)
case(plain, "F32", f32)
case(plain, "F64", lambda values: (("F64", values), values.astype(np.float32)))


def scaled(
    random: np.random.Generator,
    shape: tuple[int, int],
    scale_shape: tuple[int, ...],
    block: tuple[int, int],
    encode: Callable[[np.ndarray], tuple[Tensor, np.ndarray]],
    name: str,
    dtype: str = "F8_E4M3",
    **quantization: Any,
) -> Case:
    codes = random_e4m3(random, *shape)
    if dtype == "F8_E5M2":
        codes = codes & 0xFB
    scale, values = encode(random.uniform(0.01, 1, scale_shape))
    table = E5M2 if dtype == "F8_E5M2" else E4M3
    grid = [-(-size // per) for size, per in zip(shape, block, strict=True)]
    weights = table[codes] * spread(values.reshape(grid), shape, block).astype(np.float32)
    return {"m.weight": (dtype, codes), name: scale}, weights, quantization or {"quant_method": "fp8"}


INVERSE, SCALE = "m.weight_scale_inv", "m.weight_scale"
FP8: list[tuple[str, Any]] = [
    ("FP8 blocks", ((256, 128), (2, 1), (128, 128), f32, INVERSE)),
    ("FP8 blocks with short edges", ((200, 300), (2, 3), (128, 128), bf16, INVERSE)),
    ("FP8 blocks of MLA", ((144, 130), (2, 2), (128, 128), f32, INVERSE)),
    ("FP8 blocks, powers of two", ((130, 128), (2, 1), (128, 128), e8m0, INVERSE)),
    ("FP8 blocks, E8M0 under another name", ((130, 8), (2, 1), (128, 8), lambda v: e8m0(v, "F8_E8M0"), "m.scale")),
    ("FP8 blocks of ModelOpt", ((130, 260), (2, 1, 3, 1), (128, 128), f32, SCALE)),
    ("FP8 by channel", ((9, 16), (9, 1), (1, 16), bf16, SCALE)),
    ("FP8 by channel, a vector", ((9, 16), (9,), (1, 16), f32, SCALE)),
    ("FP8 by tensor", ((9, 16), (1,), (9, 16), f32, SCALE)),
    ("FP8 by tensor, a number", ((9, 16), (), (9, 16), f32, SCALE)),
    ("FP8 halves of a short matrix", ((96, 48), (2, 1), (48, 48), f32, INVERSE)),
    ("E5M2", ((9, 16), (), (9, 16), f32, SCALE, "F8_E5M2")),
    ("MXFP8", ((3, 64), (3, 2), (1, 32), e8m0, SCALE)),
]
for _name, _args in FP8:
    case(scaled, _name, *_args)


def blocks_of_32(random: np.random.Generator) -> Case:
    tensors, weights, _ = scaled(random, (70, 40), (3, 2), (32, 32), f32, INVERSE)
    return tensors, weights, {"quant_method": "fp8", "weight_block_size": [32, 32]}


case(blocks_of_32, "FP8 blocks of another size")


def int8(random: np.random.Generator, zeros: bool) -> Case:
    codes = random.integers(-128, 128, (6, 10)).astype(np.int8)
    scale, values = bf16(random.uniform(0.01, 1, (6, 1)))
    zero = random.integers(-9, 9, (6, 1)).astype(np.int8) * zeros
    tensors = {"m.weight": ("I8", codes), SCALE: scale, **({"m.weight_zero_point": ("I8", zero)} if zeros else {})}
    weights = (codes.astype(np.float32) - zero) * values
    return tensors, weights, {"quant_method": "compressed-tensors", "format": "int-quantized"}


case(int8, "int8", False)
case(int8, "int8 with zero points", True)


def mxfp4(random: np.random.Generator, name: str) -> Case:
    codes = random.integers(0, 16, (5, 64))
    scale, values = e8m0(random.uniform(0.01, 4, (5, 2)))
    weights = E2M1[codes] * spread(values, (5, 64), (1, 32)).astype(np.float32)
    return {name: ("U8", nibbles(codes)), SCALE: scale}, weights, {"quant_method": "compressed-tensors"}


case(mxfp4, "MXFP4 packed", "m.weight_packed")
case(mxfp4, "MXFP4 of ModelOpt", "m.weight")


def nvfp4(random: np.random.Generator, modelopt: bool) -> Case:
    codes, scales = random.integers(0, 16, (5, 48)), random.integers(1, 127, (5, 3)).astype(np.uint8)
    second = np.array([0.037 if modelopt else 27.3], np.float32)
    values = E4M3[scales] * second if modelopt else E4M3[scales] / second
    weights = E2M1[codes] * spread(values, (5, 48), (1, 16)).astype(np.float32)
    names = ("m.weight", "m.weight_scale_2") if modelopt else ("m.weight_packed", "m.weight_global_scale")
    tensors = {names[0]: ("U8", nibbles(codes)), SCALE: ("F8_E4M3", scales), names[1]: ("F32", second)}
    method = {"quant_method": "modelopt", "quant_algo": "NVFP4"} if modelopt else {"quant_method": "compressed-tensors"}
    return tensors, weights, method


case(nvfp4, "NVFP4 packed", False)
case(nvfp4, "NVFP4 of ModelOpt", True)


def packed(
    random: np.random.Generator, shape: tuple[int, int], bits: int, groups: int, zeros: bool, order: bool = False
) -> Case:
    rows, cols = shape
    numbers = random.integers(0, 1 << bits, shape)
    scale, scales = bf16(random.uniform(0.01, 1, (rows, groups)))
    zero = random.integers(0, 1 << bits, (rows, groups)) if zeros else np.full((rows, groups), 1 << (bits - 1))
    group = np.arange(cols) * groups // cols
    group = random.permutation(group) if order else group
    tensors: Tensors = {
        "m.weight_packed": ("I32", stream(numbers, bits)),
        "m.weight_scale": scale,
        "m.weight_shape": ("I64", np.array(shape, np.int64)),
    }
    if zeros:
        tensors["m.weight_zero_point"] = ("I32", np.ascontiguousarray(stream(zero.T, bits).T))
    if order:
        tensors["m.weight_g_idx"] = ("I32", group.astype(np.int32))
    weights = (numbers - zero[:, group]).astype(np.float32) * scales[:, group]
    quantization = {"config_groups": {"group_0": {"weights": {"num_bits": bits, "type": "int"}}}}
    return tensors, weights, {"quant_method": "compressed-tensors", "format": "pack-quantized", **quantization}


PACKED: list[tuple[str, Any]] = [
    ("int4 packed, groups", ((6, 64), 4, 2, False)),
    ("int4 packed, channels", ((6, 40), 4, 1, False)),
    ("int4 packed, zero points", ((20, 64), 4, 2, True)),
    ("int4 packed, columns that do not fill a word", ((6, 36), 4, 1, True)),
    ("int4 packed, groups in another order", ((6, 64), 4, 2, True, True)),
    ("int8 packed", ((6, 64), 8, 2, True)),
    ("int3 packed", ((6, 96), 3, 3, True)),
]
for _name, _args in PACKED:
    case(packed, _name, *_args)


def gptq(random: np.random.Generator, bits: int, groups: int, version: int, act_order: bool, with_index: bool) -> Case:
    rows, cols = 32, 96
    numbers = random.integers(0, 1 << bits, (rows, cols))
    zero = random.integers(0, 1 << bits, (rows, groups))
    scale, scales = f16(random.uniform(0.01, 1, (rows, groups)))
    group = np.arange(cols) * groups // cols
    group = random.permutation(group) if act_order else group
    stored = (zero - 1) % (1 << bits) if version == 1 else zero
    tensors: Tensors = {
        "m.qweight": ("I32", np.ascontiguousarray(stream(numbers, bits).T)),
        "m.qzeros": ("I32", stream(stored.T, bits)),
        "m.scales": (scale[0], np.ascontiguousarray(scale[1].T)),
    }
    if with_index:
        tensors["m.g_idx"] = ("I32", group.astype(np.int32))
    weights = (numbers - zero[:, group]).astype(np.float32) * scales[:, group]
    layout = {1: "gptq", 2: "gptq_v2"}[version]
    size = cols // groups
    return tensors, weights, {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": layout}


GPTQ: list[tuple[str, Any]] = [
    ("GPTQ 4 bits", (4, 3, 1, False, True)),
    ("GPTQ 4 bits without an index", (4, 3, 1, False, False)),
    ("GPTQ 4 bits, version 2", (4, 3, 2, False, True)),
    ("GPTQ 4 bits in the order of activations", (4, 3, 1, True, True)),
    ("GPTQ 8 bits", (8, 1, 1, False, True)),
    ("GPTQ 3 bits", (3, 3, 1, True, True)),
    ("GPTQ 2 bits", (2, 3, 1, False, False)),
]
for _name, _args in GPTQ:
    case(gptq, _name, *_args)


def awq(random: np.random.Generator) -> Case:
    rows, cols, groups = 16, 12, 3
    numbers, zero = random.integers(0, 16, (rows, cols)), random.integers(0, 16, (rows, groups))
    scale, scales = f16(random.uniform(0.01, 1, (rows, groups)))
    order = [8 * word + i for word in range(rows // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    tensors: Tensors = {
        "m.qweight": ("I32", stream(numbers.T[:, order], 4)),
        "m.qzeros": ("I32", stream(zero.T[:, order], 4)),
        "m.scales": (scale[0], np.ascontiguousarray(scale[1].T)),
    }
    group = np.arange(cols) * groups // cols
    weights = (numbers - zero[:, group]).astype(np.float32) * scales[:, group]
    return tensors, weights, {"quant_method": "awq", "bits": 4, "group_size": 4, "version": "gemm"}


case(awq, "AWQ")


@pytest.mark.parametrize("name", CASES)
def test_a_format_reads_exactly(name: str, tmp_path: Path) -> None:
    tensors, expected, quantization = CASES[name](np.random.default_rng(len(name)))
    files = open_files(tmp_path, tensors)
    stored = find("m.weight", expected.shape, files, settings(**quantization))
    assert stored is not None and stored.shape == expected.shape
    assert set(stored.parts.values()) == set(tensors)
    weights = read(files, stored)
    assert np.array_equal(weights.float().numpy(), expected.astype(np.float32))
    assert weights.dtype == (torch.float32 if quantization or name in ("F32", "F64") else weights.dtype)


def test_the_small_floats_of_the_tests_are_those_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for table, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        theirs = codes.view(dtype).float().numpy()
        assert np.array_equal(table, np.where(np.isinf(theirs), np.nan, theirs), equal_nan=True)
    assert E2M1.tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_mxfp4_reads_as_transformers_reads_it(tmp_path: Path) -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 10, 2, 16)).astype(np.uint8)
    scales = random.integers(90, 140, (3, 10, 2)).astype(np.uint8)
    files = open_files(tmp_path, {"m.down_proj_blocks": ("U8", blocks), "m.down_proj_scales": ("U8", scales)})
    stored = find("m.down_proj", (3, 10, 64), files, settings(quant_method="mxfp4"))
    assert stored is not None and stored.shape == (3, 10, 64) and stored.trained_bits == 4
    expected = theirs(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)  # [3, 64, 10]
    for expert in range(3):
        assert torch.equal(read(files, stored, expert), expected[expert].T)


@pytest.mark.parametrize("encode", [f32, bf16, e8m0])
def test_fp8_reads_as_transformers_reads_it(encode: Callable[..., Any], tmp_path: Path) -> None:
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(theirs.Fp8Dequantize, "_dequantize_one"):
        pytest.skip("this version of transformers has no such function")
    random = np.random.default_rng(1)
    codes = random_e4m3(random, 2, 256, 128)
    scale, _ = encode(random.uniform(0.01, 1, (2, 2, 1)))
    files = open_files(tmp_path, {"m.gate_up_proj": ("F8_E4M3", codes), "m.gate_up_proj_scale_inv": scale})
    stored = find("m.gate_up_proj", codes.shape, files, settings(quant_method="fp8"))
    assert stored is not None and stored.shape == codes.shape
    for expert in range(2):
        weights = torch.from_numpy(codes[expert]).view(torch.float8_e4m3fn)
        scales = torch.from_numpy(scale[1][expert].copy())
        scales = scales.view(torch.bfloat16) if scale[0] == "BF16" else scales
        expected = theirs.Fp8Dequantize(None)._dequantize_one(weights, scales, torch.float32)
        assert torch.equal(read(files, stored, expert), expected)


def without(tensors: Tensors, name: str) -> Tensors:
    return {each: tensor for each, tensor in tensors.items() if each != name}


def with_tensor(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


NAN = np.array([[math.nan] + [1.0] * 2] * 2, np.float32)
FAULTS: list[tuple[str, Callable[[Tensors], Tensors], tuple[str, ...]]] = [
    ("FP8 blocks", lambda t: without(t, INVERSE), ("m.weight_scale_inv is missing", "m.weight needs")),
    ("FP8 blocks", with_tensor(INVERSE, f32(np.ones((3, 2)))[0]), ("m.weight_scale_inv", "[3, 2]", "[256, 128]")),
    ("FP8 blocks with short edges", with_tensor(INVERSE, ("F32", NAN)), ("m.weight_scale_inv holds NaN",)),
    ("FP8 by channel", with_tensor(SCALE, ("I32", np.ones((9, 1), np.int32))), ("m.weight_scale is I32",)),
    ("FP8 by tensor", with_tensor("m.weight", ("F8_E4M3", np.full((9, 16), 127, np.uint8))), ("m.weight holds NaN",)),
    ("MXFP8", with_tensor(SCALE, ("U8", np.full((3, 2), 255, np.uint8))), ("m.weight holds NaN",)),
    ("NVFP4 packed", lambda t: without(t, "m.weight_global_scale"), ("m.weight_global_scale is missing",)),
    ("NVFP4 of ModelOpt", lambda t: without(t, "m.weight_scale_2"), ("m.weight_scale_2 is missing",)),
    ("NVFP4 packed", with_tensor(SCALE, ("F8_E4M3", np.ones((5, 2), np.uint8))), ("[5, 2]", "[5, 3]")),
    ("MXFP4 packed", lambda t: without(t, SCALE), ("m.weight_scale is missing",)),
    ("int4 packed, groups", lambda t: without(t, "m.weight_shape"), ("m.weight_shape is missing",)),
    ("int4 packed, groups", with_tensor("m.weight_shape", ("I64", np.array([6, 60]))), ("[6, 60]", "[6, 64]")),
    ("int4 packed, groups", with_tensor(SCALE, f32(np.ones((6, 3)))[0]), ("m.weight_scale", "[6, 3]")),
    ("GPTQ 4 bits", lambda t: without(t, "m.qzeros"), ("m.qzeros is missing", "quantized")),
    ("GPTQ 4 bits", lambda t: without(t, "m.scales"), ("m.scales is missing",)),
    ("GPTQ 4 bits", with_tensor("m.g_idx", ("I32", np.full(96, 7, np.int32))), ("m.g_idx", "do not exist")),
    ("GPTQ 4 bits", with_tensor("m.qzeros", ("I32", np.ones((3, 5), np.int32))), ("m.qzeros", "[3, 5]")),
    ("AWQ", with_tensor("m.scales", f16(np.ones((5, 16)))[0]), ("m.qzeros", "[3, 2]", "[5,")),
]


@pytest.mark.parametrize(("name", "change", "words"), FAULTS, ids=[f"{name}: {words[0]}" for name, _, words in FAULTS])
def test_a_damaged_quantized_matrix_gets_one_sentence(
    name: str, change: Callable[[Tensors], Tensors], words: tuple[str, ...], tmp_path: Path
) -> None:
    tensors, expected, quantization = CASES[name](np.random.default_rng(0))
    files = open_files(tmp_path, change(tensors))
    with pytest.raises(DymoeError) as error:
        stored = find("m.weight", expected.shape, files, settings(**quantization))
        assert stored is not None
        read(files, stored)
    assert all(word in str(error.value) for word in words), error.value


def test_zero_points_that_contradict_the_symmetry_of_gptq_are_refused(tmp_path: Path) -> None:
    """One that is off by 1 says that the zero points are those of another version."""
    tensors, expected, quantization = gptq(np.random.default_rng(0), 4, 3, 2, False, False)
    for stored_zero, layout in ((7, "gptq"), (8, "gptq_v2"), (8, "gptq"), (7, "gptq_v2")):
        tensors["m.qzeros"] = ("I32", stream(np.full((3, 32), stored_zero), 4))
        files = open_files(tmp_path, tensors)
        config = settings(**{**quantization, "sym": True, "checkpoint_format": layout})
        stored = find("m.weight", expected.shape, files, config)
        assert stored is not None
        if (stored_zero == 7) == (layout == "gptq"):
            read(files, stored)
            continue
        with pytest.raises(DymoeError, match=r"m.qzeros has other zero points than 8"):
            read(files, stored)


def test_a_quantized_matrix_needs_a_configuration_that_says_so(tmp_path: Path) -> None:
    tensors, expected, _ = CASES["AWQ"](np.random.default_rng(0))
    with pytest.raises(DymoeError, match=r"m.qweight is quantized, but config.json does not say"):
        find("m.weight", expected.shape, open_files(tmp_path, tensors), Quantization())


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    ({"quantization_config": {"quant_method": "aqlm"}}, "AQLM"),
    ({"quantization_config": {"quant_method": "quark"}}, "Quark"),
    ({"quantization_config": {"quant_method": "a new one"}}, "'a new one'"),
    ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
    ({"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}, "text_config": {}}, "MLX"),
    ({"text_config": {"quantization_config": {"quant_method": "eetq"}}}, "EETQ"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 5}}, "5 bits of GPTQ"),
    ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}}, "'marlin' of GPTQ"),
    ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "'gemv' of AWQ"),
    ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "8 bits of AWQ"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}}, "'W4A8_AWQ' of ModelOpt"),
    (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}},
        "'marlin-24' of compressed-tensors",
    ),
    (
        {"compression_config": {"transform_config": {"config_groups": {"a": 1}}}},
        "transforms",
    ),
    ({"quantization_config": {"quant_method": "auto-round", "packing_format": "auto_round:ark"}}, "AutoRound"),
]


@pytest.mark.parametrize(("values", "word"), UNSUPPORTED, ids=[word for _, word in UNSUPPORTED])
def test_a_quantization_that_is_not_read_is_named(values: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match="give the unquantized checkpoint") as error:
        read_quantization(tmp_path, values)
    assert word in str(error.value)


def test_modelopt_may_describe_itself_in_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}))
    assert read_quantization(tmp_path, {}).method == "modelopt"
    path.write_text(json.dumps({"quantization": {"quant_algo": "W4A16_AWQ"}}))
    with pytest.raises(DymoeError, match="W4A16_AWQ"):
        read_quantization(tmp_path, {})


@pytest.mark.parametrize("value", ["fp8", 8, [8]])
def test_a_malformed_quantization_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(DymoeError, match="quantization_config"):
        read_quantization(tmp_path, {"quantization_config": value})


def quantize(
    directory: Path, change: Callable[[str, np.ndarray], Tensors], quantization: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Rewrite the matrices of a checkpoint; return the tensors before."""
    before = {name: tensor.numpy().copy() for name, tensor in load_file(directory / "model.safetensors").items()}
    after: Tensors = {}
    for name, array in before.items():
        after.update(change(name, array) if name.endswith("proj.weight") else {name: ("F32", array)})
    write(directory / "model.safetensors", after)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "quantization_config": dict(quantization)}))
    return before


def to_fp8(name: str, array: np.ndarray) -> Tensors:
    """FP8 in blocks of 32 x 32, and a scale of activations."""
    base = name.removesuffix(".weight")
    grid = tuple(-(-size // 32) for size in array.shape)
    blocks = [[array[32 * r :, 32 * c :][:32, :32] for c in range(grid[1])] for r in range(grid[0])]
    scale = np.array([[np.abs(block).max() / 448 for block in row] for row in blocks], np.float32)
    codes = torch.from_numpy(array / spread(scale, array.shape, (32, 32)).astype(np.float32)).to(torch.float8_e4m3fn)
    return {
        name: ("F8_E4M3", codes.view(torch.uint8).numpy()),
        f"{name}_scale_inv": ("F32", scale),
        f"{base}.input_scale": ("F32", np.ones(1, np.float32)),
    }


def test_an_fp8_checkpoint_reads_as_its_values(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    before = quantize(tmp_path, to_fp8, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    checkpoint = Checkpoint.open(tmp_path)
    matrices = sum(name.endswith("proj.weight") for name in before)
    assert checkpoint.left_out == {"scales of activations": matrices} and checkpoint.trained_bits() is None
    q = checkpoint.tensor("layers.1.attn.q")
    original = before["model.layers.1.self_attn.q_proj.weight"]
    assert q.dtype == torch.float32 and np.abs(q.numpy() - original).max() < np.abs(original).max() / 14
    expert = checkpoint.expert(ExpertKey(2, 5))
    for theirs, ours in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
        original = before[f"model.layers.2.mlp.experts.5.{theirs}.weight"]
        assert 0 < np.abs(expert[ours].numpy() - original).max() < np.abs(original).max() / 14


def test_gpt_oss_reads_as_its_values(tmp_path: Path) -> None:
    """Its stacks are transposed, unless they are in MXFP4; where down is square, only gate and up show it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    )
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors: Tensors = {name: ("F32", tensor.numpy().copy()) for name, tensor in load_file(path).items()}
    random = np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}
    for name, (_, array) in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, cols, rows = array.shape
            codes = random.integers(0, 16, (experts, rows, cols // 32, 32))
            scale, values = e8m0(random.uniform(0.01, 4, codes.shape[:3]))
            del tensors[name]
            tensors |= {f"{name}_blocks": ("U8", nibbles(codes)), f"{name}_scales": scale}
            expected[name] = (E2M1[codes] * values[..., None]).reshape(experts, rows, cols)
    write(path, tensors)
    values = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": quantization}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.trained_bits() == 4 and checkpoint.left_out == {}
    expert = checkpoint.expert(ExpertKey(1, 3))
    gate_up, down = (expected[f"model.layers.1.mlp.experts.{name}_proj"][3] for name in ("gate_up", "down"))
    biases = tensors["model.layers.1.mlp.experts.gate_up_proj_bias"][1][3]
    for name, rows in (("gate", gate_up[::2]), ("up", gate_up[1::2]), ("down", down)):
        assert np.array_equal(expert[name].numpy(), rows)
    assert np.array_equal(expert["gate_bias"].numpy(), biases[::2])
    assert np.array_equal(expert["up_bias"].numpy(), biases[1::2])
    assert expert["down_bias"].shape == (64,) and expert["down_bias"].dtype == torch.float32


def test_biases_that_gptq_adds_are_left_out_if_they_are_zero(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False, hidden_size=64, moe_intermediate_size=32)

    def change(name: str, array: np.ndarray, bias: float = 0.0) -> Tensors:
        base = name.removesuffix(".weight")
        rows, cols = array.shape
        tensors = {
            f"{base}.qweight": ("I32", stream(np.full((cols, rows), 8).T, 4).T.copy()),
            f"{base}.qzeros": ("I32", stream(np.full((1, rows), 7), 4)),
            f"{base}.scales": ("F16", np.ones((1, rows), np.float16)),
        }
        return {**tensors, **({f"{base}.bias": ("F16", np.full(rows, bias, np.float16))} if "q_proj" in name else {})}

    quantize(tmp_path, change, {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.left_out == {"biases that are zero": 3} and not checkpoint.tensor("layers.0.attn.q").any()
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False, hidden_size=64, moe_intermediate_size=32)
    quantize(tmp_path, lambda name, array: change(name, array, 0.5), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(DymoeError, match=r"q_proj.bias has no place"):
        CheckpointTensors.open(tmp_path)


WITHOUT_TORCH = """
import sys
from dymoe_compile.checkpoint.tensors import CheckpointTensors
CheckpointTensors.open(sys.argv[1])
sys.exit("torch" in sys.modules)
"""


def test_a_quantized_checkpoint_is_checked_without_torch(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    quantize(tmp_path, to_fp8, {"quant_method": "fp8"})
    assert subprocess.run([sys.executable, "-c", WITHOUT_TORCH, tmp_path]).returncode == 0
