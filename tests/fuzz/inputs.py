"""Sound inputs that a campaign damages: checkpoints of several families and formats, bundles, and what runs write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from families.cases import CASES
from families.harness import random_model
from helpers import EXAMPLES, save_byte_tokenizer, save_tiny
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from fuzz.campaign import Server

GENERATE = ("--prompt", "The river", "--max-tokens", "6", "--ignore-eos", "--threads", "1", "--context", "64")
SMALL = ("--arena", "50000")
CHAT = ("--chat", *GENERATE)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "moe_intermediate_size": 32, "num_experts": 4, "head_dim": 8}
Tensors = dict[str, torch.Tensor]


def plain(folder: Path) -> Path:
    """The smallest one, whose chat template is in tokenizer_config.json."""
    save_tiny(folder, "qwen3_moe", vocab_size=256, **SIZES)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


def of_family(family: str) -> Callable[[Path], Path]:
    """The function that saves a tiny checkpoint of the first case of a family, with all files that one can have."""
    case = next(case for case in CASES if case.family == family)

    def save(folder: Path) -> Path:
        random_model(case, vocab_size=256).save_pretrained(folder, max_shard_size="60KB")
        save_byte_tokenizer(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        generation = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "eos_token_id": [0]}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        special = {"bos_token": {"content": "!", "lstrip": False}, "pad_token": "!"}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        (folder / "added_tokens.json").write_text(json.dumps({"!": 0}))
        return folder

    return save


def quantized(method: dict[str, Any], encode: Callable[[str, torch.Tensor], Tensors]) -> Callable[[Path], Path]:
    """The function that saves the plain checkpoint with the matrices of its experts in another format."""

    def save(folder: Path) -> Path:
        plain(folder)
        path, tensors = folder / "model.safetensors", {}
        for name, tensor in load_file(path).items():
            tensors |= encode(name, tensor) if ".experts." in name else {name: tensor}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
        return folder

    return save


def fp8(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def mxfp4(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    stem = name.removesuffix("weight")
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    return {f"{stem}weight_packed": codes, f"{stem}weight_scale": torch.full((rows, columns // 32), 124).byte()}


def awq(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    stem = name.removesuffix("weight")
    codes = torch.randint(-(1 << 31), 1 << 31, (columns, rows // 8), dtype=torch.int32)
    zeros = torch.randint(-(1 << 31), 1 << 31, (columns // 16, rows // 8), dtype=torch.int32)
    return {
        f"{stem}qweight": codes,
        f"{stem}qzeros": zeros,
        f"{stem}scales": torch.full((columns // 16, rows), 0.02, dtype=torch.float16),
    }


def modelopt(folder: Path) -> Path:
    """FP8 whose method is in a file of its own."""
    quantized({"quant_method": "modelopt"}, fp8)(folder)
    kept = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(kept))
    return folder


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "plain": plain,
    "FP8": quantized({"quant_method": "fp8"}, fp8),
    "ModelOpt": modelopt,
    "MXFP4": quantized({"quant_method": "compressed-tensors"}, mxfp4),
    "AWQ": quantized({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq),
    **{family: of_family(family) for family in dict.fromkeys(case.family for case in CASES)},
}
# Those of which bundles are damaged: the smallest, gated delta rules with shared experts, and one with most options.
BUNDLES = ("plain", "qwen3_next", "gpt_oss")


class Inputs:
    """Sound inputs in a folder, made once they are asked for."""

    def __init__(self, folder: Path, made: Server) -> None:
        self._folder, self._server = folder, made
        self.checkpoint = lru_cache(maxsize=None)(self._checkpoint)
        self.bundle = lru_cache(maxsize=None)(self._bundle)

    def _checkpoint(self, name: str) -> Path:
        return CHECKPOINTS[name](self._folder / f"{name}.model")

    def _bundle(self, name: str) -> Path:
        bundle = self._folder / f"{name}.dymoe"
        run = self._server.run("dymoe-compile", self.checkpoint(name), "-o", bundle, *self.calibration)
        assert run.code == 0, run.err
        return bundle

    @cached_property
    def text(self) -> Path:
        """A text as short as calibration allows."""
        path = self._folder / "text.txt"
        path.write_text((EXAMPLES / "calibration" / "wiki.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
        return path

    @property
    def calibration(self) -> tuple[object, ...]:
        """Flags of dymoe-compile."""
        return ("--calibration", self.text, "--calibration-tokens", 512, "--jobs", 1)

    @cached_property
    def others(self) -> dict[str, Path]:
        """A trace, decisions, a warm set, a session, a profile and texts."""
        names = ("trace.jsonl", "decisions.jsonl", "warm.json", "session", "profile.toml", "calibration.jsonl", "text")
        paths = {name: self._folder / name for name in names}
        bundle = self.bundle("plain")
        args = (*SMALL, "--trace", paths["trace.jsonl"], "--warm-set", paths["warm.json"])
        for flags in ((*GENERATE, *args), (*CHAT, "--session", paths["session"])):
            run = self._server.run("dymoe-run", bundle, *flags)
            assert run.code == 0, run.err
        shutil.copy(paths["trace.jsonl"], paths["decisions.jsonl"])
        shutil.copy(Path(__file__).parents[2] / "profiles" / "laptop-8gb.toml", paths["profile.toml"])
        paths["text"].write_text("The river flows.\n")
        line = json.dumps({"text": self.text.read_text(encoding="utf-8")})
        paths["calibration.jsonl"].write_text(f"{line}\n{line}\n")
        return paths
