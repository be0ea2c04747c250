"""Make the tables of README.md: families that can be compiled, and what well-known models need.

    python benchmarks/models/table.py --rate 2.2e6            # print both
    python benchmarks/models/table.py --rate 2.2e6 --write    # put them into README.md

Nothing here is measured but the rate: how many weights of experts dymoe-compile gets through in a second. All sizes
come from the shape of a model, by the functions that compile and run it. A checkpoint counts with the language model
alone; repositories also hold vision towers and layers that predict further tokens, which are a few percent more.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dymoe_compile.catalogue import supported_families, supported_formats
from dymoe_compile.families import family_of, text_config
from dymoe_compile.families.parts.config import Config
from dymoe_compile.job.profile import DEVICE_PROCESS_BYTES
from dymoe_compile.plan.sizes import alike, planned_bundle, total_bytes
from dymoe_runtime.bundle.bundle import Bundle, dense_kind, expert_layout
from dymoe_runtime.bundle.tiers import grid_for
from dymoe_runtime.engine.load import DEFAULT_CONTEXT
from dymoe_runtime.engine.memory_plan import plan_budget
from dymoe_runtime.kernels import REFERENCE, load_kernels
from dymoe_runtime.spec import ModelSpec

README = Path(__file__).parents[2] / "README.md"
LADDERS = ((2, 3), (2, 3, 4), (2, 4, 6))
DEFAULT_LADDER = (2, 3, 4)
# Bits of all other weights: of a bundle as it is usually made, and the fewest that a small device gets.
DENSE_BITS, FEWEST_DENSE_BITS = 8, 4
# Bits of experts with which a model is called comfortable if all of them fit the memory: the usual point's mean.
COMFORTABLE_TIER = 3
FP8_BLOCK = 128  # rows and columns that share a float32 scale


@dataclass(frozen=True)
class Model:
    """A well-known model: what its config.json says of its shape, and how its maker stores the weights."""

    name: str
    config: Mapping[str, Any]
    stored: str = "bf16"  # or fp8, mxfp4
    quoted: float = 0.0  # weights, in units of 1e9, that its maker says it has: a check of the figures above

    @property
    def spec(self) -> ModelSpec:
        """Return the specification that the family makes of the configuration."""
        config = Config(text_config(self.config))
        spec = family_of(self.config).spec(config)
        config.check_read()
        return spec

    def compiled(self, ladder: tuple[int, ...]) -> ModelSpec:
        """Return the specification in a bundle with this ladder; experts stored in MXFP4 keep their codes in 4 bits."""
        return replace(self.spec, expert_grid=grid_for(ladder, 4 if self.stored == "mxfp4" else None))


FULL, SLIDING = "full_attention", "sliding_attention"
MODELS = (
    # Defaults of transformers' OlmoeConfig, but with the width of experts that gives its 6.9e9 weights.
    Model(
        "OLMoE-1B-7B",
        {
            "model_type": "olmoe",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
        },
        quoted=6.9,
    ),
    # Defaults of GptOssConfig are those of gpt-oss-120b; this one has fewer layers and experts.
    Model(
        "gpt-oss-20b",
        {
            "model_type": "gpt_oss",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "max_position_embeddings": 131072,
        },
        stored="mxfp4",
        quoted=20.9,
    ),
    # Copies of its config.json in public repositories agree; the sum is what its maker says without the vision tower.
    Model(
        "Gemma-4-26B-A4B",
        {
            "model_type": "gemma4_text",
            "vocab_size": 262144,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "num_hidden_layers": 30,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
            "final_logit_softcapping": 30.0,
            "hidden_size_per_layer_input": 0,
            "layer_types": [*[SLIDING] * 5, FULL] * 5,
        },
        quoted=25.2,
    ),
    # Defaults of Qwen3MoeConfig, with twice the layers.
    Model(
        "Qwen3-30B-A3B",
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
        quoted=30.5,
    ),
    # Defaults of Qwen3_5MoeTextConfig.
    Model(
        "Qwen3.6-35B-A3B",
        {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": 248320,
            "hidden_size": 2048,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 262144,
        },
        quoted=35,
    ),
    # Defaults of MixtralConfig.
    Model(
        "Mixtral-8x7B",
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
        },
        quoted=46.7,
    ),
    # Defaults of Qwen3NextConfig.
    Model(
        "Qwen3-Next-80B-A3B",
        {
            "model_type": "qwen3_next",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "max_position_embeddings": 262144,
        },
        quoted=80,
    ),
    # Defaults of Glm4MoeConfig; its heads have 128 columns.
    Model(
        "GLM-4.5-Air",
        {
            "model_type": "glm4_moe",
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 131072,
        },
        quoted=106,
    ),
    # Defaults of GptOssConfig.
    Model(
        "gpt-oss-120b",
        {
            "model_type": "gpt_oss",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "max_position_embeddings": 131072,
        },
        stored="mxfp4",
        quoted=116.8,
    ),
    # Defaults of MiniMaxM2Config.
    Model(
        "MiniMax-M2",
        {
            "model_type": "minimax_m2",
            "vocab_size": 200064,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_hidden_layers": 62,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rotary_dim": 64,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 196608,
        },
        stored="fp8",
        quoted=230,
    ),
)


def main() -> None:
    """Print the tables as Markdown, or write them between their marks in README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, required=True, help="weights of experts compiled in a second, measured")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    tables = {"families": families_table(), "formats": formats_table(), "models": models_table(args.rate)}
    if args.write:
        README.write_text(replaced(README.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        print("\n\n".join(tables.values()))


def replaced(text: str, tables: Mapping[str, str]) -> str:
    """Return `text` with each table between its two marks."""
    for name, table in tables.items():
        marks = re.search(rf"<!-- {name}:.*? -->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
        if marks is None:
            raise SystemExit(f"README.md has no marks for the table '{name}'")
        text = text[: marks.start(1)] + table + "\n" + text[marks.end(1) :]
    return text


def families_table() -> str:
    """Return the table of families."""
    rows = [(", ".join(f"`{n}`" for n in (f.model_type, *f.aliases)), f.about) for f in supported_families()]
    return markdown(("`model_type`", "what it is"), rows)


def formats_table() -> str:
    """Return the table of formats of tensors."""
    return markdown(("kind", "tensors in safetensors files"), [(f"`{f.name}`", f.about) for f in supported_formats()])


def models_table(rate: float) -> str:
    """Return the table of models; `rate` is in weights of experts per second."""
    bundles = [f"bundle {','.join(map(str, ladder))}" for ladder in LADDERS]
    header = ("model", "weights", "download", *bundles, "memory, least", "comfortable", "compiling")
    return markdown(header, [row(model, rate) for model in MODELS])


def row(model: Model, rate: float) -> tuple[str, ...]:
    """Return the cells of a model."""
    spec = model.spec
    return (
        model.name,
        f"{weights(spec) / 1e9:.1f} B",
        f"{gigabytes(checkpoint_bytes(spec, model.stored))} {model.stored}",
        *[gigabytes(total_bytes(draft(model.compiled(ladder), ladder, DENSE_BITS))) for ladder in LADDERS],
        gibibytes(least_bytes(model.compiled(DEFAULT_LADDER))),
        gibibytes(comfortable_bytes(model.compiled(DEFAULT_LADDER))),
        duration(spec.expert_weights / rate),
    )


def weights(spec: ModelSpec) -> int:
    """Return the number of weights of a model, without what the decoder keeps only for itself."""
    vectors = spec.total_experts * sum(spec.expert_vectors.values())
    return spec.expert_weights + vectors + sum(math.prod(shape) for _, shape in spec.each_tensor())


def checkpoint_bytes(spec: ModelSpec, stored: str) -> int:
    """Return the bytes of a checkpoint whose maker stores it as bf16, fp8 or mxfp4."""
    dense = 0
    for name, shape in spec.each_tensor():
        inside = name.startswith("layers.") and dense_kind(name, shape) is not None
        dense += fp8_bytes(shape) if stored == "fp8" and inside else 2 * math.prod(shape)
    vectors = 2 * sum(spec.expert_vectors.values())
    expert = {
        "bf16": lambda shape: 2 * math.prod(shape),
        "fp8": fp8_bytes,
        "mxfp4": lambda shape: math.prod(shape) * 17 // 32,  # 32 codes of 4 bits share a byte of scale
    }[stored]
    return dense + spec.total_experts * (vectors + sum(map(expert, spec.expert_shapes.values())))


def fp8_bytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of a matrix in FP8 and of its scales."""
    rows, cols = shape
    return rows * cols + 4 * math.ceil(rows / FP8_BLOCK) * math.ceil(cols / FP8_BLOCK)


def floor_bytes(bundle: Bundle) -> int:
    """Return the least memory in which a planned bundle runs, with the default context."""
    return plan_budget(
        bundle,
        load_kernels(REFERENCE, threads=1),  # the same on every machine
        min(DEFAULT_CONTEXT, bundle.spec.max_context),
        process_bytes=DEVICE_PROCESS_BYTES,
        memory_bytes=0,
    ).floor_bytes


def draft(spec: ModelSpec, ladder: tuple[int, ...], dense_bits: int) -> Bundle:
    """Return the bundle that compiling should make."""
    return planned_bundle(spec, ladder, alike(spec, dense_bits))


def least_bytes(spec: ModelSpec) -> int:
    """Return the least memory in which the model runs: experts come from the disk, the rest has the fewest bits."""
    return floor_bytes(draft(spec, DEFAULT_LADDER, FEWEST_DENSE_BITS))


def comfortable_bytes(spec: ModelSpec) -> int:
    """Return the memory in which all experts fit at COMFORTABLE_TIER."""
    usual = draft(spec, DEFAULT_LADDER, DENSE_BITS)
    experts = spec.total_experts * expert_layout(spec, DEFAULT_LADDER).prefix_bytes(COMFORTABLE_TIER)
    return floor_bytes(usual) + experts


def gigabytes(nbytes: float) -> str:
    """Return decimal gigabytes, as disks and downloads have them."""
    return f"{nbytes / 1e9:.1f} GB"


def gibibytes(nbytes: float) -> str:
    """Return binary gigabytes, as --memory takes them."""
    return f"{nbytes / (1 << 30):.1f} GiB"


def duration(seconds: float) -> str:
    """Return a time in two digits."""
    hours = seconds / 3600
    return f"{seconds / 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h" if hours < 9.95 else f"{hours:.0f} h"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
