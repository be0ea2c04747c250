"""Random models of all families in llama.cpp, beside the decoder of the runtime: do both compute the same?

    python benchmarks/export/llamacpp_families.py --bin DIR [FAMILY...]

DIR has llama-perplexity. The models are those of tests/families, and variants of them without what llama.cpp lacks.
They go to GGUF in float32. For each, it prints the KL between both and the share of tokens for which they agree on the
best next one, or why it is not exported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from export.gguf_kit import bundle_like
from families.cases import CASES
from families.harness import Case, random_model
from helpers import save_byte_tokenizer

from dymoe_compile.checkpoint.checkpoint import Checkpoint
from dymoe_compile.checkpoint.original import open_original
from dymoe_compile.export.gguf.original import write_original
from dymoe_compile.job.progress import silent
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels import load_kernels

CONTEXT, LETTERS, VOCABULARY = 128, 520, 256
PLAIN: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def made(family: str, name: str, config: str, **values: Any) -> Case:
    """Return a case of a family whose configuration class in transformers is `config`."""
    return Case(family, name, lambda common: getattr(transformers, config)(**{**common, **PLAIN, **values}))


def changed(family: str, name: str, **values: Any) -> Case:
    """Return a case of tests/families with other values in its configuration."""
    case = next(case for case in CASES if (case.family, case.name) == (family, name))

    def config(common: dict[str, Any]) -> Any:
        made = case.config(common)
        for key, value in values.items():
            setattr(made, key, value)
        return made

    return Case(family, f"{name}, changed", config, case.model)


FULL = ["full_attention"] * 4
EXPERTS: dict[str, Any] = {"num_experts": 6, "moe_intermediate_size": 40, "norm_topk_prob": True}
VARIANTS = [
    made("qwen3_moe", "plain", "Qwen3MoeConfig", **EXPERTS, head_dim=16),
    made("qwen3_moe", "tied, yarn", "Qwen3MoeConfig", **EXPERTS, tie_word_embeddings=True, rope_parameters=YARN),
    made("olmoe", "plain", "OlmoeConfig", num_experts=6, intermediate_size=40, num_key_value_heads=4),
    made("mixtral", "plain", "MixtralConfig", num_local_experts=6, intermediate_size=40),
    made("mixtral", "wide, llama3", "MixtralConfig", num_local_experts=6, head_dim=20, rope_parameters=LLAMA3),
    changed("qwen2_moe", "plain", decoder_sparse_step=1),
    changed(
        "qwen2_moe",
        "window-and-dense-layers",
        mlp_only_layers=[],
        norm_topk_prob=False,
        layer_types=["full_attention"] * 4,
    ),
    changed("qwen3_omni_moe", "thinker"),
    changed("mellum", "defaults", norm_topk_prob=True),
    changed("ernie4_5_moe", "interval", moe_norm_min=1e-12, moe_layer_interval=1),
    changed("ernie4_5_moe", "range", moe_layer_end_index=-1),
    changed("gpt_oss", "default-yarn", rope_parameters={**YARN, "factor": 32.0, "beta_fast": 32.0, "truncate": True}),
    changed("hunyuan_v1_moe", "lists and alpha", attention_bias=False),
    changed("dots1", "groups and windows", attention_bias=False, num_key_value_heads=4, layer_types=FULL),
    changed("dots1", "yarn, gates not normalized, tied", num_key_value_heads=4),
]


def log_probabilities(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids [chunks, T] of a file of llama-perplexity, and the log-probabilities of its second halves.

    A row of these has a scale and a least value, float32, then 16-bit codes.
    """
    data = path.read_bytes()
    context, vocabulary, chunks = np.frombuffer(data, np.int32, 3, 8)
    ids = np.frombuffer(data, np.int32, context * chunks, 20).reshape(chunks, context)
    width = 2 * ((vocabulary + 1) // 2) + 4
    rows = np.frombuffer(data, np.uint16, offset=20 + ids.nbytes).reshape(-1, width)
    scales, least = rows[:, :4].copy().view(np.float32).T
    values = rows[:, 4 : 4 + vocabulary] * scales[:, None] + least[:, None]
    return ids.astype(np.int64), values.reshape(chunks, -1, vocabulary)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities of logits [T, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def compare(case: Case, tool: Path, place: Path) -> str:
    """Return how a case's model in llama.cpp differs from the runtime's."""
    random_model(case, vocab_size=VOCABULARY).save_pretrained(place)
    save_byte_tokenizer(place)
    checkpoint = Checkpoint.open(place)
    write_original(bundle_like(checkpoint, place), checkpoint, place / "model.gguf", silent)
    letters = np.random.default_rng(0).integers(97, 123, LETTERS)
    (place / "text.txt").write_bytes(bytes(letters.astype(np.uint8)))
    args = ("-m", "model.gguf", "-f", "text.txt", "-c", str(CONTEXT), "-t", "1", "--kl-divergence-base", "base.kld")
    exact = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
    done = subprocess.run([tool, *args, *exact], cwd=place, capture_output=True, text=True, errors="replace")
    if done.returncode or not (place / "base.kld").exists():
        return "FAILED: " + " ".join((done.stdout + done.stderr).splitlines()[-4:])[-400:]
    ids, theirs = log_probabilities(place / "base.kld")
    original = open_original(place, load_kernels("numpy"))
    kls, same = [], []
    for window, q in zip(ids, theirs, strict=True):
        p = log_softmax(original.logits(original.hidden(window)))[CONTEXT // 2 : CONTEXT - 1]
        kls.append((np.exp(p) * (p - q)).sum(-1).mean())
        same.append((p.argmax(-1) == q.argmax(-1)).mean())
    return f"KL {np.mean(kls):.1e}, same best {np.mean(same):.1%}"


@click.command()
@click.argument("families", nargs=-1)
@click.option("--bin", "folder", required=True, type=click.Path(path_type=Path), help="Where llama.cpp's programs are.")
def main(families: tuple[str, ...], folder: Path) -> None:
    """Compare all cases, or those of FAMILIES."""
    for case in (*CASES, *VARIANTS):
        if families and case.family not in families:
            continue
        with tempfile.TemporaryDirectory() as name:
            try:
                found = compare(case, folder.absolute() / "llama-perplexity", Path(name))
            except DymoeError as error:
                found = f"not exported: {error}"
            print(f"{case}: {found}", flush=True)


if __name__ == "__main__":
    main()
